"""The tables of a benchmark's results, as values that a page and a Markdown file are made from.

A function returns None, or no grids, where the results lack what its table shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from defense.offline.benchmark.marks import (
    AUROC,
    CLEAN_ONLY,
    NOTHING,
    RATIO,
    SAID,
    SHARE,
    WITH_ATTACKS,
    Mark,
    Measure,
    Row,
    Unit,
    Verdict,
    get,
    marks,
    queries,
    sides_of,
    value_of,
)
from defense.offline.page import Cell

PEERS_SHOWN = 3
"""How many peers stand beside ours where all would be too many."""
TARGET = 0.01
KINDS: dict[Verdict, str] = {"goal": "good", "floor": "fair", "missed": "bad", "open": "fair"}


@dataclass(frozen=True)
class Grid:
    """A table: its caption, the names of its columns, and rows that begin with their name."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    groups: Sequence[tuple[str, int]] = ()


def mark_grid(results: Row) -> Grid:
    """Return floor, goal, figure and verdict of every mark."""
    rows: list[list[str | Cell]] = [
        [
            mark.standard.words,
            *(Cell(limit, "soft") for limit in mark.limits),
            Cell(mark.shown(mark.measured), "strong"),
            _verdict(mark, mark.measured),
            mark.shown(mark.sealed),
            _verdict(mark, mark.sealed),
        ]
        for mark in marks(results)
    ]
    head = ["", "floor", "goal", "measured", "verdict", "on sealed images", "verdict there"]
    caption = "In brackets the 95 % interval over images; the target of false alarms is 1 %."
    return Grid(caption, head, rows)


def _verdict(mark: Mark, measure: Measure | None) -> Cell:
    verdict = mark.judge(measure)
    return Cell(SAID[verdict], KINDS.get(verdict, ""))


def contestant_grid(results: Row) -> Grid | None:
    """Return one line per detector, the best mean first."""
    rows = get(results, "contestants")
    if not rows:
        return None
    figures: tuple[tuple[str, Unit, tuple[str, ...], bool], ...] = (
        ("mean", AUROC, ("seen", "mean"), True),
        ("worst", AUROC, ("seen", "worst"), True),
        ("caught at 1 %", SHARE, ("seen", "tpr_1"), True),
        ("mean", AUROC, ("unseen", "mean"), True),
        ("worst", AUROC, ("unseen", "worst"), True),
        ("clean", SHARE, ("realised_fpr_1",), False),
        ("shifts", SHARE, ("shift_fpr",), False),
        ("noise", SHARE, ("noise_fpr",), False),
        ("per request", RATIO, ("extra_passes",), False),
    )
    body: list[list[str | Cell]] = []
    order = by_mean(rows)
    for name in order:
        row = rows[name]
        line: list[str | Cell] = [named(results, name), f"{row.get('kind')}, {row.get('fit')}"]
        for _, unit, keys, high in figures:
            values = {other: value_of(get(rows[other], "summary", *keys)) for other in order}
            line.append(_figure(unit, values[name], values.values(), high))
        body.append(line)
    head = ["detector", "kind, fit", *(name for name, *_ in figures)]
    groups = [("", 1), ("all attacks, AUROC", 3), ("family left out", 2)]
    groups += [("false alarms at 1 %", 3), ("extra passes", 1)]
    return Grid("The best mean first; the best figure of a column is bold.", head, body, groups)


def adaptive_grid(results: Row) -> Grid | None:
    """Return the attackers who know everything, the worst case over all of them first."""
    found = get(results, "adaptive")
    bounds = [f"{eps:g}" for eps in get(found, "eps_255")]
    if not bounds:
        return None
    rate = value_of(found.get("fpr")) or 0.05
    keys = (("fooled", SHARE), ("through", SHARE), ("through_1", SHARE), ("mean_l2", RATIO))
    lines = {
        "no detector to evade": get(found, "bare"),
        "worst of all, per image": get(found, "worst"),
    }
    body: list[list[str | Cell]] = []
    for name, row in (lines | dict(get(found, "rows"))).items():
        cells = [
            Cell(unit(value_of(get(row, eps, key))), "strong" if key == "through" else "")
            for eps in bounds
            for key, unit in keys
        ]
        body.append([name, *cells])
    head = [
        "attack",
        *(
            ["fooled", f"through at {SHARE.limit(rate)}", f"at {SHARE.limit(0.01)}", "L2"]
            * len(bounds)
        ),
    ]
    caption = (
        f"Shares of {found.get('n', NOTHING)} images. Through: the network is fooled and the detector "
        "silent; L2: how far those images were moved."
    )
    return Grid(caption, head, body, [(f"{eps}/255", len(keys)) for eps in bounds])


