"""`generative`: a small trained network draws the channel mask of an image in one forward.

GEN-CNP, "On Model Explanations with Transferable Neural Pathways" (Lin et al., 2023, arXiv
2309.09887): recursive feature embedders, a pathway distillation network, recursive pathway decoders
and distance-aware quantisation. What of it is certain is that list of parts and that the masked
network has to reproduce the network's own output while masks stay sparse. Sizes, losses and
constants here are a reconstruction, and it is the channel-level one: the generator sees the mean of
a channel over positions and opens or closes the whole channel, never single positions.

The mask is only read in front of a request; what the network answers is not changed by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from defense.errors import ConfigError, DataError
from defense.routers.gating import channels_first, gated, observed
from defense.routers.recipes import Observing
from defense.sites import device_of, first_tensor
from defense.types import PathLayout, Site

TEMPERATURE = 2.0
"""T of the quantiser: how sharply it tells the two levels apart in its gradient."""
KERNEL = 2.0
"""sigma of the quantiser: how far the level that is not the nearest counts."""
OPEN = 1.0
"""Added to every score at the start: channels begin open unless they are weak for them in an image."""
REACH = 10.0
"""Pooled activations count up to so many deviations: attacks push channels further than any image."""


def quantise(scores: Tensor) -> Tensor:
    """Map scores in [0, 1], of any shape, to 0 or 1 (to 1e-6) with a smooth, finite gradient.

    Distance-aware quantisation with the two levels 0 and 1, after the public code of cvlab-yonsei/DAQ
    in its 1-bit configuration. A score of exactly 0.5 gives 0.
    """
    is_one, discount = scores > 0.5, math.exp(-1 / KERNEL**2)
    zero = (-scores).exp() * torch.where(is_one, discount, 1.0)
    one = (scores - 1).exp() * torch.where(is_one, 1.0, discount)
    # The discount keeps the two at least 0.13 apart, at 0.5 too: this divides by no small number.
    sharpness = TEMPERATURE / (one - zero).detach().abs()
    shift = 1 / math.expm1(TEMPERATURE)
    return torch.sigmoid(sharpness * (one - zero)) * (1 + 2 * shift) - shift


def pooled(output: Tensor, site: Site) -> Tensor:
    """Return the mean of every channel over positions: (N, C) float32, without a host sync."""
    return channels_first(output, site).mean(2, dtype=torch.float32)


@dataclass(frozen=True)
class Affine:
    """A linear layer: weight (out, in), bias (out,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Map (N, in) to (N, out)."""
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Cell:
    """A gated recurrent unit: `inputs` (3 x hidden, in) and `hidden` (3 x hidden, hidden)."""

    inputs: Affine
    hidden: Affine

    def __call__(self, x: Tensor, state: Tensor) -> Tensor:
        """Map (N, in) and the state (N, hidden) to the next state."""
        own, past = self.inputs, self.hidden
        return torch.gru_cell(x, state, own.weight, past.weight, own.bias, past.bias)


@dataclass(frozen=True)
class Generator:
    """Scores of all channels from their standardised means; all that it learns, as tensors.

    embed: one per site, channels to hidden. modulate: one per site, hidden to a gain and an offset
    per channel. distil: the layers between the embeddings of all sites and the code of the image.
    """

    embed: tuple[Affine, ...]
    embedder: Cell
    distil: tuple[Affine, ...]
    decoder: Cell
    modulate: tuple[Affine, ...]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map standardised means (N, D) to scores (N, D) in (0, 1) and codes (N, hidden)."""
        means = x.split([affine.weight.shape[1] for affine in self.embed], dim=1)
        embedded = self._embedded(means)
        code = torch.cat(embedded, dim=1)
        for affine in self.distil:
            code = torch.tanh(affine(code))
        return torch.cat(self._scored(means, embedded, code), dim=1), code

    def _embedded(self, means: Sequence[Tensor]) -> list[Tensor]:
        """Return h_l (N, hidden) of every site: a deep one is read in the light of the shallow ones."""
        state = means[0].new_zeros(len(means[0]), self.embedder.hidden.weight.shape[1])
        states = []
        for affine, mean in zip(self.embed, means, strict=True):
            state = self.embedder(affine(mean), state)
            states.append(state)
        return states

    def _scored(
        self, means: Sequence[Tensor], embedded: Sequence[Tensor], code: Tensor
    ) -> list[Tensor]:
        """Return the scores (N, C) of every site, decided from the deepest to the shallowest."""
        state = torch.zeros_like(code)
        scores = []
        for affine, mean, own in zip(
            reversed(self.modulate), reversed(means), reversed(embedded), strict=True
        ):
            state = self.decoder(torch.cat([code, own], dim=1), state)
            gain, offset = affine(state).chunk(2, dim=1)
            scores.append(torch.sigmoid(mean * gain + offset))
        return scores[::-1]


@dataclass(frozen=True)
class GenerativeRouter:
    """One bit per channel: 1 where the generator keeps it for this image, 0 where it closes it.

    shift, scale: (D,) mean and deviation of pooled channels over the images of the fit.
    """

    name: ClassVar[str] = "generative"
    one_forward: ClassVar[bool] = True

    layout: PathLayout
    shift: Tensor
    scale: Tensor
    generator: Generator

    def reduce(self, output: Tensor, site: Site) -> Tensor:
        """(N, C, ...) or (N, ..., C) -> means over positions (N, C) float32, without a host sync."""
        return pooled(output, site)

    def finish(self, path: Tensor, logits: Tensor) -> Tensor:
        """Pooled channels (N, D) -> masks (N, D) float32, each exactly 0 or 1."""
        return self.masks(path).round()

    def masks(self, path: Tensor) -> Tensor:
        """Pooled channels (N, D) -> masks of 0 and 1 to 1e-6, with gradient to the generator."""
        return quantise(self.generate(path)[0])

    def generate(self, path: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled channels (N, D) -> scores (N, D) in (0, 1) and codes (N, hidden)."""
        return self.generator(((path - self.shift) / self.scale).clamp(-REACH, REACH))


@dataclass(frozen=True)
class GenerativeRecipe(Observing):
    """Hyper-parameters of the generator and of its training with Adam.

    The loss is KL(network || masked network) + alpha x cross-entropy of the code against the
    network's answer + beta x share of open channels + delta x (1 - overlap of masks of one class);
    beta rises from 0 to its value over the first half of the steps.
    """

    examples: ClassVar[int] = 5000

    epochs: int = 4
    batch: int = 50
    learning_rate: float = 3e-3
    hidden: int = 64
    alpha: float = 1.0
    beta: float = 2.0
    delta: float = 0.1

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "learning_rate", "hidden"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("alpha", "beta", "delta"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")

    def fit(
        self,
        model: nn.Module,
        sites: tuple[Site, ...],
        inputs: Tensor,
        *,
        seed: int,
        progress: Callable[[float], None],
    ) -> GenerativeRouter:
        """Train a generator for the frozen model; gradients reach the generator's tensors alone."""
        if len(inputs) == 0:
            raise DataError(
                "the router 'generative' has no inputs to learn from; give at least one"
            )
        means, logits = _observations(model, sites, inputs, self.batch)
        draw = torch.Generator().manual_seed(seed)
        router = _untrained(sites, means, self.hidden, draw)
        head = _affine(self.hidden, logits.shape[1], draw, means.device)
        weights = [*_tensors(router.generator), *_tensors(head)]
        optimizer = torch.optim.Adam(weights, self.learning_rate)
        orders = [torch.randperm(len(inputs), generator=draw) for _ in range(self.epochs)]
        batches = [rows for order in orders for rows in order.split(self.batch)]
        for step, rows in enumerate(batches):
            at = rows.to(means.device)
            beta = self.beta * min(1.0, 2 * step / len(batches))
            with torch.enable_grad():
                loss = self._loss(model, router, head, inputs[rows], means[at], logits[at], beta)
                torch.autograd.backward(loss, inputs=weights)
            optimizer.step()
            optimizer.zero_grad()
            progress((step + 1) / len(batches))
        for weight in weights:
            weight.requires_grad_(False)
        return router

    def _loss(
        self,
        model: nn.Module,
        router: GenerativeRouter,
        head: Affine,
        inputs: Tensor,
        means: Tensor,
        logits: Tensor,
        beta: float,
    ) -> Tensor:
        """Return the loss of a batch, given what the bare network made of it."""
        scores, code = router.generate(means)
        masks = quantise(scores)
        sizes = [site.channels for site in router.layout.sites]
        with gated(model, router.layout.sites, masks.split(sizes, dim=1)):
            answers = first_tensor(model(inputs.to(means.device)))
        assert answers is not None
        kept = functional.kl_div(
            answers.float().log_softmax(1),
            logits.log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        predicted = logits.argmax(1)
        named = functional.cross_entropy(head(code), predicted)
        apart = 1 - class_overlap(masks, predicted)
        return kept + self.alpha * named + beta * masks.mean() + self.delta * apart


def class_overlap(masks: Tensor, classes: Tensor) -> Tensor:
    """Return the mean intersection over union of masks (N, D) of one class (N,), a scalar in [0, 1].

    Differentiable, on values in [0, 1]; 0 where no two rows share a class.
    """
    both = masks @ masks.T
    size = masks.sum(1)
    either = size[:, None] + size - both
    pairs = (classes[:, None] == classes).float().fill_diagonal_(0)
    return (pairs * both / either.clamp_min(1)).sum() / pairs.sum().clamp_min(1)


@torch.no_grad()
def _observations(
    model: nn.Module, sites: tuple[Site, ...], inputs: Tensor, batch: int
) -> tuple[Tensor, Tensor]:
    """Return pooled channels (N, D) and logits (N, K) of the bare model, on its device."""
    device = device_of(model)
    means, logits = [], []
    with observed(model, sites) as seen:
        for part in inputs.split(batch):
            answer = first_tensor(model(part.to(device)))
            assert answer is not None
            logits.append(answer.float())
            means.append(torch.cat([pooled(seen[site], site) for site in sites], dim=1))
    return torch.cat(means), torch.cat(logits)


def _untrained(
    sites: tuple[Site, ...], means: Tensor, hidden: int, draw: torch.Generator
) -> GenerativeRouter:
    """Return a router whose masks leave out the channels that are weakest for them in an image."""
    sizes = [site.channels for site in sites]

    def affine(inputs: int, outputs: int) -> Affine:
        return _affine(inputs, outputs, draw, means.device)

    generator = Generator(
        embed=tuple(affine(size, hidden) for size in sizes),
        embedder=Cell(affine(hidden, 3 * hidden), affine(hidden, 3 * hidden)),
        distil=(affine(len(sites) * hidden, hidden), affine(hidden, hidden)),
        decoder=Cell(affine(2 * hidden, 3 * hidden), affine(hidden, 3 * hidden)),
        modulate=tuple(affine(hidden, 2 * size) for size in sizes),
    )
    with torch.no_grad():
        for size, modulation in zip(sizes, generator.modulate, strict=True):
            modulation.bias[:size] = 1.0
            modulation.bias[size:] = OPEN
    spread = means.std(0, correction=0)
    scale = torch.where(spread > 1e-6, spread, 1.0)
    return GenerativeRouter(PathLayout(sites, ("mask",)), means.mean(0), scale, generator)


def _affine(inputs: int, outputs: int, draw: torch.Generator, device: torch.device) -> Affine:
    """Draw a layer that keeps variances about as they are, on the CPU for one seed everywhere."""
    weight = (torch.rand(outputs, inputs, generator=draw) * 2 - 1) / math.sqrt(inputs)
    bias = torch.zeros(outputs)
    return Affine(weight.to(device).requires_grad_(), bias.to(device).requires_grad_())


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield every tensor of nested tuples and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
    else:
        for field in fields(value):  # type: ignore[arg-type]
            yield from _tensors(getattr(value, field.name))
