"""What has to hold before a study is believed: of its images, of its attacks, of its claims."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from defense.guard import Guard
from defense.offline.attacks import make_attack
from defense.offline.attacks.adaptive import open_guard
from defense.offline.benchmark.contestants import two_looks
from defense.offline.benchmark.discipline import (
    attack_works,
    different_images_are_no_questions,
    digests,
    grids_do_not_matter,
    near_target,
    null_test,
    require,
    splits_apart,
    twins_together,
)
from defense.offline.benchmark.metrics import flagged
from defense.offline.benchmark.peers import Sample, Score
from defense.offline.benchmark.sanity import (
    Check,
    claim_is_plausible,
    gradient_reaches,
    grows,
    knowing_wins,
    large_change_succeeds,
    white_box_wins,
)
from defense.offline.benchmark.splits import make_split
from defense.offline.benchmark.trials import Material

LARGE = "pgd_64"
FEW = 100


def require_discipline(material: Material, seeds: tuple[int, ...]) -> list[Check]:
    """Check that no image serves two ends; DataError where one does, before anything is fitted."""
    names = digests(material.clean.pixels)
    found = []
    for seed in seeds:
        split = make_split(material.pools, seed)
        parts = split.parts() | {"sealed": material.pools.sealed}
        found.append(
            splits_apart({part: [names[row] for row in rows] for part, rows in parts.items()})
        )
        fit, test = (
            material.clean.pixels[torch.cat(rows)]
            for rows in ([split.views, split.fit], [split.test, material.pools.sealed])
        )
        found.append(twins_together(fit, test))
    require(found)
    return found[:2]


def check_attacks(material: Material) -> Iterator[Check]:
    """Yield checks of the attacks as they were made."""
    subject, field = material.subject, material.open
    for name, assault in field.assaults.items():
        noise = field.noisy.get(f"uniform noise of {name}")
        wrong = None
        if noise is not None:
            wrong = noise.sample.routed.predicted != subject.labels[noise.rows]
        clean = subject.pixels[assault.rows].float() / 255
        yield attack_works(name, clean, assault.sample.pixels, assault.won, noise_won=wrong)
    sizes = [name for name in ("pgd_2", "pgd_4", "pgd_8") if name in field.assaults]
    if len(sizes) > 1:
        radii = [float(name.removeprefix("pgd_")) for name in sizes]
        yield grows("eps", radii, [field.assaults[name].won for name in sizes])
    if {"apgd_8", "square_8"} <= field.assaults.keys():
        yield white_box_wins(field.assaults["apgd_8"].won, field.assaults["square_8"].won)
    rows = next(iter(field.assaults.values())).rows[:FEW]
    far = subject.runs("a large change", subject.attacked(make_attack(LARGE), rows))
    yield large_change_succeeds(far.routed.predicted != subject.labels[rows])


def check_guard(material: Material, guard: Guard, seed: int) -> Iterator[Check]:
    """Yield checks of the default guard: nothing found in nothing, nothing found in lost grids."""
    subject, split = material.subject, make_split(material.pools, seed)
    score = two_looks(material.trial(split, seed), "attacks")
    calibration = score(material.clean.take(split.calibration))
    again = subject.runs("clean images again", subject.pixels[split.test])
    half = len(split.test) // 2
    yield null_test(
        score(again.take(torch.arange(half))), score(again.take(torch.arange(half, 2 * half)))
    )
    images = material.clean.pixels[split.test]
    yield grids_do_not_matter(_on_pixels(material, score), images, calibration, seed=seed)
    hits = {}
    for name, made in material.harmless.items():
        here = made.of(split.test)
        right = here.sample.routed.predicted == subject.labels[here.rows]
        hits[name] = flagged(calibration, score(here.sample.take(right)), 0.05)
    yield near_target(
        {k: h for k, h in hits.items() if h is not None}, 0.05, name="harmless changes"
    )
    if guard.nearness is not None:
        yield different_images_are_no_questions(guard.nearness, material.clean.routed.path)
    opened = open_guard(guard, subject.served.backbone, subject.space)
    yield gradient_reaches(lambda x: opened(x).score, images[:FEW])


def _on_pixels(material: Material, score: Score) -> Any:
    def of(pixels: Tensor) -> Tensor:
        eight_bit = (pixels * 255).round().to(torch.uint8)
        sample: Sample = material.subject.runs("grids", eight_bit)
        return score(sample)

    return of


def check_claims(results: dict[str, Any], accuracy: float) -> Iterator[Check]:
    """Yield checks of what the results claim against attackers who know everything.

    accuracy: share of clean images that the network gets right.
    """
    adaptive = results.get("adaptive")
    if not adaptive:
        return
    for radius in map(str, adaptive["eps_255"]):
        worst, knowing, bare = (adaptive[who][radius] for who in ("worst", "knowing", "bare"))
        count = adaptive["n"]
        yield knowing_wins([_marks(knowing["through"], count)], _marks(bare["through"], count))
        yield claim_is_plausible(accuracy * (1 - worst["through"]), int(radius) / 255)


def _marks(share: float, count: int) -> Tensor:
    return torch.arange(count) < round(share * count)


def as_results(checks: Iterator[Check] | list[Check]) -> dict[str, Any]:
    """Return checks as the results hold them; those of one name are numbered."""
    found: dict[str, Any] = {}
    for check in checks:
        name = check.name
        while name in found:
            stem, _, number = name.rpartition(" #")
            name = f"{stem} #{int(number) + 1}" if stem else f"{name} #2"
        told = asdict(check)
        found[name] = {"passed": told["passed"], "says": told["says"]}
    return found
