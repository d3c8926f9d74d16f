"""Run a served model over images, through its own preprocessing, and keep what its runs leave."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Protocol, TypeVar, cast

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
from defense.types import ONE_VIEW, Routed, Views

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
    views: Views = ONE_VIEW,
) -> Routed:
    """Return the runs of all payloads, with all `extras`, on the CPU: one row per payload.

    DataError names the first payload that cannot be read.
    """
    parts: list[Routed] = []
    for recording, count in _answered(served, payloads, gated.record):
        try:
            routed = gated.routed(recording, views)
        except GuardFailure as error:
            raise ArchiveError(f"this archive cannot be guarded: {error}") from error
        if len(routed) != count:
            raise ArchiveError(
                f"the handler runs its backbone on {len(routed) * views.number} rows for {count} "
                "requests; only a fixed number of rows per request can be guarded"
            )
        inputs = inputs_of(recording, count, views)
        parts.append(_own(_shown(extras, routed, served.backbone, inputs)))
        progress.advance(count)
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
    """Return what the archive's preprocessing makes of payloads: (N, ...) on the CPU.

    Of several views per payload there are as many rows, in the order in which they were run.
    """
    seen = [
        tensor
        for tensors, _ in _answered(served, payloads, partial(_watched, served.backbone))
        for tensor in tensors
    ]
    if not seen:
        raise ArchiveError("the archive's handler never calls its model; it cannot be guarded")
    if len({tensor.shape[1:] for tensor in seen}) > 1:
        raise ArchiveError(
            "the handler gives its model inputs of several sizes; only inputs of one size can be "
            "fitted to: give images of one size, or resize them in the handler"
        )
    return torch.cat(seen)


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a model is called with, on the CPU."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[object, ...]) -> None:
        tensor = first_tensor(args[0]) if args else None
        if tensor is not None:
            seen.append(tensor.detach().cpu().clone())

    handle = model.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def input_spec(served: Served, payloads: Sequence[bytes]) -> InputSpec:
    """Return the shape that rows of the backbone's input have, and which of them are a request's.

    Dimensions that vary become -1. payloads: of different images; all views of one must be of one
    size, and as many as of any other. ArchiveError where they are not.
    """
    rows = [backbone_inputs(served, [payload]) for payload in payloads]
    shapes = [tuple(row.shape[1:]) for row in rows]
    if len({len(shape) for shape in shapes}) != 1:
        raise ArchiveError(
            "the handler gives its model inputs of different rank; it cannot be guarded"
        )
    sizes = [set(column) for column in zip(*shapes, strict=True)]
    shape = tuple(size.pop() if len(size) == 1 else -1 for size in sizes)
    return InputSpec(
        shape, str(rows[0].dtype).removeprefix("torch."), _views(served, payloads, rows)
    )


def _views(served: Served, payloads: Sequence[bytes], rows: Sequence[Tensor]) -> Views:
    """Find out whose the rows of a batch are: compare it with the payloads' `rows`, each alone."""
    number = len(rows[0])
    if any(len(own) != number for own in rows):
        counts = ", ".join(map(str, sorted({len(own) for own in rows})))
        raise ArchiveError(
            f"the handler gives its model a number of rows that depends on the image ({counts}); "
            "only a fixed number of rows per request can be guarded"
        )
    if len({own.shape for own in rows}) > 1:  # these are not run together
        return Views(number)
    together, alone = backbone_inputs(served, payloads), torch.stack(list(rows))
    if len(together) == len(payloads) * number:
        for views in (Views(number), Views(number, grouped=False)):
            if torch.allclose(views.arranged(together).reshape(alone.shape), alone, atol=1e-4):
                return views
        if number == 1 and not _reordered(together, alone):
            return ONE_VIEW  # chance is at work in the preprocessing, each time on the same places
    raise ArchiveError(
        f"the handler gives its model {number} rows per request, in a batch not the same ones or "
        "mixed with those of others, so nobody can tell whose they are; make its views the same each "
        "time, and keep those of a request together or those of a view"
    )


def _reordered(together: Tensor, alone: Tensor) -> bool:
    """Say whether rows (N, ...) of a batch are those that were run alone, in another order."""
    apart = torch.cdist(together.double().flatten(1), alone.double().flatten(1))
    return bool((apart.min(dim=1).values < 1e-3).all())


Seen = TypeVar("Seen")


def _answered(
    served: Served, payloads: Iterable[bytes], watch: Callable[[], AbstractContextManager[Seen]]
) -> Iterator[tuple[Seen, int]]:
    """Answer payloads in batches; yield what `watch` saw of each, and how many requests it had.

    A batch that fails is answered one by one, as it would be served.
    """
    for batch in _batches(payloads):
        try:
            with watch() as seen:
                served.answer(batch)
        except Exception as error:
            if len(batch) == 1:
                raise DataError(
                    f"the archive's handler cannot read one of the images ({type(error).__name__}: "
                    f"{error}); remove it from the data"
                ) from error
            for payload in batch:
                yield from _answered(served, [payload], watch)
        else:
            yield seen, len(batch)


def _shown(extras: Extras, routed: Routed, model: nn.Module, inputs: Tensor | None) -> Routed:
    if inputs is None:
        if extras.look != "path":
            raise ArchiveError(
                "the handler does not give its backbone the inputs of every request by position; "
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
    for payloads in _synthetic_images():
        try:
            inputs = backbone_inputs(served, payloads)
        except DataError:  # this handler reads other images
            continue
        views = input_spec(served, payloads).views.number
        sites = discover_sites(served.backbone, inputs[:2])
        found = f"{name}, {len(sites)} sites, {sum(site.channels for site in sites)} channels"
        return found if views == 1 else f"{found}, {views} views per request"
    return f"{name} (its handler read none of the test images; 'pathguard fit' will tell)"


def _synthetic_images() -> Iterator[list[bytes]]:
    """Yield pairs of images, so that one can be told from the other."""
    for mode, side in (("RGB", 256), ("L", 28), ("RGB", 32), ("L", 32)):
        yield [_noise(mode, side), _noise(mode, side)]


def _noise(mode: str, side: int) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 64).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()
