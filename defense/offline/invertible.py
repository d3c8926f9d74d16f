"""A residual classifier whose features can be turned back into the image (i-ResNet).

Behrmann et al., https://arxiv.org/abs/1811.00995: a block x + g(x) is invertible by a fixed-point
iteration where g is a contraction, and g is one where the norms of its convolutions multiply to less
than 1. Down-sampling is space-to-depth, and no feature is lost on the way to the linear head.

Ours: the four pixels that become four channels are mixed by the Hadamard matrix (a Haar wavelet), a
batch norm stands on the trunk of every stage and before the head, and the convolutions' norms are held
down after a step (https://arxiv.org/abs/1804.04368) instead of inside the forward pass. A batch norm
in eval mode is a shift and a scale per channel, hence invertible.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from defense.errors import ArtifactError
from defense.offline.networks import Architecture, Network

CONTRACTION = 0.9
"""What a branch's Lipschitz constant is held at: the paper's coefficient, here of a whole branch."""
TORUS = 8
"""Side of the periodic map on which norms are followed while training."""
FIRST_ITERATIONS = 10
LEAST_GAIN = 0.1
"""Of a batch norm, which could not be inverted at 0."""
TOLERANCE = 2e-6
"""An inversion ends when no value moves by more, relative to the largest one."""
LIMIT = 500
"""Iterations after which an inversion has failed; a contraction by 0.9 needs about 130."""

HADAMARD = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2


class BoundedConv2d(nn.Conv2d):
    """A convolution that keeps the image's size, and whose norm as an operator is held at `bound`.

    `hold` follows the norm from below by power iteration on the convolution itself, on a periodic
    map; `norm` states it afterwards, for certain.
    """

    direction: Tensor

    def __init__(self, inputs: int, outputs: int, size: int, *, bound: float) -> None:
        super().__init__(inputs, outputs, size, padding=size // 2)
        self.bound = bound
        self.register_buffer("direction", torch.randn(1, inputs, TORUS, TORUS))
        for _ in range(FIRST_ITERATIONS):
            self.hold()

    @torch.no_grad()
    def hold(self) -> None:
        """Improve the estimate of the norm by one iteration; shrink the weight where it is too large."""
        there = periodic(self.direction, self.weight)
        back = periodic(there, self.weight.transpose(0, 1).flip(2, 3))
        norm = back.norm() / there.norm().clamp(min=1e-12)
        self.direction.copy_(back / back.norm().clamp(min=1e-12))
        self.weight.mul_((self.bound / norm.clamp(min=1e-12)).clamp(max=1))

    @torch.no_grad()
    def norm(self, side: int) -> float:
        """Return an upper bound of the norm on maps of up to `side` pixels, tight but for borders.

        With zeros around the map the convolution is a part of the one on a periodic map that is
        larger by the kernel; there, the Fourier transform takes it apart into one matrix for every
        frequency (https://arxiv.org/abs/1805.10408).
        """
        period = side + self.kernel_size[0] - 1
        spectrum = torch.fft.rfft2(self.weight.double(), s=(period, period)).permute(2, 3, 0, 1)
        return float(torch.linalg.matrix_norm(spectrum, 2).max())


def periodic(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve `x` `(N, I, H, W)`, continued periodically, with `weight` `(O, I, k, k)`."""
    margin = weight.shape[2] // 2
    return functional.conv2d(functional.pad(x, (margin,) * 4, mode="circular"), weight)


class InvertibleBlock(nn.Module):
    """x + g(x), with g of three convolutions whose norms multiply to `CONTRACTION`."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        bound = CONTRACTION ** (1 / 3)
        self.branch = nn.Sequential(
            BoundedConv2d(channels, hidden, 3, bound=bound),
            nn.ELU(),
            BoundedConv2d(hidden, hidden, 1, bound=bound),
            nn.ELU(),
            BoundedConv2d(hidden, channels, 3, bound=bound),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, channels, H, W)` to the same shape."""
        return x + self.branch(x)  # type: ignore[no-any-return]

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x that `forward` maps to `y`; ArtifactError where iterating does not settle."""
        x = y
        for _ in range(LIMIT):
            before, x = x, y - self.branch(x)
            if (x - before).abs().max() <= TOLERANCE * x.abs().max():
                return x  # type: ignore[no-any-return]
        raise ArtifactError(
            f"a block of the invertible network was not inverted in {LIMIT} iterations, because its "
            "branch is no contraction; train it with the method 'invertible'"
        )

    def norm(self, side: int) -> float:
        """Return an upper bound of g's Lipschitz constant; ELU has 1."""
        product = 1.0
        for module in self.branch:
            product *= module.norm(side) if isinstance(module, BoundedConv2d) else 1.0
        return product


class Unfold(nn.Module):
    """Turn 2x2 pixels into four channels, their average first; a rotation, so norms stay as they are."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, C, H, W)` to `(N, 4 C, H / 2, W / 2)`."""
        return mixed(functional.pixel_unshuffle(x, 2))

    def inverse(self, y: Tensor) -> Tensor:
        """Map `(N, 4 C, H / 2, W / 2)` back to `(N, C, H, W)`."""
        return functional.pixel_shuffle(mixed(y), 2)


def mixed(x: Tensor) -> Tensor:
    """Rotate every four channels of `x` `(N, 4 C, H, W)`; twice is as if nothing was done."""
    fours = x.unflatten(1, (-1, 4))
    return torch.einsum("ij,ncjhw->ncihw", HADAMARD.to(x), fours).flatten(1, 2)


class TrunkNorm(nn.BatchNorm2d):
    """A batch norm that can be inverted in eval mode."""

    def gain(self) -> Tensor:
        """Return by what (C,) it multiplies each channel in eval mode."""
        assert self.running_var is not None
        return self.weight / (self.running_var + self.eps).sqrt()

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x `(N, C, H, W)` that eval mode maps to `y`."""
        assert self.running_mean is not None
        shift = self.running_mean[:, None, None]
        return (y - self.bias[:, None, None]) / self.gain()[:, None, None] + shift


Step = Unfold | TrunkNorm | InvertibleBlock


class InvertibleResNet(Network):
    """An i-ResNet with average pooling and a linear head on its features.

    Of the architecture, `depths` are blocks per stage, `widths` the hidden channels of their branches,
    and `stem` (12 or 48) the channels that 2x2 or 4x4 pixels become before the first stage; every
    further stage halves the sides. No image `(N, 3, H, W)` changes its number of values on the way.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        if architecture.stem not in (12, 48):
            raise ValueError(f"the stem of an invertible network is 12 or 48, got {architecture}")
        self.trunk = nn.Sequential()
        channels = 3
        for stage, depth in enumerate(architecture.depths):
            while channels < architecture.stem * 4**stage:
                self.trunk.append(Unfold())
                channels *= 4
            self.trunk.append(TrunkNorm(channels))
            width = architecture.widths[stage]
            self.trunk.extend(InvertibleBlock(channels, width) for _ in range(depth))
        self.trunk.append(TrunkNorm(channels))
        self.head = nn.Linear(channels, architecture.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images `(N, 3, H, W)` to logits `(N, classes)`."""
        return self.answer(self.trunk(x))

    def answer(self, latent: Tensor) -> Tensor:
        """Map features `(N, C, H', W')`, what the trunk returns, to logits `(N, classes)`."""
        return self.head(latent.mean((2, 3)))  # type: ignore[no-any-return]

    @torch.no_grad()
    def invert(self, latent: Tensor) -> Tensor:
        """Return the images `(N, 3, H, W)` that the trunk, in eval mode, maps to these features."""
        for step in reversed(self.steps()):
            latent = step.inverse(latent)
        return latent

    def steps(self) -> tuple[Step, ...]:
        """The trunk's parts, in the order of execution."""
        return tuple(self.trunk)  # type: ignore[arg-type]

    @torch.no_grad()
    def hold(self) -> None:
        """Keep all branches contractions and all batch norms away from 0; wanted after every step."""
        for module in self.modules():
            if isinstance(module, BoundedConv2d):
                module.hold()
            elif isinstance(module, TrunkNorm):
                module.weight.clamp_(min=LEAST_GAIN)

    @torch.no_grad()
    def stretch(self, side: int) -> tuple[float, float]:
        """Return upper bounds of the Lipschitz constants of trunk and inverse, in eval mode.

        They hold for images of `side` x `side` and smaller. The second is infinite where a branch is
        not known to be a contraction.
        """
        there, back = 1.0, 1.0
        for step in self.steps():
            if isinstance(step, Unfold):
                side //= 2
            elif isinstance(step, TrunkNorm):
                there *= float(step.gain().abs().max())
                back /= float(step.gain().abs().min())
            else:
                norm = step.norm(side)
                there *= 1 + norm
                back = back / (1 - norm) if norm < 1 else math.inf
        return there, back
