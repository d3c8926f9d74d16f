"""Every routing system on the same images: what a path costs, what it tells, what it detects.

The protocol of `pathguard compare`. Attacked images are kept where the network got the clean image
right and the attack turned its answer; clean and attacked rows come from the same images, and no
image lies on both sides of a detector's split. Everything measured is kept in a folder, so that a
run that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from defense.errors import ConfigError
from defense.offline.attacks import Attack, make_attack
from defense.offline.cards import load_network
from defense.offline.collect import route
from defense.offline.costs import Cost, measure_cost
from defense.offline.fit import fit_router, make_recipe, versions
from defense.offline.networks import Normalisation
from defense.offline.progress import Progress
from defense.offline.reading import separability
from defense.offline.training import LabelledImages, read_split, write_tensors
from defense.offline.units import UnitReport, measure_units
from defense.routers import Router, serves
from defense.types import Routed

SEEDS = (0, 1, 2)
TREES = 100
ZERO = 1e-6
FEW_PER_CLASS = (1, 5, 10)
"""Images per class that the published detectors were fitted to (Wang et al., CVPR 2018)."""


@dataclass(frozen=True)
class Assault:
    """An attack under the name that the table gives it."""

    label: str
    attack: Attack


def assaults() -> tuple[Assault, ...]:
    """Return the attacks of the comparison."""
    return (
        Assault("FGSM 8/255", make_attack("fgsm", eps=8 / 255)),
        Assault("PGD 8/255", make_attack("pgd", eps=8 / 255)),
        Assault("PGD 2/255", make_attack("pgd", eps=2 / 255)),
        Assault("CW", make_attack("cw", eps=8 / 255)),
        Assault("CDRP", make_attack("cdrp", eps=8 / 255)),
    )


class OnPixels(nn.Module):
    """A network that takes pixels in [0, 1], as attacks need it."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, normalise: Normalisation) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(normalise.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(normalise.std).view(1, -1, 1, 1))
        self.eval()

    def inputs(self, pixels: Tensor) -> Tensor:
        """Return what the network itself takes."""
        return (pixels - self.mean) / self.std

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (N, K) of pixels (N, C, H, W)."""
        return self.network(self.inputs(pixels))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Backbone:
    """A trained network of the comparison, and the images that it is judged with.

    pixels: (N, C, H, W) in [0, 1], all answered rightly; labels: (N,). attacked: by label, the
    same images attacked. fit: (M, C, H, W) other images, for routers that learn.
    """

    name: str
    digest: str
    network: nn.Module
    on_pixels: OnPixels
    pixels: Tensor
    labels: Tensor
    attacked: dict[str, Tensor]
    fit: Tensor


@dataclass(frozen=True)
class Cache:
    """What earlier runs have measured, by a name that says all that decides it."""

    folder: Path

    def tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors kept as `name`, or make and keep them."""
        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"
        if not path.exists():
            kept = {key: value.contiguous() for key, value in make().items()}
            write_tensors(path, kept, {"name": name})
        return load_file(path)


@dataclass(frozen=True)
class Entry:
    """A row to measure: a router on a backbone. slow: measured on the first images alone."""

    router: str
    backbone: str = "plain"
    note: str = ""
    statistics: tuple[str, ...] | None = None
    slow: bool = False


