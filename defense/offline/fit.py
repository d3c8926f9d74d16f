"""Fit a guard: paths of clean data, a detector on one part of them, its calibration on the other."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defense.backbone import GatedBackbone
from defense.calibration import Calibration
from defense.detectors import Detector, DetectorKind, detector_named
from defense.errors import ConfigError, DataError
from defense.fingerprint import fingerprint
from defense.guard import Guard, InputSpec
from defense.looks import Extras
from defense.offline.attacks import Attack
from defense.offline.cards import load_network
from defense.offline.collect import (
    PATH_ALONE,
    Served,
    backbone_inputs,
    collect,
    collect_inputs,
    input_spec,
)
from defense.offline.data import ImageSet
from defense.offline.exemplars import choose_exemplars
from defense.offline.extras import SAMPLE, describe_extras, make_extras
from defense.offline.harmless import CHANGES
from defense.offline.nearness import fit_nearness
from defense.offline.pixels import PixelSpace
from defense.offline.progress import Progress, Silent
from defense.offline.twins import SHIFTED, Maker, pixel_space, successes
from defense.routers import ForwardRouter, Router, RouterRecipe, check_serves, router_named, serves
from defense.routers.activation import ActivationRecipe
from defense.sites import device_of
from defense.types import LOOKS, FitData, Routed, carries

MIN_IMAGES = 100
EXAMPLES = 8


@dataclass(frozen=True)
class FitOptions:
    """What to fit. `sites` restricts the observed modules; None observes by rule.

    statistics: those of the `activation` router; None takes its own.
    """

    router: str = "activation"
    detector: str = "fused"
    statistics: tuple[str, ...] | None = None
    sites: tuple[str, ...] | None = None
    calibration_share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        detector_named(self.detector)
        check_serves(self.router)
        if not 0.1 <= self.calibration_share <= 0.9:
            raise ConfigError("calibration_share must lie between 0.1 and 0.9")
        self.recipe()

    def recipe(self) -> RouterRecipe:
        """Return the recipe of the router."""
        return make_recipe(self.router, self.statistics)

    @property
    def kind(self) -> DetectorKind:
        """The detector's row in the table."""
        return detector_named(self.detector)

    @property
    def looks_beyond(self) -> bool:
        """Whether the detector looks at more than the path."""
        return hasattr(self.kind.fitted, "looks")


def fit_module(
    model: nn.Module,
    batches: Iterable[Tensor | tuple[Tensor, Tensor]],
    *,
    options: FitOptions | None = None,
    class_names: Sequence[str] = (),
    attack: Callable[[Tensor, Tensor], Tensor] | None = None,
    extras: Extras | None = None,
) -> Guard:
    """Fit a guard to a module and batches of its inputs, (x, y) or x alone.

    Without labels the network's own answers stand in. attack: returns attacked inputs for (x, y), of
    one half of the fit; detectors that ignore attacks do not call it. extras: a witness and an echo,
    for detectors that look at them; None: no witness, and an echo where one suits the inputs.
    """
    options = options or FitOptions()
    inputs, labels = _stack(batches)
    spec = InputSpec(tuple(inputs.shape[1:]), str(inputs.dtype).removeprefix("torch."))
    recipe = options.recipe()
    fit_rows, calibration_rows = split_rows(len(inputs), options)
    router_rows, fit_rows = share_rows(fit_rows, recipe)
    seen = inputs[router_rows] if recipe.examples else inputs[:EXAMPLES]
    router = serving(fit_router(model, recipe, seen, sites=options.sites, seed=options.seed))
    if extras is None:
        extras = _extras(model, inputs[fit_rows[:SAMPLE]], options)
    with GatedBackbone(model, router) as gated:
        clean = collect_inputs(model, gated, inputs[fit_rows], extras)
        calibration = collect_inputs(model, gated, inputs[calibration_rows], extras)
        data = FitData(clean, clean.predicted if labels is None else labels[fit_rows])
        if attack is not None and options.kind.attacks != "ignored":
            judged = judged_half(len(clean))
            truth = data.labels[judged]
            runs = collect_inputs(model, gated, attack(inputs[fit_rows[judged]], truth), extras)
            won = successes(runs, clean.take(judged), truth)
            data = FitData(clean, data.labels, attacked=won, judged=judged)
    names = tuple(class_names) or tuple(str(i) for i in range(clean.logits.shape[1]))
    facts = {"labels": "given" if labels is not None else "the network's own answers"}
    rows = [str(row) for row in fit_rows.tolist()]
    return assemble(
        model, router, spec, data, calibration, names, options, facts, extras, images=rows
    )


