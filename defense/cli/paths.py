"""`pathguard inspect --paths`: read what the paths of a guard, or of any router, say."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from defense.artifact import load_guard
from defense.errors import DataError
from defense.guard import Guard, check_backbone
from defense.offline.attacks import make_attack
from defense.offline.collect import backbone_inputs, route
from defense.offline.data import ImageSet
from defense.offline.fit import fit_router, label_rows, make_recipe
from defense.offline.pixels import find_pixel_space
from defense.offline.reading import Reading, read_paths
from defense.offline.reading_page import write_page
from defense.routers import Router
from handlers.torchserve_inner import OpenArchive, open_archive


@dataclass(frozen=True)
class PathQuestion:
    """What to draw. A guard's own router is used where `guard` is given, else one is fitted.

    eps: L-infinity bound of the attack in [0, 1].
    """

    archive: Path
    images: ImageSet
    guard: Path | None
    router: str
    attack: str
    eps: float
    seed: int


def draw_paths(question: PathQuestion, folder: Path, console: Console) -> Path:
    """Attack the images, read their paths and write the page into `folder`; return its file."""
    # A handler that is opened offline finds itself in its own folder: files are read and written here.
    guard = load_guard(question.guard) if question.guard else None
    with (
        tempfile.TemporaryDirectory() as scratch,
        open_archive(question.archive, Path(scratch)) as served,
    ):
        reading = _read(question, guard, served, console)
    return write_page(reading, folder)


def _read(
    question: PathQuestion, guard: Guard | None, served: OpenArchive, console: Console
) -> Reading:
    images, seed = question.images, question.seed
    router: Router
    with console.status("Reading images"):
        inputs = backbone_inputs(served, images.payloads(range(len(images))))
    if guard:
        check_backbone(guard, served.backbone)
        router, shown = guard.router, torch.arange(len(inputs))
    else:
        recipe = make_recipe(question.router)
        count = min(recipe.examples, len(inputs) // 2)
        shown = torch.arange(count, len(inputs))
        with console.status(f"Fitting the router '{question.router}'"):
            router = fit_router(served.backbone, recipe, inputs[: max(2, count)], seed=seed)
    inputs = inputs[shown]
    with console.status("Taking paths"):
        labelling = label_rows(images, shown, route(served.backbone, router, inputs))
    if labelling.facts["labels"] != "folders":
        raise DataError(
            "paths are read class by class and these images have no classes that the network knows; "
            "give one folder per class"
        )
    space = find_pixel_space(served, images.payload(0))
    pixels = space.to_pixels(inputs)
    with console.status(f"Attacking with {question.attack}"):
        attack = make_attack(question.attack, eps=question.eps)
        attacked = attack.run(space.model(served.backbone), pixels, labelling.labels, seed=seed)
    with console.status("Reading paths"):
        return read_paths(
            served.backbone,
            router,
            inputs,
            pixels,
            labelling.labels,
            labelling.names,
            attacked=space.to_input(attacked),
            seed=seed,
        )