ENTRIES = (
    Entry("activation", note="mean: the control"),
    Entry("activation", note="mean, max, deviation", statistics=("mean", "max", "deviation")),
    Entry("effective", note="FwAB"),
    Entry("effective_backward", note="backward, cumulative", slow=True),
    Entry("contribution", note="NeuronMCT"),
    Entry("distillation", note="30 steps", slow=True),
    Entry("generative"),
    Entry("class_gates", note="gates learnt on the frozen network"),
    Entry("class_gates", "class_gates", note="gates trained with the network"),
    Entry("decoupled", "decoupled"),
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


def open_backbone(
    name: str,
    card: Path,
    train: LabelledImages,
    test: LabelledImages,
    *,
    count: int,
    cache: Cache,
    progress: Progress,
) -> Backbone:
    """Load a network, pick `count` test images that it gets right, and attack them."""
    network, normalise = load_network(card)
    network.requires_grad_(False)
    on_pixels = OnPixels(network, normalise)
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    pixels, labels = test.pixels[order].float() / 255, test.labels[order]
    with torch.inference_mode():
        answers = torch.cat([on_pixels(x).argmax(1) for x in pixels.split(256)])
    chosen = (answers == labels).nonzero().flatten()[:count]
    pixels, labels = pixels[chosen], labels[chosen]
    digest = json.loads(card.read_text())["sha256"]
    attacked = {}
    for assault in assaults():
        key = f"{digest} {count} {assault.label} seed 0"
        attacked[assault.label] = cache.tensors(
            key,
            lambda a=assault: {"x": a.attack.run(on_pixels, pixels, labels, seed=0)},  # type: ignore[misc]
        )["x"]
        progress.advance()
    few = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[:5000]
    fit = on_pixels.inputs(train.pixels[few].float() / 255)
    return Backbone(name, digest, network, on_pixels, pixels, labels, attacked, fit)


def measure_entry(entry: Entry, backbone: Backbone, *, slow_count: int, cache: Cache) -> Row:
    """Fit the entry's router, take the paths of all images, and judge them."""
    recipe = make_recipe(entry.router, entry.statistics)
    seen = backbone.fit[: max(2, recipe.examples)]
    router = fit_router(backbone.network, recipe, seen)
    count = min(slow_count, len(backbone.pixels)) if entry.slow else len(backbone.pixels)
    runs = take_paths(router, backbone, count, f"{backbone.digest} {recipe!r} {count}", cache)
    clean = runs["clean"]
    layers = separability(clean.path, backbone.labels[:count], router.layout)
    names = [site.name for site in router.layout.sites]
    return Row(
        router=entry.router,
        backbone=entry.backbone,
        note=entry.note,
        one_forward=serves(router),
        images=count,
        columns=clean.path.shape[1],
        sparsity=float((clean.path.abs() <= ZERO).float().mean()),
        separability=dict(zip(names, layers, strict=True)),
        costs=measure_cost(backbone.network, router, backbone.on_pixels.inputs(backbone.pixels)),
        auroc=detect(runs, lambda run: run.path),
        few=detect_with_few(runs, backbone.labels[:count]) if published_code(entry) else {},
    )


def published_code(entry: Entry) -> bool:
    """Say whether the entry is one of those whose papers fit to 1, 5 and 10 images per class."""
    return entry.router in ("distillation", "decoupled") or entry.note.startswith("mean:")


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
    with torch.inference_mode():
        logits = {
            label: torch.cat([backbone.on_pixels(x) for x in pixels.split(256)])
            for label, pixels in sets.items()
        }
    runs = {
        label: Routed(z, z.softmax(1).sort(dim=1, descending=True).values)
        for label, z in logits.items()
    }
    found = detect(runs, lambda run: run.path)
    count, columns = runs["clean"].path.shape
    return Row("sorted softmax", backbone.name, "control", True, count, columns, auroc=found)


def detect(
    runs: dict[str, Routed], features: Callable[[Routed], Tensor]
) -> dict[str, dict[str, list[float]]]:
    """Return the AUROC of a logistic regression and a forest for every attack, one per seed.

    Fitted to one half of the images (clean ones and their successful attacks), judged on the other.
    """
    clean = runs["clean"]
    found: dict[str, dict[str, list[float]]] = {}
    for label, attacked in runs.items():
        if label == "clean":
            continue
        won = attacked.predicted != clean.predicted
        found[label] = {"success": [float(won.double().mean())]}
        for name, build in classifiers().items():
            found[label][name] = [
                judge(build(seed), features(clean), features(attacked), won, halves(won, seed))
                for seed in SEEDS
            ]
    return found


def halves(won: Tensor, seed: int) -> Tensor:
    """Return (N,) True for the images that a detector is fitted to."""
    order = torch.randperm(len(won), generator=torch.Generator().manual_seed(seed))
    fitted = torch.zeros(len(won), dtype=torch.bool)
    fitted[order[: len(won) // 2]] = True
    return fitted


def judge(model: Any, clean: Tensor, attacked: Tensor, won: Tensor, fitted: Tensor) -> float:
    """Return the AUROC of `model` fitted to the `fitted` images, on all others; nan without any."""
    from sklearn.metrics import roc_auc_score

    def rows(which: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        x = torch.cat([clean[which & won], attacked[which & won]]).double().numpy()
        return x, np.repeat([0, 1], len(x) // 2)

    (x, y), (unseen, truth) = rows(fitted), rows(~fitted)
    if len(set(y)) < 2 or len(set(truth)) < 2 or len(x) < 10:
        return float("nan")
    scores = model.fit(x, y).predict_proba(unseen)[:, 1]
    return float(roc_auc_score(truth, scores))


def classifiers() -> dict[str, Callable[[int], Any]]:
    """Return what judges every path: the common detectors."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return {
        "logistic": lambda seed: make_pipeline(
            StandardScaler(), LogisticRegression(C=0.01, max_iter=500, random_state=seed)
        ),
        "forest": lambda seed: RandomForestClassifier(TREES, random_state=seed, n_jobs=2),
    }


def published_classifiers() -> dict[str, Callable[[int], Any]]:
    """Return the three classifiers of the CDRP paper."""
    from sklearn.ensemble import (
        AdaBoostClassifier,
        GradientBoostingClassifier,
        RandomForestClassifier,
    )

    return {
        "random forest": lambda seed: RandomForestClassifier(TREES, random_state=seed, n_jobs=2),
        "AdaBoost": lambda seed: AdaBoostClassifier(random_state=seed),
        "gradient boosting": lambda seed: GradientBoostingClassifier(
            random_state=seed, max_features="sqrt"
        ),
    }


def detect_with_few(
    runs: dict[str, Routed], labels: Tensor, attack: str = "CDRP"
) -> dict[str, dict[str, list[float]]]:
    """Return AUROC by classifier and images per class, one per seed: the CDRP paper's protocol.

    With what its release lacks: only right answers that the attack turned, probabilities instead
    of hard decisions, and a fresh optimiser for every pass.
    """
    clean, attacked = runs["clean"], runs[attack]
    won = attacked.predicted != clean.predicted
    found: dict[str, dict[str, list[float]]] = {}
    for name, build in published_classifiers().items():
        found[name] = {
            str(count): [
                judge(build(seed), clean.path, attacked.path, won, few(labels, won, count, seed))
                for seed in SEEDS
            ]
            for count in FEW_PER_CLASS
        }
    return found


def few(labels: Tensor, won: Tensor, count: int, seed: int) -> Tensor:
    """Return (N,) True for `count` images of every class whose attack succeeded."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        of_class = order[(labels[order] == label) & won[order]]
        chosen[of_class[:count]] = True
    return chosen


def compare(
    cards: dict[str, Path],
    source: Path,
    *,
    images: int,
    slow_images: int,
    cache: Cache,
    progress: Progress,
    command: str,
) -> dict[str, Any]:
    """Return the whole comparison: facts of every network, one row per entry that has its network.

    cards: by the name of a backbone, `plain` among them. images: how many test images are attacked;
    slow_images: how many of them routers see that take seconds per image.
    """
    if "plain" not in cards:
        raise ConfigError("the comparison needs the backbone 'plain'; name its card")
    train, test = read_split(source, "train"), read_split(source, "test")
    rows: list[Row] = []
    networks = {}
    for name, card in cards.items():
        backbone = open_backbone(
            name, card, train, test, count=images, cache=cache, progress=progress
        )
        facts = json.loads(card.read_text())
        networks[name] = {"card": card.name, "test": facts["test"], "sha256": facts["sha256"]}
        for entry in ENTRIES:
            if entry.backbone == name:
                rows.append(measure_entry(entry, backbone, slow_count=slow_images, cache=cache))
                progress.advance()
        if name == "plain":
            rows.append(softmax_row(backbone))
    return {
        "command": command,
        "networks": networks,
        "seeds": list(SEEDS),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
    }


def steps_of(cards: dict[str, Path]) -> int:
    """Return how often `compare` advances its progress."""
    entries = [entry for entry in ENTRIES if entry.backbone in cards]
    return len(cards) * len(assaults()) + len(entries)


def measure_networks(
    cards: dict[str, Path], source: Path, *, images: int, seed: int
) -> list[UnitReport]:
    """Measure the units of every network on the same test images, and those images attacked."""
    test = read_split(source, "test")
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[:images]
    pixels, labels = test.pixels[order].float() / 255, test.labels[order]
    attack = make_attack("pgd", eps=8 / 255)
    reports = []
    for name, card in cards.items():
        network, normalise = load_network(card)
        network.requires_grad_(False)
        on_pixels = OnPixels(network, normalise)
        attacked = on_pixels.inputs(attack.run(on_pixels, pixels, labels, seed=seed))
        clean = on_pixels.inputs(pixels)
        reports.append(measure_units(name, network, clean, labels, attacked=attacked, seed=seed))
    return reports
