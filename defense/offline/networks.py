"""A small residual network for small images (He et al., https://arxiv.org/abs/1512.03385).

Two departures make it cheap on a CPU: a stage halves the image with max pooling inside its first
block instead of a strided convolution, and only the stem works at full resolution.

This file imports torch alone: archives carry it as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Architecture:
    """Shape of a `CifarResNet`: blocks and channels per stage, channels of the stem, classes."""

    depths: tuple[int, ...] = (1, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256)
    stem: int = 32
    classes: int = 10

    def __post_init__(self) -> None:
        """Refuse shapes that describe no network."""
        if not self.depths or len(self.depths) != len(self.widths):
            raise ValueError(
                f"a network needs one depth and one width per stage, got depths={self.depths} "
                f"and widths={self.widths}"
            )
        if min(*self.depths, *self.widths, self.stem, self.classes) < 1:
            raise ValueError(f"every number of an architecture must be at least 1, got {self}")


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation per channel, of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Map uint8 `(N, C, H, W)` to normalised float32 of the same shape, channels last."""
        mean = torch.tensor(self.mean, device=pixels.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(1, -1, 1, 1)
        scaled = (pixels.float() / 255 - mean) / std
        return scaled.contiguous(memory_format=torch.channels_last)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; with `halve` the image loses half its side."""

    def __init__(self, inputs: int, outputs: int, *, halve: bool) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, outputs, 3)
        self.pool = nn.MaxPool2d(2) if halve else nn.Identity()
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = convolution(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, halve=halve)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, inputs, H, W)` to `(N, outputs, H', W')`: half the side, or the same."""
        inner = self.relu1(self.bn1(self.pool(self.conv1(x))))
        return self.relu2(self.bn2(self.conv2(inner)) + self.shortcut(x))  # type: ignore[no-any-return]


class Network(nn.Module):
    """A classifier of normalised images `(N, 3, H, W)` that an `Architecture` describes."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture


class CifarResNet(Network):
    """Residual classifier of images whose side is a multiple of `2 ** len(depths)`."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        self.stem = nn.Sequential(
            convolution(3, architecture.stem, 3), nn.BatchNorm2d(architecture.stem), nn.ReLU()
        )
        self.stages = nn.Sequential()
        channels = architecture.stem
        for depth, width in zip(architecture.depths, architecture.widths, strict=True):
            first = self.block(channels, width, halve=True)
            rest = [self.block(width, width, halve=False) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(first, *rest))
            channels = width
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, architecture.classes)

    def block(self, inputs: int, outputs: int, *, halve: bool) -> BasicBlock:
        """Return one block of a stage; a routed network has blocks of its own."""
        return BasicBlock(inputs, outputs, halve=halve)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images `(N, 3, H, W)` to logits `(N, classes)`."""
        features = self.pool(self.stages(self.stem(x)))
        return self.head(features.flatten(1))  # type: ignore[no-any-return]


class ClassGatedResNet(CifarResNet):
    """A residual classifier with a gate per filter and class (https://arxiv.org/abs/2007.08194).

    `class_gates` is (K, C) for K channels of the last feature map and C classes, each in [0, 1].
    Requests take the standard path, without gates; training takes both.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        shape = (architecture.widths[-1], architecture.classes)
        self.class_gates = nn.Parameter(torch.full(shape, 0.5))

    def gated_forward(self, x: Tensor, labels: Tensor, gates: Tensor | None = None) -> Tensor:
        """Map images `(N, 3, H, W)` to logits `(N, C)`, each through the gates of its label `(N,)`.

        gates: `(K, C)` in the place of the network's own.
        """
        columns = (self.class_gates if gates is None else gates).T[labels]
        features = self.stages(self.stem(x)) * columns[:, :, None, None]
        return self.head(self.pool(features).flatten(1))  # type: ignore[no-any-return]


def convolution(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    """Return a convolution that keeps the image's size; the batch norm behind it is its bias."""
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)


def shortcut(inputs: int, outputs: int, *, halve: bool) -> nn.Module:
    """Return the identity where shapes allow it, else a pooled 1x1 projection."""
    if inputs == outputs and not halve:
        return nn.Identity()
    pool = nn.AvgPool2d(2) if halve else nn.Identity()
    return nn.Sequential(pool, convolution(inputs, outputs, 1), nn.BatchNorm2d(outputs))


class Controller(nn.Module):
    """Decides from what a layer is given which channels of its output are open.

    The architecture controlling module of interpretable decoupling (https://arxiv.org/abs/1906.01166,
    section 3.1), with the authors' first weights: at first nothing depends on the input and three
    quarters of the channels are open. Decisions are made in single precision, autocast or not.
    """

    emits_path = True
    """How a router knows that what this module returns is a path."""

    def __init__(self, inputs: int, outputs: int, classes: int, reduction: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, max(1, inputs // reduction))
        self.fc2 = nn.Linear(self.fc1.out_features, outputs)
        self.classifier = nn.Linear(outputs, classes, bias=False)
        """Reads the class off the mask, in training alone."""
        self.decisions: list[Decision] | None = None
        nn.init.zeros_(self.fc1.weight)
        nn.init.ones_(self.fc1.bias)
        nn.init.kaiming_normal_(self.fc2.weight)
        nn.init.ones_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map a layer's input `(N, inputs, H, W)` to the mask `(N, outputs)` of its output.

        Open is 1 and closed 0; in training, values in between occur.
        """
        with torch.autocast(x.device.type, enabled=False):
            pooled = x.mean((2, 3), dtype=self.fc1.weight.dtype)
            wanted = self.fc2(functional.relu(self.fc1(pooled)))
            return hashed(wanted) if self.training else (wanted > 0).to(wanted.dtype)

    def gate(self, output: Tensor, by: Tensor) -> Tensor:
        """Return `output` `(N, outputs, H, W)` of a layer that was given `by`, its closed channels 0."""
        mask: Tensor = self(by)
        if self.decisions is not None:
            pooled = output.mean((2, 3), dtype=mask.dtype)
            self.decisions.append(Decision(self, mask, pooled))
        return output * mask.to(output.dtype)[:, :, None, None]


@dataclass(frozen=True)
class Decision:
    """What a controller decided: mask `(N, C)`, and the layer's output before it, pooled, `(N, C)`."""

    controller: Controller
    mask: Tensor
    output: Tensor


def hashed(wanted: Tensor) -> Tensor:
    """Make `wanted` `(N, C)`, of any sign, nearly binary in [0, 1], with a gradient.

    Improved semantic hashing (https://arxiv.org/abs/1801.09797): noise makes values close to 0 costly;
    every entry is soft or hard by chance, and its gradient is the soft one's. Which are hard is drawn
    for each image; the authors of decoupling draw channels once for a batch.
    """
    noisy = wanted + torch.randn_like(wanted)
    soft = (1.2 * noisy.sigmoid() - 0.1).clamp(0, 1)
    values = torch.where(torch.rand_like(soft) < 0.5, (noisy > 0).to(soft.dtype), soft)
    return values.detach() + (soft - soft.detach())


class DecoupledBlock(BasicBlock):
    """A block whose layers each close channels of their output, as in the published ResNet-56.

    skip_closed: for a single image, closed channels are left out instead of multiplied by 0. Answers
    agree to rounding; modules inside the block, but for the controllers, are then not called.
    """

    def __init__(self, inputs: int, outputs: int, *, halve: bool, classes: int) -> None:
        super().__init__(inputs, outputs, halve=halve)
        self.control1 = Controller(inputs, outputs, classes)
        self.control2 = Controller(outputs, outputs, classes)
        self.skip_closed = False

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, inputs, H, W)` to `(N, outputs, H', W')`: half the side, or the same."""
        if self.skip_closed and not self.training and len(x) == 1:
            return self.skipping(x)
        hidden = self.relu1(self.bn1(self.pool(self.conv1(x))))
        hidden = self.control1.gate(hidden, by=x)
        inner = self.control2.gate(self.bn2(self.conv2(hidden)), by=hidden)
        return self.relu2(inner + self.shortcut(x))  # type: ignore[no-any-return]

    def skipping(self, x: Tensor) -> Tensor:
        """Return what `forward` does for one image `(1, inputs, H, W)`; compute open channels alone."""
        first, gates = opened(self.control1(x))
        hidden = functional.conv2d(x, self.conv1.weight[first], padding=self.conv1.padding)
        hidden = functional.relu(normalised(self.pool(hidden), self.bn1, first)) * gates
        everywhere = hidden.new_zeros(1, self.conv1.out_channels, *hidden.shape[2:])
        second, gates = opened(self.control2(everywhere.index_copy(1, first, hidden)))
        weight = self.conv2.weight[second][:, first]
        inner = functional.conv2d(hidden, weight, padding=self.conv2.padding)
        inner = normalised(inner, self.bn2, second) * gates
        return self.relu2(self.shortcut(x).index_add(1, second, inner))  # type: ignore[no-any-return]


def opened(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the channels `(K,)` that a mask `(1, C)` opens, and their gates `(1, K, 1, 1)`.

    Where none is open, a closed one stands in: convolutions want at least one.
    """
    channels = mask[0].nonzero()[:, 0] if mask.any() else mask.new_zeros(1, dtype=torch.long)
    return channels, mask[:, channels, None, None]


def normalised(x: Tensor, norm: nn.BatchNorm2d, channels: Tensor) -> Tensor:
    """Apply to `x` `(N, K, H, W)` what `norm`, in eval mode, does to these `channels` `(K,)`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = norm.running_mean[channels], norm.running_var[channels]
    weight, bias = norm.weight[channels], norm.bias[channels]
    return functional.batch_norm(x, mean, variance, weight, bias, eps=norm.eps)


class DecoupledResNet(CifarResNet):
    """The same network with a controller per layer of its blocks; the stem is always open.

    Its weights have the plain network's names, beside those of the controllers.
    """

    def block(self, inputs: int, outputs: int, *, halve: bool) -> BasicBlock:
        """Return a block with controllers."""
        return DecoupledBlock(inputs, outputs, halve=halve, classes=self.architecture.classes)

    @property
    def blocks(self) -> tuple[DecoupledBlock, ...]:
        """The blocks, in the order of execution."""
        return tuple(module for module in self.modules() if isinstance(module, DecoupledBlock))

    @property
    def skip_closed(self) -> bool:
        """Whether a single image's closed channels are left out instead of multiplied by 0."""
        return all(block.skip_closed for block in self.blocks)

    @skip_closed.setter
    def skip_closed(self, skip: bool) -> None:
        for block in self.blocks:
            block.skip_closed = skip

    @contextmanager
    def recorded(self) -> Iterator[list[Decision]]:
        """Collect all decisions made inside the block, with their graph; nothing is skipped in it."""
        decisions: list[Decision] = []
        skip, self.skip_closed = self.skip_closed, False
        controllers = [module for module in self.modules() if isinstance(module, Controller)]
        try:
            for controller in controllers:
                controller.decisions = decisions
            yield decisions
        finally:
            for controller in controllers:
                controller.decisions = None
            self.skip_closed = skip


NETWORKS: dict[str, type[CifarResNet]] = {
    "CifarResNet": CifarResNet,
    "ClassGatedResNet": ClassGatedResNet,
    "DecoupledResNet": DecoupledResNet,
}
"""By the name that a card gives; all start from the weights of a plain one."""
