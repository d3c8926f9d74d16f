"""The marks that a detector is held against, and what a benchmark's results say to each.

Results are the dictionary that `pathguard benchmark` writes. One place reads them for a verdict: the
page, the Markdown and the card in the guard all show these marks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["goal", "floor", "missed", "open", "not measured"]
"""`open`: a mark without a floor whose goal is not reached."""
SAID: dict[Verdict, str] = {
    "goal": "goal reached",
    "floor": "floor held",
    "missed": "floor missed",
    "open": "goal not reached",
    "not measured": "\N{EN DASH}",
}
Row = Mapping[str, Any]
WITH_ATTACKS, CLEAN_ONLY = "attacks", "clean"
EXAMINED = "4"
"""Bound, in 1/255, at which the goal for attackers who know everything is set."""
NOTHING = "\N{EN DASH}"
PERCENT = "\N{NO-BREAK SPACE}%"


@dataclass(frozen=True)
class Unit:
    """How figures of one kind are written: `measured` with all its digits, a limit with its own."""

    measured: Callable[[float], str]
    limit: Callable[[float], str]

    def __call__(self, value: float | None) -> str:
        return NOTHING if value is None else _minus(self.measured(value))

    def span(self, low: float, high: float, write: Callable[[float], str] | None = None) -> str:
        """Return an interval of figures that are not negative, its unit written once."""
        write = write or self.measured
        return f"{write(low).removesuffix(PERCENT)}\N{EN DASH}{write(high)}"


AUROC = Unit("{:.3f}".format, lambda v: f"{v:.3f}".removesuffix("0"))
SHARE = Unit(
    lambda v: f"{100 * v:.{2 if 0 < v < 0.0995 else 1}f}{PERCENT}",
    lambda v: f"{100 * v:g}{PERCENT}",
)
RATIO = Unit("{:.2f}".format, "{:g}".format)
GAIN = Unit("{:+.3f}".format, "{:+g}".format)


@dataclass(frozen=True)
class Range:
    """Figures from `low` to `high`, both inside."""

    low: float = -math.inf
    high: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def words(self, unit: Unit) -> str:
        """Return the range as short as it can be read."""
        if math.isinf(self.low):
            return f"≤\N{NO-BREAK SPACE}{unit.limit(self.high)}"
        if math.isinf(self.high):
            return f"≥\N{NO-BREAK SPACE}{unit.limit(self.low)}"
        return unit.span(self.low, self.high, unit.limit)


@dataclass(frozen=True)
class Measure:
    """A figure, its 95 % interval where there is one, and what it was measured at."""

    value: float
    low: float | None = None
    high: float | None = None
    at: str = ""


@dataclass(frozen=True)
class Side:
    """Results on one set of images: the rows of its contestants."""

    results: Row
    rows: Row
    sealed: bool = False

    def about(self, name: str) -> Row:
        """Return what is known of a contestant: its kind, its fit."""
        known: Row = get(self.results, "contestants", name)
        return known

    def ours(self, fit: str) -> str | None:
        """Return the first of our detectors of that fit: the best would be a choice by test images."""
        wanted = ("ours", fit)
        return next(
            (
                n
                for n in self.rows
                if (get(self.about(n), "kind"), self.about(n).get("fit")) == wanted
            ),
            None,
        )

    def summary(self, fit: str, *keys: str) -> Any:
        """Return an entry of the summary of our detector of that fit."""
        name = self.ours(fit)
        return None if name is None else get(self.rows, name, "summary", *keys)

    def rivals(self) -> list[str]:
        """Return peers and baselines that were measured, the best on all attacks first."""
        means = {
            name: mean
            for name, row in self.rows.items()
            if self.about(name).get("kind") in ("peer", "baseline")
            and (mean := value_of(get(row, "summary", "seen", "mean"))) is not None
        }
        return sorted(means, key=lambda name: -means[name])


@dataclass(frozen=True)
class Standard:
    """What a figure is held against, and where it is found."""

    key: str
    words: str
    unit: Unit
    floor: Range | None
    goal: Range
    read: Callable[[Side], Measure | None]


@dataclass(frozen=True)
class Mark:
    """A standard with the figures of both sets of images."""

    standard: Standard
    measured: Measure | None
    sealed: Measure | None

    def shown(self, measure: Measure | None) -> str:
        """Return a measure with its interval, and what it was measured at."""
        unit = self.standard.unit
        if measure is None:
            return NOTHING
        interval = (
            ""
            if measure.low is None or measure.high is None
            else f" ({unit.span(measure.low, measure.high)})"
        )
        return unit(measure.value) + interval + (f", {measure.at}" if measure.at else "")

    @property
    def verdict(self) -> Verdict:
        return self.judge(self.measured)

    def judge(self, measure: Measure | None) -> Verdict:
        """Say what a measure reaches; the figure itself counts, not an end of its interval."""
        if measure is None:
            return "not measured"
        if measure.value in self.standard.goal:
            return "goal"
        if self.standard.floor is None:
            return "open"
        return "floor" if measure.value in self.standard.floor else "missed"

    @property
    def limits(self) -> tuple[str, str]:
        """Return floor and goal in words."""
        unit, floor = self.standard.unit, self.standard.floor
        return (floor.words(unit) if floor else "none"), self.standard.goal.words(unit)


@dataclass(frozen=True)
class Loss:
    """An attack that another contestant detects better than ours, by AUROC."""

    attack: str
    ours: float
    rival: str
    theirs: float


def marks(results: Row) -> list[Mark]:
    """Return every mark with what was measured, in the order of the page."""
    sides = sides_of(results)
    return [Mark(standard, *map(standard.read, sides)) for standard in STANDARDS]


def sides_of(results: Row) -> tuple[Side, Side]:
    """Return the results on the images of the benchmark, and on the sealed ones."""
    return (
        Side(results, get(results, "contestants")),
        Side(results, get(results, "sealed"), sealed=True),
    )


def losses(results: Row, fit: str = WITH_ATTACKS) -> list[Loss]:
    """Return the attacks that any other contestant, controls too, detects better than ours."""
    side, _ = sides_of(results)
    name = side.ours(fit)
    found = []
    if name is None:
        return []
    for attack in get(side.rows, name, "seen"):
        own = auroc(side.rows[name], attack)
        others = {
            rival: theirs
            for rival, row in side.rows.items()
            if row.get("kind") != "ours" and (theirs := auroc(row, attack)) is not None
        }
        best = max(others, key=lambda rival: others[rival], default=None)
        if own is not None and best is not None and others[best] > own:
            found.append(Loss(attack, own, best, others[best]))
    return found


def auroc(row: Row, attack: str, scope: str = "seen") -> float | None:
    """Return a contestant's AUROC on an attack; scope: seen or unseen."""
    return value_of(get(row, scope, attack, "auroc"))


