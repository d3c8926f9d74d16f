"""One row of the comparison: a router on a backbone, fitted, timed, and judged."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from defense.detectors.overlap import fit_overlap_view
from defense.offline.collect import route
from defense.offline.comparison.backbones import Backbone, Cache
from defense.offline.comparison.judges import detect, detect_with_few
from defense.offline.costs import Cost, measure_cost
from defense.offline.fit import fit_router, make_recipe
from defense.offline.reading import separability
from defense.routers import Router, serves
from defense.types import FitData, Routed

ZERO = 1e-6


@dataclass(frozen=True)
class Entry:
    """A row to measure: a router on a backbone. slow: measured on the first images alone."""

    router: str
    backbone: str = "plain"
    note: str = ""
    statistics: tuple[str, ...] | None = None
    slow: bool = False
    class_paths: int = 0
    """Judge, in place of the path, its overlaps with class paths of so many images each."""
    few: bool = False
    """Judge it by the CDRP paper's protocol as well: fitted to a few images per class."""


ENTRIES = (
    Entry("activation", note="mean: the control", few=True),
    Entry("activation", note="mean, max, deviation", statistics=("mean", "max", "deviation")),
    Entry("effective", note="FwAB"),
    Entry("effective", note="FwAB; overlaps with class paths", class_paths=50),
    Entry("effective_backward", note="backward, cumulative", slow=True),
    Entry(
        "effective_backward", note="backward; overlaps with class paths", slow=True, class_paths=20
    ),
    Entry("contribution", note="NeuronMCT"),
    Entry("distillation", note="30 steps", slow=True, few=True),
    Entry("generative"),
    Entry("class_gates", note="gates learnt on the frozen network"),
    Entry("class_gates", "class_gates", note="gates trained with the network"),
    Entry("decoupled", "decoupled", few=True),
)


@dataclass
class Row:
    """What was measured of one entry. auroc: by attack and classifier, one figure per seed."""

    router: str
    backbone: str
    note: str
    one_forward: bool
    images: int
    columns: int = 0
    sparsity: float = 0.0
    separability: dict[str, float] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)
    auroc: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    few: dict[str, dict[str, list[float]]] = field(default_factory=dict)


def measure_entry(entry: Entry, backbone: Backbone, *, slow_count: int, cache: Cache) -> Row:
    """Fit the entry's router, take the paths of all images, and judge them."""
    recipe = make_recipe(entry.router, entry.statistics)
    seen = backbone.fit[: max(2, recipe.examples)]
    router = fit_router(backbone.network, recipe, seen)
    count = min(slow_count, len(backbone.pixels)) if entry.slow else len(backbone.pixels)
    name = f"{backbone.digest} {recipe!r} {count}"
    runs = take_paths(router, backbone, count, name, cache)
    clean = runs["clean"]
    row = Row(entry.router, entry.backbone, entry.note, serves(router), count)
    if entry.class_paths:
        judged = overlaps(router, backbone, entry.class_paths, runs, name, cache)
        row.columns = judged["clean"].path.shape[1]
        row.auroc = detect(judged)
        return row
    row.columns = clean.path.shape[1]
    row.sparsity = float((clean.path.abs() <= ZERO).float().mean())
    layers = separability(clean.path, backbone.labels[:count], router.layout)
    names = [site.name for site in router.layout.sites]
    row.separability = dict(zip(names, layers, strict=True))
    row.costs = measure_cost(backbone.network, router, backbone.inputs)
    row.auroc = detect(runs)
    if entry.few:
        row.few = detect_with_few(runs, backbone.labels[:count])
    return row


def overlaps(
    router: Router,
    backbone: Backbone,
    images_per_class: int,
    runs: dict[str, Routed],
    name: str,
    cache: Cache,
) -> dict[str, Routed]:
    """Return the runs with overlaps in place of paths; class paths come from the fit images."""
    chosen = of_each_class(backbone.fit_labels, images_per_class)

    def make() -> dict[str, Tensor]:
        run = route(backbone.network, router, backbone.fit[chosen])
        return {"logits": run.logits, "path": run.path}

    kept = cache.tensors(f"profile {name} {images_per_class}", make)
    data = FitData(Routed(kept["logits"], kept["path"]), backbone.fit_labels[chosen])
    view = fit_overlap_view(data, router.layout, images_per_class=images_per_class)
    return {label: Routed(run.logits, view.features(run)) for label, run in runs.items()}


def of_each_class(labels: Tensor, count: int) -> Tensor:
    """Return the rows of the first `count` images of every class."""
    return torch.cat([(labels == label).nonzero().flatten()[:count] for label in labels.unique()])


def take_paths(
    router: Router, backbone: Backbone, count: int, name: str, cache: Cache
) -> dict[str, Routed]:
    """Return the runs of the first `count` clean images and of their attacked versions."""
    sets = {"clean": backbone.pixels} | backbone.attacked
    found = {}
    for label, pixels in sets.items():

        def make(pixels: Tensor = pixels) -> dict[str, Tensor]:
            run = route(backbone.network, router, backbone.on_pixels.inputs(pixels[:count]))
            return {"logits": run.logits, "path": run.path}

        kept = cache.tensors(f"paths {name} {label}", make)
        found[label] = Routed(kept["logits"], kept["path"])
    return found


def softmax_row(backbone: Backbone) -> Row:
    """Return the control that looks at no layer: the sorted softmax."""
    sets = {"clean": backbone.pixels} | backbone.attacked
    logits = {label: backbone.on_pixels.answers(pixels) for label, pixels in sets.items()}
    runs = {
        label: Routed(z, z.softmax(1).sort(dim=1, descending=True).values)
        for label, z in logits.items()
    }
    found = detect(runs)
    count, columns = runs["clean"].path.shape
    return Row("sorted softmax", backbone.name, "control", True, count, columns, auroc=found)
