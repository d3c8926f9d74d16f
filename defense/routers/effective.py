"""`effective`: the neurons that fire hard enough to lie on effective paths, from the one pass.

Source: Ptolemy's forward extraction with absolute thresholds (Gan et al., MICRO 2020,
https://arxiv.org/abs/2008.09954, "FwAB"), as in the authors' code but of neurons alone: a layer's
threshold is the output that as many neurons reach as the backward extraction keeps there, averaged
over images. Outputs are compared with their sign, because the sites are activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from defense.errors import ConfigError, SiteError
from defense.routers.effective_backward import effective_neurons
from defense.routers.gating import observed
from defense.routers.recipes import Observing
from defense.types import PathLayout, Site


@dataclass(frozen=True)
class EffectiveRouter:
    """Share of every channel's positions whose output is above its site's threshold, in [0, 1].

    thresholds: one per site of the layout. source: "backward" where they come from effective paths,
    "quantile" where the network cannot be walked back and a fixed share of each output is kept.
    """

    name: ClassVar[str] = "effective"
    one_forward: ClassVar[bool] = True

    layout: PathLayout
    thresholds: tuple[float, ...]
    source: str

    @cached_property
    def _threshold(self) -> dict[tuple[str, int], float]:
        sites = ((site.module, site.call) for site in self.layout.sites)
        return dict(zip(sites, self.thresholds, strict=True))

    def reduce(self, output: Tensor, site: Site) -> Tensor:
        """(N, C, ...) or (N, ..., C) -> (N, C) float32, without a host sync."""
        above = output > self._threshold[site.module, site.call]
        if output.dim() == 2:
            return above.float()
        first = 2 if site.axis == 1 else 1
        positions = tuple(range(first, first + output.dim() - 2))
        return above.mean(positions, dtype=torch.float32)

    def finish(self, path: Tensor, logits: Tensor) -> Tensor:
        """The shares are the path."""
        return path


@dataclass(frozen=True)
class EffectiveRecipe(Observing):
    """Hyper-parameters.

    theta: the share of a neuron's input that the backward path has to give, in [0, 1]. share: of the
    outputs of a site that are kept where no backward path reaches it, in (0, 1].
    """

    examples: ClassVar[int] = 16

    theta: float = 0.5
    share: float = 0.2

    def __post_init__(self) -> None:
        for name, value in (("theta", self.theta), ("share", self.share)):
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} of an effective path is {value}; give one from 0 to 1")

    def fit(
        self,
        model: nn.Module,
        sites: tuple[Site, ...],
        inputs: Tensor,
        *,
        seed: int,
        progress: Callable[[float], None],
    ) -> EffectiveRouter:
        """Average the thresholds that each of the first `examples` inputs asks for."""
        inputs = inputs[: self.examples]
        source = "backward"
        try:
            asked = _told(self._by_path(model, sites, inputs), len(inputs), progress)
        except SiteError:
            source = "quantile"
            asked = _told(self._by_share(model, sites, inputs), len(inputs), progress)
        mean = torch.stack(asked).double().mean(dim=0)
        return EffectiveRouter(PathLayout(sites, ("share",)), tuple(mean.tolist()), source)

    def _by_path(self, model: nn.Module, sites: Sequence[Site], inputs: Tensor) -> Iterator[Tensor]:
        """Yield, image by image, what as many outputs of each site (S,) reach as its path keeps."""
        for neurons in effective_neurons(model, sites, inputs, self.theta):
            yield torch.stack(
                [
                    _reached_by(output, int(kept.sum()) or self._usual(output))
                    for output, kept in neurons.values()
                ]
            )

    def _by_share(
        self, model: nn.Module, sites: Sequence[Site], inputs: Tensor
    ) -> Iterator[Tensor]:
        """Yield, image by image, what the wanted share of each site's outputs (S,) reaches."""
        for image in inputs.split(1):
            with observed(model, sites) as seen, torch.no_grad():
                model(image)
            yield torch.stack([_reached_by(seen[s], self._usual(seen[s])) for s in sites])

    def _usual(self, output: Tensor) -> int:
        return max(1, round(self.share * output.numel()))


def _reached_by(output: Tensor, count: int) -> Tensor:
    """Return the largest value that `count` outputs reach."""
    return output.flatten().float().kthvalue(output.numel() - count + 1).values


def _told(asked: Iterator[Tensor], count: int, progress: Callable[[float], None]) -> list[Tensor]:
    """Collect thresholds of `count` images, telling how far it got."""
    found = []
    for thresholds in asked:
        found.append(thresholds)
        progress(len(found) / count)
    return found
