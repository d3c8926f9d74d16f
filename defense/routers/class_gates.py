"""`class_gates`: the last feature map's channels, through the gates of the class that is answered.

CSGCNN (https://arxiv.org/abs/2007.08194) trains a gate per filter and class; detecting attacks by
the filters that a class owns is a reconstruction. A network without gates of its own gets some,
learnt with its weights frozen by the same loss and projection, which is a proposal of ours.

Shapes: N requests, K channels, C classes; gates are (K, C) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from defense.errors import ConfigError, SiteError
from defense.routers.gating import channels_first, gated, observed
from defense.sites import device_of, discover_sites, first_tensor
from defense.types import PathLayout, Site

DENSITY = 0.2
"""The share of open gates below which the density costs nothing."""
BATCH = 32


@dataclass(frozen=True)
class ClassGatesRouter:
    """Channel means of one site, each times the gate of its channel for the predicted class."""

    name: ClassVar[str] = "class_gates"
    one_forward: ClassVar[bool] = True

    layout: PathLayout
    gates: Tensor

    def __post_init__(self) -> None:
        channels = tuple(site.channels for site in self.layout.sites)
        if self.gates.dim() != 2 or channels != (len(self.gates),):
            raise ConfigError(
                f"gates of shape {tuple(self.gates.shape)} do not fit sites of {channels} channels; "
                "class gates need one site and a row for each of its channels"
            )

    def reduce(self, output: Tensor, site: Site) -> Tensor:
        """(N, K, ...) or (N, ..., K) -> (N, K) means over positions, float32."""
        return channels_first(output, site).mean(2, dtype=torch.float32)

    def finish(self, path: Tensor, logits: Tensor) -> Tensor:
        """(N, K) means and (N, C) logits -> (N, K) gated means."""
        if logits.shape[1] != self.gates.shape[1]:
            raise ConfigError(
                f"this router has gates for {self.gates.shape[1]} classes and the backbone answers "
                f"{logits.shape[1]}; fit a router to this backbone"
            )
        return path * self.gates.T[logits.argmax(1)]


@dataclass(frozen=True)
class ClassGatesRecipe:
    """Hyper-parameters of gates that are learnt; weight and density are the authors'."""

    examples: ClassVar[int] = 2000

    steps: int = 60
    """Batches, by an Adam of this rate; ours, so that a gate can close within a third of them."""
    rate: float = 0.05
    density_weight: float = 1e-3
    density: float = DENSITY

    def sites(
        self, model: nn.Module, example: Tensor, names: Sequence[str] | None
    ) -> tuple[Site, ...]:
        """Observe the last feature map or tokens; the last vector where there is neither."""
        return (last_map(model, example, names=names),)

    def fit(
        self,
        model: nn.Module,
        sites: tuple[Site, ...],
        inputs: Tensor,
        *,
        seed: int,
        progress: Callable[[float], None],
    ) -> ClassGatesRouter:
        """Take the model's `class_gates` where it has some for the site, else learn gates (K, C).

        Raises SiteError where the model does not answer with logits (N, C).
        """
        (site,) = sites
        with torch.inference_mode(False), torch.no_grad():
            answers = torch.cat([answer(model, part) for part in inputs.split(BATCH)])
            gates = trained_gates(model, (site.channels, answers.shape[1]))
            if gates is None:
                gates = self._learn(model, site, inputs, answers, seed, progress)
        progress(1.0)
        return ClassGatesRouter(PathLayout(sites, ("gated_mean",)), project(gates))

    def _learn(
        self,
        model: nn.Module,
        site: Site,
        inputs: Tensor,
        answers: Tensor,
        seed: int,
        progress: Callable[[float], None],
    ) -> Tensor:
        """Return gates that keep the network's own answers with few of them open.

        The gates of a class that no input is answered with stay open: nothing is known of them.
        """
        device, predicted = device_of(model), answers.argmax(1)
        classes = predicted.unique()
        rank = torch.full((answers.shape[1],), -1, device=device)
        rank[classes] = torch.arange(len(classes), device=device)
        gates = torch.full((site.channels, len(classes)), 0.5, device=device).requires_grad_()
        optimizer = torch.optim.Adam([gates], self.rate)
        draw = torch.Generator().manual_seed(seed)
        for step in range(self.steps):
            chosen = torch.randperm(len(inputs), generator=draw)[:BATCH].to(device)
            labels = predicted[chosen]
            with torch.enable_grad(), gated(model, (site,), (gates.T[rank[labels]],)):
                logits = answer(model, inputs[chosen.to(inputs.device)])
                loss = functional.cross_entropy(logits, labels)
                loss = loss + self.density_weight * excess(gates, self.density)
            (gates.grad,) = torch.autograd.grad(loss, (gates,))
            optimizer.step()
            gates.copy_(project(gates))
            progress((step + 1) / self.steps)
        every = torch.ones(site.channels, answers.shape[1], device=device)
        every[:, classes] = gates.detach()
        return every


def project(gates: Tensor) -> Tensor:
    """Return gates (K, C) in [0, 1] of which every row's largest is 1.

    Rows are divided by their maximum; one that has nothing above 0 keeps its largest alone.
    """
    top = gates.amax(1, keepdim=True)
    scaled = torch.where(top > 0, gates / top, (gates == top).to(gates.dtype))
    return scaled.clamp(0, 1)


def excess(gates: Tensor, density: float = DENSITY) -> Tensor:
    """Return by how much the sum of gates (K, C) exceeds `density` of all of them, at least 0."""
    return (gates.abs().sum() - density * gates.numel()).relu()


def last_map(model: nn.Module, example: Tensor, *, names: Sequence[str] | None = None) -> Site:
    """Return the last site whose output has positions, or the last site where none has any."""
    sites = discover_sites(model, example, names=names)
    with torch.no_grad(), observed(model, sites) as outputs:
        model(example)
    maps = [site for site in sites if outputs[site].dim() > 2]
    return (maps or sites)[-1]


def trained_gates(model: nn.Module, shape: tuple[int, int]) -> Tensor | None:
    """Return the `class_gates` that `model` or a part of it brings in this shape (K, C)."""
    weights: dict[str, Tensor] = model.state_dict()
    for name, value in weights.items():
        if name.rpartition(".")[2] == "class_gates" and value.shape == shape:
            return value.detach().float().clone()
    return None


def answer(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the logits (N, C) of inputs (N, ...), without a gradient for any weight.

    Raises SiteError where the model answers with something else.
    """
    frozen = {name: value.detach() for name, value in model.named_parameters()}
    logits = first_tensor(functional_call(model, frozen, (inputs.to(device_of(model)),)))
    if logits is None or logits.dim() != 2:
        raise SiteError(
            f"{type(model).__name__} does not answer with logits (N, C), which class gates need; "
            "choose another router"
        )
    return logits.float()
