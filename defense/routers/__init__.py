"""Routers turn runs of the backbone into paths. One file per system, one row in the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeGuard

from torch import Tensor, nn

from defense.errors import ConfigError, nearest
from defense.routers.activation import ActivationRecipe, ActivationRouter
from defense.routers.class_gates import ClassGatesRecipe, ClassGatesRouter
from defense.routers.contribution import ContributionRecipe, ContributionRouter
from defense.routers.decoupled import DecoupledRecipe, DecoupledRouter
from defense.routers.distillation import DistillationRecipe, DistillationRouter
from defense.routers.effective import EffectiveRecipe, EffectiveRouter
from defense.routers.effective_backward import (
    EffectiveBackwardRecipe,
    EffectiveBackwardRouter,
)
from defense.routers.generative import GenerativeRecipe, GenerativeRouter
from defense.types import PathLayout, Routed, Site


class Router(Protocol):
    """A fitted router: a frozen dataclass whose fields are all that it learnt (`defense.state`)."""

    name: ClassVar[str]
    one_forward: ClassVar[bool]
    """Whether the path comes out of the forward pass that answers the request."""

    @property
    def layout(self) -> PathLayout: ...


class ForwardRouter(Router, Protocol):
    """A router that can serve: it reads the sites of the pass that answers the request."""

    def reduce(self, output: Tensor, site: Site) -> Tensor:
        """Reduce what `site` returned, on its device, to (N, its share of columns) in float32."""
        ...

    def finish(self, path: Tensor, logits: Tensor) -> Tensor:
        """Turn all that `reduce` gave, side by side (N, ...), and logits (N, K) into paths (N, D)."""
        ...


class OfflineRouter(Router, Protocol):
    """A router that needs more than the one pass: for studies, never in front of a request."""

    def route(self, model: nn.Module, inputs: Tensor) -> Routed:
        """Return logits and paths of backbone inputs (N, ...), each row by itself.

        Leaves the model as it was: no hook, no gradient, no changed weight.
        """
        ...


class RouterRecipe(Protocol):
    """A router's hyper-parameters; `fit` returns the fitted value."""

    examples: ClassVar[int]
    """The most inputs that `fit` makes use of; 0 where it learns nothing but the sites."""

    def sites(
        self, model: nn.Module, example: Tensor, names: Sequence[str] | None
    ) -> tuple[Site, ...]:
        """Return what to observe, by rule or by module name; SiteError where there is nothing."""
        ...

    def fit(
        self,
        model: nn.Module,
        sites: tuple[Site, ...],
        inputs: Tensor,
        *,
        seed: int,
        progress: Callable[[float], None],
    ) -> Router:
        """Fit to clean backbone inputs (N, ...) of a model in eval mode, on the model's device.

        Classes are the network's own answers. progress: is told the share that is done. The same
        inputs and seed give the same router.
        """
        ...


@dataclass(frozen=True)
class RouterKind:
    """How to fit a router and how to load one."""

    recipe: type[RouterRecipe]
    fitted: type[Router]


ROUTERS: dict[str, RouterKind] = {
    "activation": RouterKind(ActivationRecipe, ActivationRouter),
    "class_gates": RouterKind(ClassGatesRecipe, ClassGatesRouter),
    "decoupled": RouterKind(DecoupledRecipe, DecoupledRouter),
    "generative": RouterKind(GenerativeRecipe, GenerativeRouter),
    "distillation": RouterKind(DistillationRecipe, DistillationRouter),
    "contribution": RouterKind(ContributionRecipe, ContributionRouter),
    "effective": RouterKind(EffectiveRecipe, EffectiveRouter),
    "effective_backward": RouterKind(EffectiveBackwardRecipe, EffectiveBackwardRouter),
}


def router_named(name: str) -> RouterKind:
    """Return the table's row `name`; ConfigError names the nearest one otherwise."""
    if name not in ROUTERS:
        raise ConfigError(f"no router '{name}'{nearest(name, ROUTERS)}")
    return ROUTERS[name]


def serves(router: Router) -> TypeGuard[ForwardRouter]:
    """Say whether `router` can take paths inside the pass that answers."""
    return router.one_forward


def check_serves(name: str) -> None:
    """Raise ConfigError where the router called `name` cannot serve."""
    if not router_named(name).fitted.one_forward:
        able = ", ".join(row for row, kind in ROUTERS.items() if kind.fitted.one_forward)
        raise ConfigError(
            f"the router '{name}' needs more than one forward pass and cannot serve; it is for "
            f"offline studies ('pathguard compare'): choose one of {able}"
        )
