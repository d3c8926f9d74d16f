"""The study: every contestant, fitted and judged alike, seed by seed; see `results`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from defense.errors import SiteError
from defense.offline.benchmark.cells import Cell, judge, judge_clean, spread_cells, summary
from defense.offline.benchmark.contestants import Contestant, TwoLooks
from defense.offline.benchmark.metrics import flagged, roc
from defense.offline.benchmark.peers import Score
from defense.offline.benchmark.splits import Split, make_split
from defense.offline.benchmark.trials import Field, Made, Material, joined

SEEDS = (0, 1, 2)
TARGET = 0.01
MILD_LEVELS = (1, 2)
FEW = 150
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
    served: dict[str, float | None]
    curve: list[list[float]]


@dataclass(frozen=True)
class Bench:
    """One seed's images and the pool that is judged: its test images, or the sealed ones."""

    material: Material
    split: Split
    field: Field
    rows: Tensor

    def judge(self, score: Score, *, few: bool = False) -> Judged:
        """Judge a fitted contestant on `rows`. few: on the first `FEW` of everything."""
        subject = self.material.subject
        cut = FEW if few else None
        calibration = self.material.clean.take(self.split.calibration[:cut])
        known = subject.right[self.split.calibration[:cut]]
        every = score(calibration)
        right_rows = self.rows[subject.right[self.rows]][:cut]
        clean = score(self.material.clean.take(right_rows))
        own = dict(zip(right_rows.tolist(), clean.tolist(), strict=True))
        cells, failed, served, curves = {}, {}, {}, []
        for name, assault in self.field.assaults.items():
            if few and name not in SLOW_AGAINST:
                continue
            mine = assault.of(right_rows)
            if not bool(mine.won.any()):
                continue
            attacked = score(mine.sample)
            twins = torch.tensor([own[row] for row in mine.rows.tolist()], dtype=torch.float64)
            cells[name] = judge(twins, attacked, mine.won, every[known], seed=0)
            failed[name] = _rate(every[known], attacked[~mine.won])
            served[name] = _rate(every, attacked[mine.won])
            curves.append(attacked[mine.won])
        names = subject.labelling.names
        return Judged(
            cells,
            judge_clean(clean, subject.labels[right_rows], every[known], names),
            {} if few else self._shifts(score, every[known]),
            {}
            if few
            else {k: self._false(score, m, every[known]) for k, m in self.field.noisy.items()},
            failed,
            served | self._traffic(score, every, cut),
            roc(clean, torch.cat(curves)) if curves else [],
        )

    def _traffic(
        self, score: Score, calibration: Tensor, cut: int | None
    ) -> dict[str, float | None]:
        """Count false alarms over all clean requests, whatever the network makes of them."""
        every = self.material.clean.take(self.rows[:cut])
        passes = None
        if isinstance(score, TwoLooks):
            echoes = every.routed.echoes
            assert echoes is not None
            passes = float(score.doubtful(every).double().mean()) * echoes.shape[1]
        return {"clean": _rate(calibration, score(every)), "passes": passes}

    def _shifts(self, score: Score, calibration: Tensor) -> dict[str, dict[str, float | None]]:
        found: dict[str, dict[str, float | None]] = {}
        for (kind, level), made in self.field.shifted.items():
            found.setdefault(kind, {})[str(level)] = self._false(score, made, calibration)
        return found

    def _false(self, score: Score, made: Made, calibration: Tensor) -> float | None:
        """Return the share of false alarms among changed images that the network still gets right."""
        subject = self.material.subject
        mine = made.of(self.rows)
        right = mine.sample.routed.predicted == subject.labels[mine.rows]
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
        try:
            seen, sealed = _fit_and_judge(material, entrant, seeds)
            unseen = _left_out(material, entrant, seeds)
        except SiteError as error:
            results.setdefault("absent", {})[entrant.name] = str(error)
            continue
        results["contestants"][entrant.name] = row(entrant, seen, unseen)
        if sealed:
            results["sealed"][entrant.name] = row(entrant, sealed, [])
        results["roc"][entrant.name] = {"all": seen[0].curve}
        material.subject.progress.advance()
    return results


def _fit_and_judge(
    material: Material, entrant: Contestant, seeds: Sequence[int]
) -> tuple[list[Judged], list[Judged]]:
    """Fit with every seed; judge on that seed's test images and on the sealed ones."""
    seen, sealed = [], []
    for seed in seeds[:1] if entrant.slow else seeds:
        split = make_split(material.pools, seed)
        score = entrant.learn(material.trial(split, seed))
        seen.append(
            Bench(material, split, material.open, split.test).judge(score, few=entrant.slow)
        )
        if not entrant.slow:
            pool = material.pools.sealed
            sealed.append(Bench(material, split, material.sealed, pool).judge(score))
    return seen, sealed


def _left_out(
    material: Material, entrant: Contestant, seeds: Sequence[int]
) -> list[dict[str, Cell]]:
    """Return by seed the cell of every attack, of the fit that never saw its family."""
    if entrant.fit == "clean" or entrant.slow:
        return []
    found = []
    families = dict.fromkeys(a.attack.family for a in material.open.assaults.values())
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
    """Return a contestant's part of the results; see the package's documentation."""
    told = {"kind": entrant.kind, "fit": entrant.fit, "about": entrant.about}
    shifts, noise, failed, served = (
        spread_cells([getattr(judged, part) for judged in seen]) or {}
        for part in ("shifts", "noise", "failed", "served")
    )
    mild = [levels.get(str(level)) for levels in shifts.values() for level in MILD_LEVELS]
    clean = spread_cells([judged.clean for judged in seen]) or {}
    hits = [
        value
        for name, value in served.items()
        if name not in ("clean", "passes") and value is not None
    ]
    return told | {
        "seen": _by_attack([judged.cells for judged in seen]),
        "unseen": _by_attack(unseen) if unseen else None,
        "clean": clean,
        "shifts": shifts,
        "noise": noise,
        "failed": failed,
        "served": {"fpr_1": served.get("clean"), "tpr_1": sum(hits) / len(hits) if hits else None},
        "summary": {
            "seen": summary([judged.cells for judged in seen]),
            "unseen": summary(unseen) if unseen else None,
            "realised_fpr_1": clean.get("realised_fpr", {}).get(str(TARGET)),
            "shift_fpr": max((v for v in mild if v is not None), default=None),
            "noise_fpr": max((v for v in noise.values() if v is not None), default=None),
            "extra_passes": served.get("passes"),
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
