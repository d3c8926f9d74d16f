"""`decoupled`: the paths that a backbone with controllers takes, read off as it takes them.

Interpretable network decoupling, https://arxiv.org/abs/1906.01166. Such a backbone is trained with
controllers that open and close channels for every image; the path is all of their decisions. A
module says that it decides by a true attribute `emits_path`: its class may come with the archive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from defense.errors import SiteError, nearest
from defense.routers.recipes import Unlearnt
from defense.sites import check_settled, trace
from defense.types import PathLayout, Site

STATISTICS = ("mask",)
"""1 where a channel is open, 0 where it is closed."""


@dataclass(frozen=True)
class DecoupledRouter:
    """The masks of all controllers, one column per channel that they control."""

    name: ClassVar[str] = "decoupled"
    one_forward: ClassVar[bool] = True

    layout: PathLayout

    def reduce(self, output: Tensor, site: Site) -> Tensor:
        """Masks (N, C), or of a shape such as (N, C, 1, 1) -> (N, C), float32."""
        return output.flatten(1).float()

    def finish(self, path: Tensor, logits: Tensor) -> Tensor:
        """The masks are the path."""
        return path


@dataclass(frozen=True)
class DecoupledRecipe(Unlearnt["DecoupledRouter"]):
    """Nothing to choose: the backbone's training decided."""

    def sites(
        self, model: nn.Module, example: Tensor, names: Sequence[str] | None
    ) -> tuple[Site, ...]:
        """Observe the modules that emit a path; SiteError where there is none."""
        check_settled(model)
        calls = [c for c in trace(model, example)[0] if c.name and _emits_path(c.module)]
        emitting = {call.name for call in calls}
        if not emitting:
            raise SiteError(
                f"nothing to observe in {type(model).__name__}: no module of it emits a path; train "
                "one that does with 'pathguard train --method decoupled', or choose another router"
            )
        for name in names or ():
            if name not in emitting:
                raise SiteError(
                    f"no site '{name}' in this backbone emits a path{nearest(name, emitting)}"
                )
        chosen = emitting if names is None else set(names)
        return tuple(
            Site(call.name, call.index, call.output[0].numel(), -1)
            for call in calls
            if call.name in chosen
        )

    def router(self, sites: tuple[Site, ...]) -> DecoupledRouter:
        """Nothing is learnt."""
        return DecoupledRouter(PathLayout(sites, STATISTICS))


def _emits_path(module: nn.Module) -> bool:
    return bool(getattr(module, "emits_path", False))