def queries(results: Row) -> Mapping[str, Row]:
    """Return the rows of the attacks that ask a server and see its verdicts."""
    found: Mapping[str, Row] = get(results, "queries", "attack")
    return found


def get(row: Any, *keys: str) -> Any:
    """Return what lies at the end of some keys; an empty row where one is missing or null."""
    for key in keys:
        row = row.get(key) if isinstance(row, Mapping) else None
    return {} if row is None else row


def value_of(entry: Any) -> float | None:
    """Return the figure of an entry, a spread or a number; None where nothing was measured."""
    found = entry.get("mean") if isinstance(entry, Mapping) else entry
    if not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return float(found)


def measure_of(entry: Any, at: str = "") -> Measure | None:
    """Return an entry with its interval where it has one."""
    value = value_of(entry)
    if value is None:
        return None
    return Measure(value, value_of(get(entry, "low")), value_of(get(entry, "high")), at)


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def _entry(fit: str, *keys: str) -> Callable[[Side], Measure | None]:
    return lambda side: measure_of(side.summary(fit, *keys))


def _worst(fit: str, scope: str) -> Callable[[Side], Measure | None]:
    return lambda side: measure_of(
        side.summary(fit, scope, "worst"), str(side.summary(fit, scope, "worst_attack") or "")
    )


