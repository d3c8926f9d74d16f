"""The tables of a benchmark's results that have a row for every attack, or kind of clean image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from defense.offline.benchmark.marks import (
    AUROC,
    CLEAN_ONLY,
    NOTHING,
    RATIO,
    SHARE,
    WITH_ATTACKS,
    Row,
    Unit,
    get,
    sides_of,
    value_of,
)
from defense.offline.benchmark.tables import TARGET, Grid, by_mean, shown
from defense.offline.page import Cell


def auroc_grids(results: Row) -> list[Grid]:
    """Return AUROC of attack and contestant: seen, one family left out, clean images only."""
    return _three(
        results, "AUROC", AUROC, lambda cell: value_of(get(cell, "auroc")), lambda v: _heat(v)
    )


def caught_grids(results: Row) -> list[Grid]:
    """Return the share of attacks that is caught at a false-alarm rate of 1 %."""
    return _three(
        results,
        "Caught at 1 % false alarms",
        SHARE,
        lambda cell: value_of(get(cell, "tpr", "0.01")),
        lambda v: v,
    )


def detail_grids(results: Row) -> list[Grid]:
    """Return every figure of our detectors, attack by attack."""
    rows = get(results, "contestants")
    side, _ = sides_of(results)
    figures: tuple[tuple[str, Unit, tuple[str, ...]], ...] = (
        ("AUROC", AUROC, ("auroc",)),
        ("AUPR", AUROC, ("aupr",)),
        ("AUPR at 1 % attacks", AUROC, ("aupr_1",)),
        ("caught at 5 %", SHARE, ("tpr", "0.05")),
        ("at 1 %", SHARE, ("tpr", "0.01")),
        ("at 0.1 %", SHARE, ("tpr", "0.001")),
        ("false alarms to catch 95 %", SHARE, ("fpr95",)),
        ("fools and is not rejected", SHARE, ("guarded_success",)),
        ("answered right or rejected", SHARE, ("robust_accuracy",)),
    )
    grids = []
    for name in filter(None, map(side.ours, (WITH_ATTACKS, CLEAN_ONLY))):
        body: list[list[str | Cell]] = [
            [
                attack,
                f"{cell.get('n', NOTHING)}",
                *(unit(value_of(get(cell, *keys))) for _, unit, keys in figures),
                SHARE(value_of(get(rows[name], "failed", attack))),
            ]
            for attack, cell in get(rows[name], "seen").items()
            if cell is not None
        ]
        head = ["attack", "images", *(title for title, *_ in figures), "hit though it failed"]
        grids.append(Grid(f"{name}, every figure", head, body))
    return grids


def attack_grid(results: Row) -> Grid | None:
    """Return what the attacks are and how far they move an image."""
    rows = get(results, "attacks")
    body: list[list[str | Cell]] = [
        [
            name,
            f"{row.get('family')}",
            f"{row.get('norm')}",
            NOTHING if row.get("eps") is None else f"{row['eps']:g}",
            f"{row.get('n', NOTHING)}",
            SHARE(value_of(row.get("success_rate"))),
            RATIO(None if (linf := value_of(row.get("mean_linf"))) is None else 255 * linf),
            RATIO(value_of(row.get("mean_l2"))),
        ]
        for name, row in rows.items()
    ]
    head = ["attack", "family", "norm", "bound", "successful", "of the attacked", "mean L∞ · 255"]
    caption = "Attacks on the unguarded network; only those that turned its answer count"
    return Grid(caption, [*head, "mean L2"], body) if rows else None


def alarm_grids(results: Row) -> list[Grid]:
    """Return false alarms on noise, on attacks that failed, and class by class."""
    rows, names = get(results, "contestants"), shown(results)
    sources = (
        ("Random noise as large as an attack's change, hit at 1 %", ("noise",)),
        (
            "Clean images by the class that the network names, hit at 1 %",
            ("clean", "per_class_fpr"),
        ),
    )
    grids = []
    for caption, keys in sources:
        found = {name: get(rows[name], *keys) for name in names}
        kinds = list(dict.fromkeys(kind for row in found.values() for kind in row))
        body: list[list[str | Cell]] = [
            [kind, *(_alarm(value_of(found[name].get(kind))) for name in names)] for kind in kinds
        ]
        if body:
            grids.append(Grid(caption, ["", *names], body))
    return grids


def _three(
    results: Row,
    what: str,
    unit: Unit,
    read: Callable[[Any], float | None],
    heat: Callable[[float], float],
) -> list[Grid]:
    rows = get(results, "contestants")
    order = sorted(by_mean(rows), key=lambda name: rows[name].get("kind") != "ours")
    with_attacks = [name for name in order if rows[name].get("fit") == WITH_ATTACKS]
    clean = [name for name in order if rows[name].get("fit") == CLEAN_ONLY]
    wanted = (
        ("every family of attacks in the fit", "seen", with_attacks),
        ("the attack's own family left out of the fit", "unseen", with_attacks),
        ("fitted on clean images only", "seen", clean),
    )
    grids = []
    for caption, scope, names in wanted:
        names = [name for name in names if get(rows[name], scope)]
        attacks = list(dict.fromkeys(a for name in names for a in rows[name][scope]))
        body: list[list[str | Cell]] = []
        for attack in attacks:
            values = {name: read(get(rows[name], scope, attack)) for name in names}
            body.append([attack, *_hot(unit, values.values(), heat)])
        if body:
            grids.append(Grid(f"{what}: {caption}", ["attack", *names], body))
    return grids


def _hot(unit: Unit, values: Iterable[float | None], heat: Callable[[float], float]) -> list[Cell]:
    values = list(values)
    best = max((value for value in values if value is not None), default=None)
    return [
        Cell(
            unit(value),
            "strong" if value is not None and value == best else "",
            None if value is None else heat(value),
        )
        for value in values
    ]


def _alarm(value: float | None) -> Cell:
    """Return a false-alarm rate; the colour is the logarithm of what exceeds the target."""
    if value is None or value <= TARGET:
        return Cell(SHARE(value))
    return Cell(SHARE(value), heat=-min(1.0, math.log10(value / TARGET) / 2))


def _heat(auroc: float) -> float:
    """Return the colour of an AUROC: nothing at chance, steeper where good detectors differ."""
    share = (auroc - 0.5) / 0.5
    return math.copysign(share**4, share)
