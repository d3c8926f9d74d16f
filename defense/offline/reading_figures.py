"""Drawings of a `Reading`, each as PNG bytes in a light or a dark palette.

matplotlib is imported where it is used (extra 'report') and only through its objects: no pyplot, no
settings of the process.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from defense.errors import ConfigError
from defense.offline.page import LIGHT, Palette
from defense.offline.reading import Reading

DPI = 150
NAME_LENGTH = 22
MOST_TICKS = 30
MOST_VALUES = 12
"""Up to so many classes the similarity matrix has its numbers written in."""
GRID_COLUMNS = 6


def draw_course(reading: Reading, palette: Palette) -> bytes:
    """Draw the four curves of `reading.course`, which must be there, with their quartiles."""
    course = reading.course
    assert course is not None, "a reading without attacks has no course to draw"
    figure, axes = _site_axes(reading, palette, "similarity of paths (cosine)")
    curves = (
        ("attacked image to the image before the attack", course.to_clean, palette.own, "-o", 0.18),
        (
            "attacked image to the class it is taken for",
            course.to_target,
            palette.target,
            "-D",
            0.18,
        ),
        ("before the attack to its own class (control)", course.control, palette.control, "--", 0),
        ("before the attack to the class it is taken for", course.before, palette.target, ":", 0),
    )
    for label, curve, colour, style, shaded in curves:
        low, middle, high = curve.tolist()
        axes.fill_between(range(len(middle)), low, high, color=colour, alpha=shaded, linewidth=0)
        axes.plot(middle, style, color=colour, label=label, markersize=4, linewidth=1.6)
    axes.axhline(0, color=palette.control, linewidth=0.6)
    if course.crossing is not None:
        axes.axvline(course.crossing - 0.5, color=palette.ink, linewidth=0.8, linestyle=(0, (2, 2)))
    return _png(figure, palette, legend_columns=2)


def draw_separability(reading: Reading, palette: Palette) -> bytes:
    """Draw how well every site tells the classes apart, beside shuffled labels."""
    figure, axes = _site_axes(reading, palette, "images nearest to their class", height=2.9)
    axes.plot(reading.separability, "-o", color=palette.own, markersize=4, label="labels")
    axes.plot(
        reading.shuffled,
        "--",
        color=palette.control,
        linewidth=1.2,
        label="shuffled labels (control)",
    )
    axes.set_ylim(0, 1.03)
    return _png(figure, palette, legend_columns=2)


def draw_sparsity(reading: Reading, palette: Palette) -> bytes:
    """Draw the share of columns near zero and the effective share of columns."""
    figure, axes = _site_axes(reading, palette, "share of the site's columns", height=2.9)
    widths = [c.stop - c.start for c in reading.layout.columns]
    effective = reading.sparsity.effective / reading.sparsity.effective.new_tensor(widths)
    for label, curve, colour, style in (
        ("taking part (effective number / columns)", effective, palette.own, "-o"),
        ("near zero", reading.sparsity.near_zero, palette.control, "--s"),
    ):
        low, middle, high = curve.tolist()
        axes.fill_between(range(len(middle)), low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(middle, style, color=colour, label=label, markersize=4, linewidth=1.6)
    axes.set_ylim(-0.02, 1.03)
    return _png(figure, palette, legend_columns=2)


def draw_similarity(reading: Reading, palette: Palette) -> bytes:
    """Draw the class-by-class similarity over the whole path."""
    count = len(reading.class_names)
    side = min(max(0.48 * count, 3.2), 8.0)
    figure = _figure(side + 1.6, side + 0.9, palette)
    axes = figure.subplots()
    image = _matrix(axes, reading.whole, palette)
    names = [_start(name) for name in reading.class_names]
    _ticks(axes.xaxis, names)
    _ticks(axes.yaxis, names)
    axes.tick_params(axis="x", labelrotation=50)
    _lean(axes)
    if count <= MOST_VALUES:
        _write_values(axes, image, reading.whole, palette)
    _colour_bar(figure, image, axes, palette)
    return _png(figure, palette)


def draw_site_similarity(reading: Reading, palette: Palette) -> bytes:
    """Draw one small class-by-class matrix per site, in the order of the sites."""
    count = len(reading.site_names)
    columns = min(count, GRID_COLUMNS)
    rows = -(-count // columns)
    figure = _figure(max(1.45 * columns + 0.9, 3.5), 1.65 * rows + 0.2, palette)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    for axes, name, values in zip(grid.flat, reading.site_names, reading.similarity, strict=False):
        image = _matrix(axes, values, palette)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(_plain(name, 20), fontsize=7, color=palette.ink)
    _colour_bar(figure, image, grid.ravel().tolist(), palette)
    return _png(figure, palette)


def _figure(width: float, height: float, palette: Palette) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "drawings need the extra 'report'; pip install 'pathguard[report]'"
        ) from error
    return Figure((width, height), layout="constrained", facecolor=palette.paper)


def _site_axes(
    reading: Reading, palette: Palette, what: str, height: float = 3.6
) -> tuple[Any, Any]:
    """Return a figure and axes whose horizontal axis is the sites, first to last."""
    names = reading.site_names
    figure = _figure(min(max(0.42 * len(names) + 2.5, 7.0), 13.0), height, palette)
    axes = figure.subplots()
    _ticks(axes.xaxis, names)
    axes.tick_params(axis="x", labelrotation=50)
    _lean(axes)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylabel(what, fontsize=8, color=palette.ink)
    axes.grid(axis="y", color=palette.faint, linewidth=0.7)
    axes.set_axisbelow(True)
    _quiet(axes, palette)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _matrix(axes: Any, values: Tensor, palette: Palette) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list(
        "similarity", [palette.opposite, palette.paper, palette.own]
    )
    _quiet(axes, palette)
    return axes.imshow(values.tolist(), cmap=colours, vmin=-1, vmax=1)


def _write_values(axes: Any, image: Any, values: Tensor, palette: Palette) -> None:
    """Write every number into its cell, in whichever of ink and paper is easier to read there."""
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            red, green, blue, _ = image.cmap(image.norm(value))
            bright = 0.21 * red + 0.72 * green + 0.07 * blue > 0.5
            colour = palette.ink if bright == (palette is LIGHT) else palette.paper
            text = f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)


def _colour_bar(figure: Any, image: Any, axes: Any, palette: Palette) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=28, ticks=[-1, 0, 1])
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=palette.ink, labelsize=7, length=2)


def _quiet(axes: Any, palette: Palette) -> None:
    axes.set_facecolor(palette.paper)
    axes.tick_params(colors=palette.ink, labelsize=7, length=2)
    for spine in axes.spines.values():
        spine.set_color(palette.faint)


def _ticks(axis: Any, names: Sequence[str]) -> None:
    """Name positions 0, 1, ...; only every second, third, ... where they would not fit."""
    step = -(-len(names) // MOST_TICKS)
    axis.set_ticks(range(0, len(names), step), [_plain(name) for name in names[::step]])


def _lean(axes: Any) -> None:
    """Let slanted names end at their tick."""
    for label in axes.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")


def _plain(name: str, length: int = NAME_LENGTH) -> str:
    """Return a name that fits, its end kept as what tells sites apart; '$' starts no formula."""
    short = name if len(name) <= length else "…" + name[1 - length :].lstrip(".")
    return short.replace("$", r"\$")


def _start(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def _png(figure: Any, palette: Palette, legend_columns: int = 0) -> bytes:
    if legend_columns:
        legend = figure.legend(
            loc="outside upper left", ncols=legend_columns, fontsize=7.5, frameon=False
        )
        for text in legend.get_texts():
            text.set_color(palette.ink)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor=palette.paper)
    return buffer.getvalue()