def _margin(side: Side) -> Measure | None:
    """Return how far ours, fitted with attacks, is ahead of the best peer on the mean."""
    ours = value_of(side.summary(WITH_ATTACKS, "seen", "mean"))
    rivals = side.rivals()
    if ours is None or not rivals:
        return None
    best = value_of(get(side.rows, rivals[0], "summary", "seen", "mean"))
    return None if best is None else Measure(ours - best, at=rivals[0])


def _http(side: Side) -> Measure | None:
    return None if side.sealed else measure_of(get(queries(side.results), "square", "ratio"))


def _adaptive(side: Side) -> Measure | None:
    """Return the share of what fools the bare network that fools it and gets through."""
    if side.sealed:
        return None
    through = value_of(get(side.results, "adaptive", "worst", EXAMINED, "through"))
    fooled = value_of(get(side.results, "adaptive", "bare", EXAMINED, "fooled"))
    return Measure(through / fooled) if through is not None and fooled else None


def _auroc(
    key: str, words: str, fit: str, scope: str, limits: tuple[float, float, float, float]
) -> tuple[Standard, Standard]:
    """Return the standards of a mean and of the worst attack; limits: floor, goal of each."""
    floor, goal, worst_floor, worst_goal = map(Range, limits)
    mean, worst = _entry(fit, scope, "mean"), _worst(fit, scope)
    return (
        Standard(f"{key}_mean", f"AUROC, {words}: mean", AUROC, floor, goal, mean),
        Standard(f"{key}_worst", f"AUROC, {words}: worst", AUROC, worst_floor, worst_goal, worst),
    )


def _both(
    key: str, words: str, entry: str, unit: Unit, floor: Range, goal: Range
) -> tuple[Standard, ...]:
    """Return a standard for each of our two fits."""
    fits = ((WITH_ATTACKS, words), (CLEAN_ONLY, f"{words}, clean fit"))
    return tuple(
        Standard(f"{key}_{fit}", said, unit, floor, goal, _entry(fit, entry)) for fit, said in fits
    )


STANDARDS = (
    *_auroc("seen", "every family in the fit", WITH_ATTACKS, "seen", (0.95, 0.985, 0.88, 0.95)),
    *_auroc("unseen", "its family left out of the fit", WITH_ATTACKS, "unseen",
            (0.90, 0.97, 0.83, 0.92)),
    *_auroc("clean", "fitted on clean images only", CLEAN_ONLY, "seen", (0.91, 0.97, 0.85, 0.93)),
    Standard("tpr_1", "Attacks caught at 1 % false alarms: mean", SHARE,
             Range(0.55), Range(0.85), _entry(WITH_ATTACKS, "seen", "tpr_1")),
    Standard("margin", "Mean AUROC, ahead of the best peer", GAIN, Range(0.02), Range(0.06), _margin),
    *_both("fpr", "False alarms, clean images", "realised_fpr_1", SHARE,
           Range(0.005, 0.015), Range(0.008, 0.012)),
    *_both("shift", "False alarms, worst shift of level 1 or 2", "shift_fpr", SHARE,
           Range(high=0.04), Range(high=0.02)),
    *_both("noise", "False alarms, worst noise of an attack's size", "noise_fpr", SHARE,
           Range(high=0.04), Range(high=0.02)),
    *_both("passes", "Extra passes per clean request", "extra_passes", RATIO,
           Range(high=0.3), Range(high=0.1)),
    Standard("http", "Square over HTTP: success guarded / stock", RATIO,
             Range(high=0.5), Range(high=0.1), _http),
    Standard("adaptive", "White box, 4/255: gets through / fools bare network", RATIO,
             None, Range(high=0.5), _adaptive),
)  # fmt: skip