def query_grid(results: Row) -> Grid | None:
    """Return attacks that ask the served model."""
    rows = queries(results)
    body: list[list[str | Cell]] = [
        [
            name,
            f"{row.get('n', NOTHING)}",
            f"{row.get('budget', NOTHING)}",
            SHARE(value_of(row.get("stock_success"))),
            Cell(SHARE(value_of(row.get("guarded_success"))), "strong"),
            Cell(RATIO(value_of(row.get("ratio"))), "strong"),
            ", ".join(
                f"{kind} {NOTHING if value is None else f'{value:g}'}"
                for kind, value in get(row, "median_queries").items()
            ),
        ]
        for name, row in rows.items()
    ]
    head = [
        "attack",
        "images",
        "questions allowed",
        "succeeds, stock",
        "guarded",
        "guarded / stock",
    ]
    caption = "Attackers who see only answers and verdicts of the server."
    return Grid(caption, [*head, "median questions"], body) if rows else None


def sanity_grid(results: Row) -> Grid | None:
    """Return the checks that a wrong benchmark would fail, the failed first."""
    checks = get(results, "sanity")
    body: list[list[str | Cell]] = [
        [
            name,
            Cell("passed", "good") if row.get("passed") else Cell("failed", "bad"),
            Cell(f"{row.get('says', '')}", "text"),
        ]
        for name, row in sorted(checks.items(), key=lambda item: bool(item[1].get("passed")))
    ]
    return (
        Grid("Checks of the benchmark itself.", ["check", "", "what it found"], body)
        if body
        else None
    )


def sealed_grid(results: Row) -> Grid | None:
    """Return every detector on the benchmark's images and on the sealed ones, side by side."""
    sealed, rows = get(results, "sealed"), get(results, "contestants")
    figures: tuple[tuple[str, Unit, tuple[str, ...]], ...] = (
        ("mean AUROC", AUROC, ("seen", "mean")),
        ("worst AUROC", AUROC, ("seen", "worst")),
        ("family left out, mean", AUROC, ("unseen", "mean")),
        ("caught at 1 %", SHARE, ("seen", "tpr_1")),
        ("false alarms at 1 %", SHARE, ("realised_fpr_1",)),
    )
    body: list[list[str | Cell]] = [
        [
            named(results, name),
            *(
                Cell(unit(value_of(get(source, name, "summary", *keys))), kind)
                for _, unit, keys in figures
                for source, kind in ((rows, "soft"), (sealed, "strong"))
            ),
        ]
        for name in sealed
    ]
    head = ["detector", *(["benchmark", "sealed"] * len(figures))]
    caption = "No fit, no threshold and no choice has seen the sealed images."
    groups = [(name, 2) for name, *_ in figures]
    return Grid(caption, head, body, groups) if body else None


def by_mean(rows: Mapping[str, Row]) -> list[str]:
    """Return contestants by their mean AUROC on all attacks, the best first."""
    return sorted(rows, key=lambda n: -(value_of(get(rows[n], "summary", "seen", "mean")) or 0))


def shown(results: Row) -> list[str]:
    """Return our detectors and the best peers: who is drawn."""
    side, _ = sides_of(results)
    ours = [name for fit in (WITH_ATTACKS, CLEAN_ONLY) if (name := side.ours(fit)) is not None]
    return ours + side.rivals()[:PEERS_SHOWN]


def named(results: Row, name: str) -> Cell:
    """Return a contestant's name, ours in colour."""
    return Cell(name, "ours" if get(results, "contestants", name, "kind") == "ours" else "")


def _figure(unit: Unit, value: float | None, values: Iterable[float | None], high: bool) -> Cell:
    known = [other for other in values if other is not None]
    return Cell(unit(value), "strong" if high and known and value == max(known) else "")
