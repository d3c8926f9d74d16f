"""The study: every contestant, fitted and judged alike, seed by seed; see `results`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from defense.errors import SiteError
from defense.offline.benchmark.cells import Cell, judge, judge_clean, spread_cells, summary
from defense.offline.benchmark.contestants import Contestant, TwoLooks
from defense.offline.benchmark.metrics import flagged, roc
from defense.offline.benchmark.peers import Score
from defense.offline.benchmark.splits import Split, make_split
from defense.offline.benchmark.store import code_digest
from defense.offline.benchmark.trials import Field, Made, Material, joined

SEEDS = (0, 1, 2)
TARGET = 0.01
MILD_LEVELS = (1, 2)
FEW = 100
"""Images that slow contestants are judged on, of every kind, with the first seed alone."""
SLOW_AGAINST = ("fgsm_8", "pgd_2", "pgd_8", "cw_0", "square_8", "cdrp")
"""The attacks that slow contestants are judged against."""


@dataclass(frozen=True)
class Judged:
    """One contestant fitted with one seed: its scores of all that the seed tests it with."""

    cells: dict[str, Cell]
    clean: Cell
    shifts: dict[str, dict[str, float | None]]
    noise: dict[str, float | None]
    failed: dict[str, float | None]
    strict: dict[str, float | None]
    passes: float | None
    curve: list[list[float]]


@dataclass(frozen=True)
class Bench:
    """One seed's images and the pool that is judged: its test images, or the sealed ones."""

    material: Material
    split: Split
    field: Field
    rows: Tensor

    def judge(self, score: Score, *, few: bool = False, controls: bool = True) -> Judged:
        """Judge a fitted contestant on `rows`. few: on the first `FEW` of everything.

        controls: whether false alarms at changed images are counted as well.

        Thresholds and false alarms are those of a served guard: of all clean requests, whatever the
        network makes of them. Attacks are those on images that it gets right, and ranks are against
        these; `strict` holds what thresholds of such images alone would give.
        """
        subject = self.material.subject
        cut = FEW if few else None
        calibration = self.split.calibration[:cut]
        every = score(self.material.clean.take(calibration))
        known = every[subject.right[calibration]]
        rows = self.rows[:cut]
        clean, right = score(self.material.clean.take(rows)), subject.right[rows]
        own = dict(zip(rows.tolist(), clean.tolist(), strict=True))
        cells, failed, strict, found = {}, {}, {}, []
        for name, assault in self.field.assaults.items():
            mine = assault.of(rows)
            if not bool(mine.won.any()) or (few and name not in SLOW_AGAINST):
                continue
            attacked = score(mine.sample)
            twins = torch.tensor([own[row] for row in mine.rows.tolist()], dtype=torch.float64)
            cells[name] = judge(twins, attacked, mine.won, every, seed=0)
            failed[name] = _rate(every, attacked[~mine.won])
            strict[name] = _rate(known, attacked[mine.won])
            found.append(attacked[mine.won])
        strict["clean"] = _rate(known, clean[right])
        return Judged(
            cells,
            judge_clean(clean, subject.labels[rows], every, subject.labelling.names),
            self._shifts(score, every) if controls else {},
            self._noise(score, every) if controls else {},
            failed,
            strict,
            self._passes(score, rows),
            roc(clean[right], torch.cat(found)) if found else [],
        )

    def _passes(self, score: Score, rows: Tensor) -> float | None:
        """Return how many extra passes of the backbone a clean request takes on average."""
        if not isinstance(score, TwoLooks):
            return None
        every = self.material.clean.take(rows)
        echoes = every.routed.echoes
        assert echoes is not None
        return float(score.doubtful(every).double().mean()) * echoes.shape[1]

    def _shifts(self, score: Score, calibration: Tensor) -> dict[str, dict[str, float | None]]:
        found: dict[str, dict[str, float | None]] = {}
        for (kind, level), made in self.field.shifted.items():
            found.setdefault(kind, {})[str(level)] = self._false(score, made, calibration)
        return found

    def _noise(self, score: Score, calibration: Tensor) -> dict[str, float | None]:
        return {
            name: self._false(score, made, calibration) for name, made in self.field.noisy.items()
        }

    def _false(self, score: Score, made: Made, calibration: Tensor) -> float | None:
        """Return the share of false alarms among changed images that the network still gets right.

        An alarm at an image that the change made it get wrong is not a false one.
        """
        mine = made.of(self.rows)
        right = mine.sample.routed.predicted == self.material.subject.labels[mine.rows]
        return _rate(calibration, score(mine.sample.take(right)))


def _rate(calibration: Tensor, score: Tensor) -> float | None:
    hits = flagged(calibration, score, TARGET)
    return None if hits is None or len(hits) == 0 else float(hits.double().mean())


def run_study(
    material: Material, entrants: Sequence[Contestant], seeds: Sequence[int] = SEEDS
) -> dict[str, Any]:
    """Return the parts `attacks`, `contestants`, `sealed` and `roc` of the results."""
    results: dict[str, Any] = {
        "attacks": describe_attacks(material),
        "contestants": {},
        "sealed": {},
        "roc": {},
    }
    for entrant in entrants:
        if not material.clean.routed.shows(entrant.needs):
            absent = (
                f"it looks at '{entrant.needs}' and there is '{material.clean.routed.look}' alone"
            )
            results.setdefault("absent", {})[entrant.name] = absent
            continue
        try:
            found = material.subject.store.keep_plain(
                f"contestant {entrant.name}",
                partial(_entry, material, entrant, seeds),
                seeds=list(seeds),
                entrant=[entrant.kind, entrant.fit, entrant.about],
                images=material.digest(),
                code=code_digest(),
            )
        except SiteError as error:
            results.setdefault("absent", {})[entrant.name] = str(error)
            continue
        for part, figures in found.items():
            results[part][entrant.name] = figures
        material.subject.progress.advance()
    return results


