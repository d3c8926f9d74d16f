"""Run a backbone with its sites read, or multiplied by gates: what the offline routers share.

Unlike `defense.backbone`, which only ever reads, gates change what the network answers; nothing
here runs in front of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from defense.errors import SiteError, nearest
from defense.sites import first_tensor
from defense.types import Site


@contextmanager
def observed(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Collect what the sites return in each forward pass inside the block, with its graph.

    The dictionary holds the last pass: outputs as the module returned them, (N, C, ...) or
    (N, ..., C), cloned so that a later in-place operation does not change them.
    """
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, output: Tensor) -> None:
        seen[site] = output.clone()

    with _hooked(model, sites, keep):
        yield seen


@contextmanager
def gated(
    model: nn.Module, sites: Sequence[Site], gates: Sequence[Tensor | None]
) -> Iterator[None]:
    """Multiply what each site returns by its gates, in each forward pass inside the block.

    gates: one per site; (N, C) for a gate per channel, the output's own shape for a gate per
    neuron, None for a site that stays as it is. Gradients flow into gates that want them.
    """
    by_site = dict(zip(sites, gates, strict=True))

    def multiply(site: Site, output: Tensor) -> Tensor | None:
        gate = by_site[site]
        if gate is None:
            return None
        shaped = gate if gate.dim() == output.dim() else broadcast(gate, output, site)
        return output * shaped.to(output.dtype)

    with _hooked(model, sites, multiply):
        yield


def broadcast(gate: Tensor, output: Tensor, site: Site) -> Tensor:
    """Return gates (N, C) in a shape that multiplies `output` (N, C, ...) or (N, ..., C)."""
    shape = [gate.shape[0]] + [1] * (output.dim() - 1)
    shape[site.axis] = gate.shape[1]
    return gate.view(shape)


def channels_first(output: Tensor, site: Site) -> Tensor:
    """Return what a site returned as (N, C, positions); a vector has one position."""
    if output.dim() == 2:
        return output.unsqueeze(2)
    return output.movedim(site.axis, 1).flatten(2)


@contextmanager
def _hooked(
    model: nn.Module, sites: Sequence[Site], act: Callable[[Site, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call `act` with every site and its output; a tensor that it returns takes the output's place."""
    modules = dict(model.named_modules())
    by_module: dict[str, dict[int, Site]] = {}
    for site in sites:
        if site.module not in modules:
            raise SiteError(
                f"no module '{site.module}' in this backbone{nearest(site.module, modules)}"
            )
        by_module.setdefault(site.module, {})[site.call] = site
    calls: dict[str, int] = {}

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], Tensor | None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Tensor | None:
            call = calls.get(name, 0)
            calls[name] = call + 1
            site, tensor = by_module[name].get(call), first_tensor(output)
            if site is None or tensor is None:
                return None
            changed = act(site, tensor)
            if changed is not None and not isinstance(output, Tensor):
                raise SiteError(
                    f"the site '{site.name}' returns a {type(output).__name__}; only a site that "
                    "returns one tensor can be gated: name other sites"
                )
            return changed

        return hook

    handles = [model.register_forward_pre_hook(lambda _module, _args: calls.clear())]
    handles += [modules[name].register_forward_hook(hook_for(name)) for name in by_module]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