def fit_archive(
    served: Served,
    images: ImageSet,
    *,
    options: FitOptions,
    witness: Path | None = None,
    attacks: Sequence[Attack] = (),
    if_possible: bool = False,
    progress: Progress | None = None,
) -> Guard:
    """Fit a guard to a served model and image files, through the archive's own preprocessing.

    witness: the card of a network that is asked beside the backbone. attacks: what is run on one
    half of the fit images, for detectors that are fitted with attacks; the others run none.
    if_possible: go without attacks where pixels do not simply become inputs, or where the network
    has no gradient; else that is an error.
    """
    progress = progress or Silent()
    _check(images, options, witness)
    images = images.shuffled(options.seed)
    examples = images.payloads(range(EXAMPLES))
    spec = input_spec(served, examples)
    recipe = options.recipe()
    fit_rows, calibration_rows = split_rows(len(images), options)
    router_rows, fit_rows = share_rows(fit_rows, recipe)
    seen = images.payloads(router_rows.tolist()) if recipe.examples else examples
    router = serving(
        fit_router(
            served.backbone,
            recipe,
            backbone_inputs(served, seen),
            sites=options.sites,
            seed=options.seed,
            progress=told(progress, len(router_rows)),
        )
    )
    with GatedBackbone(served.backbone, router) as gated:
        clean = collect(served, gated, images.stream(fit_rows.tolist()), progress, views=spec.views)
        labelling = label_rows(images, fit_rows, clean)
        space = pixel_space(served, examples[0])
        sample = backbone_inputs(served, images.payloads(fit_rows[:SAMPLE].tolist()))
        extras = _extras(served.backbone, sample, options, witness, space, labelling.names)
        if extras.look != "path":
            clean = collect(
                served, gated, images.stream(fit_rows.tolist()), progress, extras, spec.views
            )
        calibration = collect(
            served, gated, images.stream(calibration_rows.tolist()), progress, extras, spec.views
        )
        data, facts = FitData(clean, labelling.labels), labelling.facts
        if options.kind.attacks != "ignored":
            maker = Maker(served, gated, space, extras, progress, if_possible)
            judged = judged_half(len(clean))
            payloads = images.payloads(fit_rows[judged].tolist())
            data, made = maker.fit_data(data, judged, payloads, attacks, options.seed)
            facts = facts | made
    facts = facts | describe_extras(extras, witness)
    return assemble(
        served.backbone,
        router,
        spec,
        data,
        calibration,
        labelling.names,
        options,
        facts,
        extras,
        images=[images.names[row] for row in fit_rows.tolist()],
    )


def fit_steps(count: int, options: FitOptions, attacks: int) -> int:
    """Return how far `fit_archive` advances its progress at most, given so many images and attacks."""
    fit = count - round(count * options.calibration_share)
    steps = count + fit * options.looks_beyond
    if options.kind.attacks == "ignored":
        return steps
    judged = fit - fit // 2
    return steps + judged * attacks + min(judged, SHIFTED) * CHANGES


def _check(images: ImageSet, options: FitOptions, witness: Path | None) -> None:
    if len(images) < MIN_IMAGES:
        raise DataError(
            f"{len(images)} images are too few to fit and calibrate on; give at least {MIN_IMAGES} "
            f"(a target rate of 0.01 takes 200 with the default split)"
        )
    if witness is not None and not options.looks_beyond:
        raise ConfigError(
            f"the detector '{options.detector}' does not look at a witness; leave --witness out, or "
            "take another detector"
        )
    if witness is not None:
        load_network(witness)  # a card that cannot be read is told now, not after minutes


def _extras(
    model: nn.Module,
    inputs: Tensor,
    options: FitOptions,
    witness: Path | None = None,
    space: PixelSpace | None = None,
    class_names: Sequence[str] = (),
) -> Extras:
    if not options.looks_beyond:
        return PATH_ALONE
    return make_extras(model, inputs, witness_card=witness, space=space, class_names=class_names)


def make_recipe(name: str, statistics: tuple[str, ...] | None = None) -> RouterRecipe:
    """Return the recipe of the router called `name`, with `statistics` where it has a choice."""
    recipe = router_named(name).recipe
    if statistics is None:
        return recipe()
    if not issubclass(recipe, ActivationRecipe):
        raise ConfigError(
            f"the router '{name}' has no choice of statistics; leave --statistics out"
        )
    return recipe(statistics)


def fit_router(
    model: nn.Module,
    recipe: RouterRecipe,
    inputs: Tensor,
    *,
    sites: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[float], None] = lambda _: None,
) -> Router:
    """Find the sites of `model` and fit the router that reads them to clean inputs (N, ...)."""
    device = device_of(model)
    found = recipe.sites(model, inputs[:2].to(device), sites)
    return recipe.fit(model, found, inputs, seed=seed, progress=progress)


def serving(router: Router) -> ForwardRouter:
    """Return `router`, which `FitOptions` has checked, as one that serves."""
    assert serves(router)
    return router


def told(progress: Progress, steps: int) -> Callable[[float], None]:
    """Return a function that advances `progress` by `steps` in all, told the share that is done."""
    done = 0

    def tell(share: float) -> None:
        nonlocal done
        reached = round(share * steps)
        progress.advance(reached - done)
        done = reached

    return tell