def _entry(material: Material, entrant: Contestant, seeds: Sequence[int]) -> dict[str, Any]:
    """Return what one contestant adds to each part of the results."""
    seen, sealed = _fit_and_judge(material, entrant, seeds)
    unseen = _left_out(material, entrant, seeds)
    found = {
        "contestants": row(entrant, seen, unseen),
        "roc": {"all": seen[0].curve},
    }
    return found | ({"sealed": row(entrant, sealed, [])} if sealed else {})


def _fit_and_judge(
    material: Material, entrant: Contestant, seeds: Sequence[int]
) -> tuple[list[Judged], list[Judged]]:
    """Fit with every seed and judge on that seed's test images; ours on the sealed ones as well.

    Controls of the others are counted with one seed, and slow ones are judged with one seed alone.
    """
    seen, sealed = [], []
    for seed in seeds[:1] if entrant.slow else seeds:
        split = make_split(material.pools, seed)
        score = entrant.learn(material.trial(split, seed))
        bench = Bench(material, split, material.open, split.test)
        controls = not entrant.slow and (entrant.kind == "ours" or seed == seeds[0])
        seen.append(bench.judge(score, few=entrant.slow, controls=controls))
        if entrant.kind == "ours":
            pool = material.pools.sealed
            sealed.append(Bench(material, split, material.sealed, pool).judge(score))
    return seen, sealed


def _left_out(
    material: Material, entrant: Contestant, seeds: Sequence[int]
) -> list[dict[str, Cell]]:
    """Return by seed the cell of every attack, of the fit that never saw its family."""
    families = dict.fromkeys(a.attack.family for a in material.open.assaults.values())
    if entrant.fit == "clean" or entrant.slow or entrant.kind == "control" or len(families) < 2:
        return []
    found = []
    for seed in seeds if entrant.kind == "ours" else seeds[:1]:
        split = make_split(material.pools, seed)
        cells: dict[str, Cell] = {}
        for family in families:
            score = entrant.learn(material.trial(split, seed, without=family))
            own = {n: a for n, a in material.open.assaults.items() if a.attack.family == family}
            bench = Bench(material, split, Field(own, {}, {}), split.test)
            cells |= bench.judge(score).cells
        found.append(cells)
    return found


def row(
    entrant: Contestant, seen: Sequence[Judged], unseen: Sequence[Mapping[str, Cell]]
) -> dict[str, Any]:
    """Return a contestant's part of the results.

    strict: hits and false alarms with thresholds of images that the network gets right alone.
    """
    told = {"kind": entrant.kind, "fit": entrant.fit, "about": entrant.about}
    shifts, noise, failed, strict = (
        spread_cells([getattr(judged, part) for judged in seen]) or {}
        for part in ("shifts", "noise", "failed", "strict")
    )
    mild = [levels.get(str(level)) for levels in shifts.values() for level in MILD_LEVELS]
    clean = spread_cells([judged.clean for judged in seen]) or {}
    hits = [rate for name, rate in strict.items() if name != "clean" and rate is not None]
    passes = [judged.passes for judged in seen if judged.passes is not None]
    return told | {
        "seen": _by_attack([judged.cells for judged in seen]),
        "unseen": _by_attack(unseen) if unseen else None,
        "clean": clean,
        "shifts": shifts,
        "noise": noise,
        "failed": failed,
        "strict": {"fpr_1": strict.get("clean"), "tpr_1": fmean(hits) if hits else None},
        "summary": {
            "seen": summary([judged.cells for judged in seen]),
            "unseen": summary(unseen) if unseen else None,
            "realised_fpr_1": clean.get("realised_fpr", {}).get(str(TARGET)),
            "shift_fpr": max((v for v in mild if v is not None), default=None),
            "noise_fpr": max((v for v in noise.values() if v is not None), default=None),
            "extra_passes": fmean(passes) if passes else None,
        },
    }


def _by_attack(seeds: Sequence[Mapping[str, Cell]]) -> dict[str, Cell | None]:
    names = dict.fromkeys(name for cells in seeds for name in cells)
    return {name: spread_cells([cells.get(name) for cells in seeds]) for name in names}


def describe_attacks(material: Material) -> dict[str, Any]:
    """Return what every attack is and how far it went, over all images that it was made of."""
    found = {}
    for name, assault in material.open.assaults.items():
        both = (assault, material.sealed.assaults[name])
        rows = torch.cat([part.rows for part in both])
        changed = joined(part.sample for part in both).pixels
        change = changed - material.subject.pixels[rows].float() / 255
        won = torch.cat([part.won for part in both])
        found[name] = {
            "family": assault.attack.family,
            "norm": assault.attack.norm,
            "eps": assault.attack.eps,
            "n": len(rows),
            "success_rate": float(won.double().mean()),
            "mean_linf": float(change.abs().flatten(1).amax(1).mean()),
            "mean_l2": float(change.flatten(1).norm(dim=1).mean()),
        }
    return found
