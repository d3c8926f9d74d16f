"""Routers turn a run of the backbone into a path. One file per system, one row in the table."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from defense.errors import ConfigError, nearest
from defense.routers.activation import ActivationRouter
from defense.types import PathLayout, Site


class Router(Protocol):
    """The contract of a router.

    A router is a frozen dataclass: what it was fitted to are its fields (see `defense.state`).
    """

    name: ClassVar[str]
    one_forward: ClassVar[bool]
    """Whether the path comes out of the forward pass that answers the request."""

    @property
    def layout(self) -> PathLayout: ...

    def reduce(self, output: Tensor, site: Site) -> Tensor:
        """Reduce what `site` returned, on its device, to (N, columns of the site) in float32."""
        ...


ROUTERS: dict[str, type[Router]] = {ActivationRouter.name: ActivationRouter}


def router_named(name: str) -> type[Router]:
    """Return the router class called `name`; ConfigError names the nearest one otherwise."""
    if name not in ROUTERS:
        raise ConfigError(f"no router '{name}'{nearest(name, ROUTERS)}")
    return ROUTERS[name]