def share_rows(rows: Tensor, recipe: RouterRecipe) -> tuple[Tensor, Tensor]:
    """Part rows into those that the router is fitted to and those left for the detector.

    A path of an image that the router has seen says little about one that it has not.
    """
    count = min(recipe.examples, len(rows) // 2)
    return rows[:count], rows[count:]


def split_rows(count: int, options: FitOptions) -> tuple[Tensor, Tensor]:
    """Split row numbers at random into those to fit on and those to calibrate on."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(options.seed))
    cut = count - round(count * options.calibration_share)
    return order[:cut], order[cut:]


def judged_half(count: int) -> Tensor:
    """Mark (N,) the rows that a detector is judged with; rows of a fit are in random order."""
    return torch.arange(count) >= count // 2


@dataclass(frozen=True)
class Labelling:
    """The classes of the fit rows as the network counts them, and what each class is called."""

    labels: Tensor
    names: tuple[str, ...]
    facts: dict[str, Any]


def label_rows(images: ImageSet, rows: Tensor, clean: Routed) -> Labelling:
    """Match folder names to network outputs, by what the network mostly answers for each folder.

    Folders say nothing of the order of a network's outputs. Where two folders share an answer (the
    network does not know these classes) its own answers stand in for labels.
    """
    classes = clean.logits.shape[1]
    numbers = tuple(str(i) for i in range(classes))
    own = {"labels": "the network's own answers"}
    if images.labels is None:
        return Labelling(clean.predicted, numbers, own)
    folder = torch.tensor(images.labels)[rows]
    votes = torch.zeros(len(images.class_names), classes)
    votes.index_put_((folder, clean.predicted), torch.ones(len(rows)), accumulate=True)
    output = votes.argmax(dim=1)
    seen = folder.unique()
    if len(output[seen].unique()) != len(seen):
        return Labelling(
            clean.predicted, numbers, own | {"note": "folders do not match the classes"}
        )
    names = list(numbers)
    for index in seen.tolist():
        names[int(output[index])] = images.class_names[index]
    labels = output[folder]
    accuracy = (clean.predicted == labels).double().mean().item()
    return Labelling(labels, tuple(names), {"labels": "folders", "accuracy": round(accuracy, 4)})


def assemble(
    model: nn.Module,
    router: ForwardRouter,
    spec: InputSpec,
    data: FitData,
    calibration: Routed,
    class_names: tuple[str, ...],
    options: FitOptions,
    facts: dict[str, Any],
    extras: Extras = PATH_ALONE,
    *,
    images: Sequence[str] = (),
) -> Guard:
    """Fit the detector, calibrate it on runs that it has not seen, and bind both to `model`.

    `extras` are what the runs were collected with; the guard keeps those that its detector looks at.
    images: what the clean images are called, one per row; the guard then keeps some as exemplars.
    """
    detector = options.kind.recipe().fit(data, router.layout, seed=options.seed)
    calibrations = calibrate(detector, calibration)
    near = fit_nearness(data.clean.path, calibration.path, seed=options.seed)
    return Guard(
        fingerprint=fingerprint(model),
        router=router,
        detector=detector,
        calibrations=calibrations,
        class_names=class_names,
        inputs=spec,
        facts={
            **facts,
            "seed": options.seed,
            "fit_images": len(data.clean),
            "attacked_images": 0 if data.attacked is None else len(data.attacked),
            "shifted_images": 0 if data.shifted is None else len(data.shifted),
            "calibration_images": len(calibration),
            "smallest_target_fpr": 1 / len(calibration),
            "versions": versions(),
        },
        witness=extras.witness if any(carries(k, "witness") for k in calibrations) else None,
        echo=extras.echo if any(carries(k, "echoes") for k in calibrations) else None,
        nearness=near,
        exemplars=choose_exemplars(data.clean, data.labels, images, near, router)
        if images
        else None,
    )


def calibrate(detector: Detector, runs: Routed) -> dict[str, Calibration]:
    """Return a calibration for every look that `detector` can score and that `runs` carry."""
    known: tuple[str, ...] = getattr(detector, "looks", ("path",))
    looks = [look for look in LOOKS if look in known and runs.shows(look)]
    if not looks:
        raise ConfigError(
            f"the detector '{detector.name}' looks at {' or '.join(known)}, and there is only "
            f"{runs.look}; fit it with a witness or an echo"
        )
    return {look: Calibration(detector.score(runs.at(look)), runs.predicted) for look in looks}


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("pathguard", "torch", "torchserve")
    return {"python": platform.python_version()} | {p: metadata.version(p) for p in packages}


def _stack(batches: Iterable[Tensor | tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor | None]:
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in batches:
        x, y = batch if isinstance(batch, (tuple, list)) else (batch, None)
        inputs.append(x)
        if y is not None:
            labels.append(y)
    if not inputs:
        raise DataError("there are no batches to fit on; give a loader that yields some")
    return torch.cat(inputs), torch.cat(labels) if len(labels) == len(inputs) else None
