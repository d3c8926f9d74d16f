"""Line charts as SVG inside a page: they take the page's colours, so they are light or dark with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLES = 6
"""How many curves are told apart, by colour and by dashes; see `CHART_STYLE`."""


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high` with named ticks; `log`: equal ratios are equally long."""

    name: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def along(self, value: float) -> float:
        """Return where a value lies, 0 at `low` and 1 at `high`."""
        scale = math.log10 if self.log else float
        start, end = scale(self.low), scale(self.high)
        return (scale(value) - start) / (end - start)

    def inside(self, value: float) -> bool:
        """Say whether a value is on the axis."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Curve:
    """A named line; `style` from 0 is its colour and dashes."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int


@dataclass(frozen=True)
class Frame:
    """The size of a chart and its margins, in pixels of its own grid."""

    width: int
    height: int
    left: int = 46
    right: int = 22
    top: int = 8
    bottom: int = 40

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return where a point lies whose coordinates are shares of the axes."""
        across = self.width - self.left - self.right
        up = self.height - self.top - self.bottom
        return round(self.left + x * across, 1), round(self.top + (1 - y) * up, 1)


FRAMES = {"large": Frame(720, 360, left=64), "small": Frame(300, 200)}


def chart(
    curves: Sequence[Curve],
    x: Axis,
    y: Axis,
    *,
    says: str,
    size: str = "large",
    rule: tuple[str, float] | None = None,
    dots: bool = False,
) -> str:
    """Return the markup of a chart; all text is escaped.

    says: what it shows, for who cannot see it. rule: the axis ("x" or "y") and the value of a line to
    compare with. Points off the axes are left out.
    """
    frame = FRAMES[size]
    lines = [_ticks(frame, x, across=True), _ticks(frame, y, across=False)]
    lines.append(_names(frame, x.name, y.name if size == "large" else ""))
    if rule:
        name, value = rule
        ends = (
            [(x.along(value), 0.0), (x.along(value), 1.0)]
            if name == "x"
            else [(0.0, y.along(value)), (1.0, y.along(value))]
        )
        lines.append(_line([frame.place(*end) for end in ends], "rule"))
    for curve in reversed(curves):
        points = [
            frame.place(x.along(across), y.along(up))
            for across, up in curve.points
            if x.inside(across) and y.inside(up)
        ]
        kind = f"curve s{curve.style % STYLES}"
        lines.append(_line(points, kind))
        if dots:
            lines += [f'<circle class="{kind}" cx="{a}" cy="{b}" r="3"/>' for a, b in points]
    return (
        f'<svg class="{size}" viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-label="{escape(says)}">'
        f"{''.join(lines)}</svg>"
    )


def legend(names: Sequence[str]) -> str:
    """Return the names of curves with the line that each is drawn with, in their order."""
    items = (
        f'<li><svg viewBox="0 0 30 8" aria-hidden="true">{_line([(1, 4), (29, 4)], f"curve s{i}")}'
        f"</svg>{escape(name)}</li>"
        for i, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _ticks(frame: Frame, axis: Axis, *, across: bool) -> str:
    parts = []
    for value, name in axis.ticks:
        at = axis.along(value)
        start = frame.place(at, 0) if across else frame.place(0, at)
        end = frame.place(at, 1) if across else frame.place(1, at)
        parts.append(_line([start, end], "grid"))
        dx, dy, anchor = (0, 16, "middle") if across else (-7, 4, "end")
        parts.append(_text(start[0] + dx, start[1] + dy, name, anchor))
    return "".join(parts)


def _names(frame: Frame, x: str, y: str) -> str:
    """Return the names of the axes; small charts leave that of `y` to the text above them."""
    across, bottom = frame.place(0.5, 0)
    up = frame.place(0, 0.5)[1]
    return _text(across, bottom + 33, x, "middle") + (
        _text(14, up, y, "middle", f' transform="rotate(-90 14 {up})"') if y else ""
    )


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _line(points: Sequence[tuple[float, float]], kind: str) -> str:
    path = " ".join(f"{a:g},{b:g}" for a, b in points)
    return f'<polyline class="{kind}" points="{path}"/>' if points else ""


CHART_STYLE = """
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11px; }
@media (max-width: 40rem) { svg.large text { font-size: 17px; }
  svg.large text[transform] { display: none; } }
svg .grid { stroke: var(--faint); stroke-width: 1; }
svg .rule { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 2 3; }
svg .curve { fill: none; stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }
svg circle.curve { fill: var(--paper); stroke-dasharray: none; }
svg .s0 { stroke: var(--own); stroke-width: 2.6; }
svg .s1 { stroke: var(--own); stroke-width: 2.2; stroke-dasharray: 6 4; }
svg .s2 { stroke: var(--target); }
svg .s3 { stroke: var(--opposite); stroke-dasharray: 9 3 2 3; }
svg .s4 { stroke: var(--control); }
svg .s5 { stroke: var(--ink); stroke-dasharray: 1 4; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0;
  margin: .4rem 0 .6rem; font-size: .85rem; }
.legend li { display: flex; align-items: center; gap: .45rem; overflow-wrap: anywhere; }
.legend svg { width: 30px; flex: none; }
.many { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr));
  gap: 1rem 1.2rem; margin-top: 1rem; }
.many h3 { font-size: .85rem; font-weight: 600; margin: 0 0 .2rem; overflow-wrap: anywhere; }
"""
