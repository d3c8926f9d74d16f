"""What a study is about: a served network with its images, and all that is kept of their runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from defense.backbone import GatedBackbone
from defense.errors import DataError
from defense.fingerprint import fingerprint
from defense.guard import InputSpec
from defense.looks import Extras
from defense.offline.attacks import Attack
from defense.offline.benchmark.arsenal import HalfPrecision
from defense.offline.benchmark.peers import Sample
from defense.offline.benchmark.store import Store, Tensors
from defense.offline.collect import Served, backbone_inputs, collect_inputs, input_spec
from defense.offline.data import ImageSet
from defense.offline.extras import make_extras
from defense.offline.fit import Labelling, fit_router, label_rows, make_recipe, serving
from defense.offline.pixels import PixelSpace, deliverable, find_pixel_space
from defense.offline.progress import Progress
from defense.routers import ForwardRouter
from defense.types import Routed

CHUNK = 250
"""Images per kept file: what a killed study loses at most."""
EXAMPLES = 8


@dataclass(frozen=True)
class Subject:
    """A served network with its images. names: N; pixels: (N, C, H, W) uint8; predicted: (N,).

    model: the backbone as a function of pixels in [0, 1]. gated: the same with its sites observed.
    store keeps runs, `images_kept` attacked images, which know nothing of witness and echo.
    """

    served: Served
    space: PixelSpace
    model: nn.Module
    gated: GatedBackbone
    router: ForwardRouter
    extras: Extras
    spec: InputSpec
    names: tuple[str, ...]
    pixels: Tensor
    predicted: Tensor
    labelling: Labelling
    fingerprint: str
    store: Store
    images_kept: Store
    seed: int
    progress: Progress

    @property
    def labels(self) -> Tensor:
        """(N,) the images' classes as the network counts them."""
        return self.labelling.labels

    @property
    def right(self) -> Tensor:
        """(N,) which images the network gets right."""
        return self.predicted == self.labels

    def attacked(self, attack: Attack, rows: Tensor, **depends: object) -> Tensor:
        """Return attacked pixels (n, C, H, W) uint8 of the images `rows` (n,).

        What was kept is known by the attack's name and by `depends`.
        """
        parts = []
        for chunk in rows.split(CHUNK):
            kept = self.images_kept.keep(
                f"attack {attack.name}",
                self._attack(attack, chunk),
                rows=chunk.tolist(),
                **depends,
            )
            parts.append(kept["pixels"])
            self.progress.advance(len(chunk))
        return torch.cat(parts)

    def _attack(self, attack: Attack, rows: Tensor) -> Callable[[], Tensors]:
        def make() -> Tensors:
            images = self.pixels[rows].float() / 255
            # Chunks draw differently: their seed is that of their first image.
            seed = self.seed * 1_000_003 + int(rows[0])
            changed = attack.run(HalfPrecision(self.model), images, self.labels[rows], seed=seed)
            return {"pixels": (changed * 255).round().to(torch.uint8)}

        return make

    def runs(self, label: str, pixels: Tensor) -> Sample:
        """Return the runs of `pixels` (n, C, H, W) uint8 with all that a guard may look at."""
        parts = []
        for chunk in pixels.split(CHUNK):
            kept = self.store.keep(f"runs of {label}", self._run(chunk), pixels=digest(chunk))
            routed = Routed(kept["logits"], kept["path"], kept.get("witness"), kept.get("echoes"))
            parts.append(routed)
            self.progress.advance(len(chunk))
        return Sample(pixels.float() / 255, Routed.concat(parts))

    def _run(self, pixels: Tensor) -> Callable[[], Tensors]:
        def make() -> Tensors:
            inputs = self.space.to_input(pixels.float() / 255)
            runs = collect_inputs(self.served.backbone, self.gated, inputs, self.extras)
            parts = {"logits": runs.logits, "path": runs.path}
            parts |= {} if runs.witness is None else {"witness": runs.witness}
            return parts | ({} if runs.echoes is None else {"echoes": runs.echoes})

        return make


@contextmanager
def open_subject(
    served: Served,
    images: ImageSet,
    folder: Path,
    *,
    witness: Path | None,
    seed: int,
    progress: Progress,
) -> Iterator[Subject]:
    """Read images through the archive's preprocessing and make everything ready to be run.

    folder: where results are kept. witness: the card of the network that is to testify.
    """
    if images.labels is None:
        raise DataError("a study needs labels and these images have none; give a folder per class")
    payloads = images.payloads(range(len(images)))
    space = find_pixel_space(served, payloads[0])
    pixels = (space.to_pixels(backbone_inputs(served, payloads)) * 255).round().to(torch.uint8)
    if not deliverable(served, space, pixels[:4].float() / 255):
        raise DataError(
            "images sent as PNGs do not reach this archive's backbone as they are, so attacks on "
            "pixels would not either; study the network with an archive that does not resize"
        )
    backbone = served.backbone
    router = serving(
        fit_router(
            backbone, make_recipe("activation"), space.to_input(pixels[:EXAMPLES].float() / 255)
        )
    )
    with GatedBackbone(backbone, router) as gated:
        store = Store(folder, f"{fingerprint(backbone)} {digest(pixels)} {seed}")
        subject = Subject(
            served=served,
            space=space,
            model=space.model(backbone),
            gated=gated,
            router=router,
            extras=Extras(),
            spec=input_spec(served, payloads[:EXAMPLES]),
            names=images.names,
            pixels=pixels,
            predicted=torch.empty(0),
            labelling=Labelling(torch.empty(0), (), {}),
            fingerprint=fingerprint(backbone),
            store=store,
            images_kept=store,
            seed=seed,
            progress=progress,
        )
        yield _known(subject, images, witness)


def _known(subject: Subject, images: ImageSet, witness: Path | None) -> Subject:
    """Add what takes the network's answers: classes, witness and echo."""
    routed = subject.runs("paths alone", subject.pixels).routed
    labelling = label_rows(images, torch.arange(len(images)), routed)
    if labelling.facts["labels"] != "folders":
        raise DataError(
            "two folders of these images mostly get the same answer, so the network does not know "
            "their classes; give one folder per class that it was trained on"
        )
    extras = make_extras(
        subject.served.backbone,
        subject.space.to_input(subject.pixels.float() / 255),
        witness_card=witness,
        space=subject.space,
        class_names=labelling.names,
    )
    store = replace(subject.store, about=f"{subject.store.about} {describe(extras, witness)}")
    return replace(
        subject, labelling=labelling, predicted=routed.predicted, extras=extras, store=store
    )


def describe(extras: Extras, witness: Path | None) -> str:
    """Name the witness by its weights and the echo by its perturbations."""
    weights = "" if witness is None else hashlib.sha256(witness.read_bytes()).hexdigest()[:16]
    return f"witness {weights} echo {extras.echo}"


def digest(pixels: Tensor) -> str:
    """Return a name for these pixels (N, C, H, W) uint8."""
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()[:32]
