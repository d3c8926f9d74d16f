"""What recipes share: those that observe by the general rule, and those that learn nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Generic, TypeVar

from torch import Tensor, nn

from defense.sites import discover_sites
from defense.types import Site

R = TypeVar("R")


class Observing:
    """A recipe that observes activations and blocks."""

    def sites(
        self, model: nn.Module, example: Tensor, names: Sequence[str] | None
    ) -> tuple[Site, ...]:
        """Return the sites of the rule in `defense.sites`, or those of the modules in `names`."""
        return discover_sites(model, example, names=names)


class Unlearnt(ABC, Generic[R]):
    """A recipe whose router follows from the sites alone: nothing is learnt, nothing drawn by chance."""

    examples: ClassVar[int] = 0

    @abstractmethod
    def router(self, sites: tuple[Site, ...]) -> R:
        """Return the router of these sites."""

    def fit(
        self,
        model: nn.Module,
        sites: tuple[Site, ...],
        inputs: Tensor,
        *,
        seed: int,
        progress: Callable[[float], None],
    ) -> R:
        """Return the router of these sites, whatever the inputs."""
        return self.router(sites)
