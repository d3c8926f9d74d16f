"""Run a served model over images, through its own preprocessing, and keep what its runs leave."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, cast

import torch
from PIL import Image
from torch import Tensor, nn

from defense.backbone import GatedBackbone
from defense.errors import ArchiveError, DataError, GuardFailure
from defense.guard import InputSpec, inputs_of
from defense.looks import Extras
from defense.offline.progress import Progress
from defense.routers import OfflineRouter, Router, serves
from defense.sites import device_of, discover_sites, first_tensor
from defense.types import Routed

BATCH = 32


class Served(Protocol):
    """A model with the preprocessing that it is served with."""

    @property
    def backbone(self) -> nn.Module: ...

    def answer(self, payloads: Sequence[bytes]) -> list[object]:
        """Answer request bodies in one batch."""
        ...


PATH_ALONE = Extras()
"""Nothing to look at beside the path."""


def collect(
    served: Served,
    gated: GatedBackbone,
    payloads: Iterable[bytes],
    progress: Progress,
    extras: Extras = PATH_ALONE,
) -> Routed:
    """Return the runs of all payloads, with all `extras`, on the CPU.

    DataError names the first payload that cannot be read.
    """
    parts: list[Routed] = []
    for batch in _batches(payloads):
        with gated.record() as recording:
            _answer(served, batch)
        try:
            routed = gated.routed(recording)
        except GuardFailure as error:
            raise ArchiveError(f"this archive cannot be guarded: {error}") from error
        if len(routed) != len(batch):
            raise ArchiveError(
                f"the handler runs its backbone on {len(routed)} rows for {len(batch)} requests; "
                "only one row per request can be guarded"
            )
        inputs = inputs_of(recording, len(batch))
        parts.append(_own(_shown(extras, routed, served.backbone, inputs)))
        progress.advance(len(batch))
    return Routed.concat(parts)


def collect_inputs(
    model: nn.Module, gated: GatedBackbone, inputs: Tensor, extras: Extras = PATH_ALONE
) -> Routed:
    """Return the runs of backbone inputs (N, ...), with all `extras`, on the CPU."""
    device = device_of(model)
    with torch.inference_mode():
        batches = (part.to(device) for part in inputs.split(BATCH))
        return Routed.concat([_own(_shown(extras, gated.run(x), model, x)) for x in batches])


def route(model: nn.Module, router: Router, inputs: Tensor) -> Routed:
    """Return the runs of backbone inputs (N, ...) under any router, on the CPU."""
    if serves(router):
        with GatedBackbone(model, router) as gated:
            return collect_inputs(model, gated, inputs)
    device = device_of(model)
    offline = as_offline(router)
    return Routed.concat([_own(offline.route(model, x.to(device))) for x in inputs.split(BATCH)])


def as_offline(router: Router) -> OfflineRouter:
    """Return `router`, which cannot serve, as what it then is."""
    assert not serves(router)
    return cast(OfflineRouter, router)


def backbone_inputs(served: Served, payloads: Sequence[bytes]) -> Tensor:
    """Return what the archive's preprocessing makes of payloads: (N, ...) on the CPU."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[object, ...]) -> None:
        tensor = first_tensor(args[0]) if args else None
        if tensor is not None:
            seen.append(tensor.detach().cpu().clone())

    handle = served.backbone.register_forward_pre_hook(keep)
    try:
        for batch in _batches(payloads):
            _answer(served, batch)
    finally:
        handle.remove()
    if not seen:
        raise ArchiveError("the archive's handler never calls its model; it cannot be guarded")
    return torch.cat(seen)


def input_spec(served: Served, payloads: Sequence[bytes]) -> InputSpec:
    """Return the shape that rows of the backbone's input have; dimensions that vary become -1."""
    rows = [backbone_inputs(served, [payload]) for payload in payloads]
    shapes = [tuple(row.shape[1:]) for row in rows]
    if len({len(shape) for shape in shapes}) != 1:
        raise ArchiveError(
            "the handler gives its model inputs of different rank; it cannot be guarded"
        )
    sizes = [set(column) for column in zip(*shapes, strict=True)]
    shape = tuple(size.pop() if len(size) == 1 else -1 for size in sizes)
    return InputSpec(shape, str(rows[0].dtype).removeprefix("torch."))


def _answer(served: Served, batch: Sequence[bytes]) -> None:
    try:
        served.answer(batch)
    except Exception as error:
        if len(batch) == 1:
            raise DataError(
                f"the archive's handler cannot read one of the images ({type(error).__name__}: "
                f"{error}); remove it from the data"
            ) from error
        for payload in batch:
            _answer(served, [payload])
        raise ArchiveError(
            f"the archive's handler answers these images one by one but not together "
            f"({type(error).__name__}: {error}); give images of one size and mode"
        ) from error


def _shown(extras: Extras, routed: Routed, model: nn.Module, inputs: Tensor | None) -> Routed:
    if inputs is None:
        if extras.look != "path":
            raise ArchiveError(
                "the handler does not give its backbone one input row per request by position; "
                "fit a guard without a witness and without a second look"
            )
        return routed
    try:
        with torch.inference_mode():
            return extras.show(extras.look, routed, model, inputs)
    except GuardFailure as error:
        raise ArchiveError(
            f"this backbone's inputs do not suit the guard's witness or second look: {error}; "
            "both read images (N, C, H, W)"
        ) from error


def _own(routed: Routed) -> Routed:
    """Take a run out of inference mode, so that it can be fitted to."""
    with torch.inference_mode(False):
        run = routed.cpu()
        echoes = None if run.echoes is None else run.echoes.float().clone()
        witness = None if run.witness is None else run.witness.clone()
        return Routed(run.logits.float().clone(), run.path.clone(), witness, echoes)


def _batches(payloads: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for payload in payloads:
        batch.append(payload)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def describe_backbone(served: Served) -> str:
    """Say what would be observed, from a synthetic image; ArchiveError where nothing can be.

    Tries colour and grey images of common sizes; a handler that reads none of them is only described.
    """
    name = type(served.backbone).__name__
    for payload in _synthetic_images():
        try:
            inputs = backbone_inputs(served, [payload, payload])
        except Exception:  # noqa: S112 - any error means: this handler reads other images
            continue
        sites = discover_sites(served.backbone, inputs)
        return f"{name}, {len(sites)} sites, {sum(site.channels for site in sites)} channels"
    return f"{name} (its handler read none of the test images; 'pathguard fit' will tell)"


def _synthetic_images() -> Iterator[bytes]:
    for mode, side in (("RGB", 256), ("L", 28), ("RGB", 32), ("L", 32)):
        buffer = io.BytesIO()
        Image.effect_noise((side, side), 64).convert(mode).save(buffer, "PNG")
        yield buffer.getvalue()
