"""A `Reading` as one page for people: drawings, what they mean, and the numbers, in a single file.

The page loads nothing: pictures are embedded, there is no script, and its own policy forbids both.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from defense.offline.page import DARK, LIGHT, Palette, definitions, document, table
from defense.offline.reading import EXAMPLES, NEAR_ZERO, Course, Reading, Unit
from defense.offline.reading_figures import (
    draw_course,
    draw_separability,
    draw_similarity,
    draw_site_similarity,
    draw_sparsity,
)

PAGE = "index.html"
THUMBNAIL = 96
"""Pixels of the longer side that pictures are shrunk to; smaller ones are kept as they are."""
ALL_OPEN = 12
"""Up to so many classes the units of every class are shown without a click."""
FEW = 30
"""Below so many images or pairs the page says that quartiles are rough."""


@dataclass(frozen=True)
class Drawing:
    """A figure of the page: its file name, its heading, how to read it, and what it shows in words."""

    name: str
    title: str
    text: str
    alt: str
    draw: Callable[[Reading, Palette], bytes]


def write_page(reading: Reading, folder: Path) -> Path:
    """Write `index.html` and its figures as PNG files, light and dark; return the page.

    The page is complete without the files beside it. ConfigError where matplotlib is missing.
    """
    drawings = _drawings(reading)
    files = {
        file_name: drawing.draw(reading, palette)
        for drawing in drawings
        for palette, file_name in zip((LIGHT, DARK), _files(drawing), strict=True)
    }
    page = _page(reading, drawings, files)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / PAGE).write_text(page, encoding="utf-8")
    return folder / PAGE


def _files(drawing: Drawing) -> tuple[str, str]:
    return f"{drawing.name}.png", f"{drawing.name}-dark.png"


def _drawings(reading: Reading) -> list[Drawing]:
    classes = len(reading.class_names)
    chance = f"{-1 / (classes - 1):.2f}".replace("-", "\N{MINUS SIGN}")
    best = max(range(len(reading.separability)), key=lambda site: reading.separability[site])
    best_name = reading.site_names[best]
    return [
        *([_course(reading, reading.course)] if reading.course else []),
        Drawing(
            "separability",
            "Where classes come apart",
            "For every site: the share of images whose path lies nearest to the mean path of their own "
            "class, taken without the image itself. The dashed line is the same with shuffled labels: "
            "what the number of classes and columns gives for nothing. Height above it is what the "
            "path of that site tells about the class." + _few(len(reading.labels), "images"),
            f"Line chart over {len(reading.separability)} sites; the highest share is "
            f"{reading.separability[best]:.0%} at {best_name}.",
            draw_separability,
        ),
        Drawing(
            "similarity",
            "Which classes share a path",
            "Cosine between the mean paths of two classes, after the mean of all classes was taken "
            f"off, averaged over sites. With {classes} classes the entries beside the diagonal average "
            f"about {chance}, so anything above that is more alike than usual. The diagonal is 1 by "
            f"definition. {_alike(reading)} {_class_sizes(reading)}",
            f"Matrix of {classes} by {classes} classes. {_alike(reading)}",
            draw_similarity,
        ),
        Drawing(
            "similarity-sites",
            "The same, site by site",
            "One matrix per site, first to last, classes in the same order as above. Blocks that form "
            "with depth are groups of classes that the network treats alike.",
            f"{len(reading.site_names)} small matrices with one row and one column per class.",
            draw_site_similarity,
        ),
        Drawing(
            "sparsity",
            "How much of every layer takes part",
            "Near zero: the share of columns below "
            f"{NEAR_ZERO:.0%} of the site's root mean square. Taking part: the effective number of "
            "columns, (Σ|x|)² / Σx², over all columns; 1 means that all are equally large. Lines are "
            f"medians over {len(reading.labels)} images, bands the middle half of them.",
            "Line chart over sites of two shares of columns; the numbers are in the table below.",
            draw_sparsity,
        ),
    ]


def _course(reading: Reading, course: Course) -> Drawing:
    if course.crossing is None:
        crossing = "The attacked images never stay nearer to the class that they are taken for."
    else:
        name = reading.site_names[course.crossing]
        crossing = (
            f"From {name} on (thin vertical line) attacked images are, by their medians, nearer to "
            "the class that they are taken for than to themselves before the attack."
        )
    text = (
        "Cosine between paths after the mean path of all classes was taken off; lines are medians, "
        f"bands the middle half of {course.pairs} images: those that the network got right and, "
        f"attacked, wrong, of {reading.attacked} that were attacked. {crossing} The dashed line is "
        "what an honest image reaches with the mean of its own class, the dotted one how near the "
        "image was to the other class to begin with: only what rises above the dotted line is the "
        f"attack's doing.{_few(course.pairs, 'pairs')}"
    )
    alt = f"Line chart over {course.control.shape[1]} sites with four curves. {crossing}"
    return Drawing("course", "The course of attacked images", text, alt, draw_course)


def _few(count: int, what: str) -> str:
    return f" Only {count} {what}: read the shape, not the digits." if count < FEW else ""


def _class_sizes(reading: Reading) -> str:
    sizes = reading.labels.bincount()
    low, high = int(sizes.min()), int(sizes.max())
    each = f"{low}" if low == high else f"{low} to {high}"
    rough = "; means of so few images are rough" if low < FEW else ""
    return f"Each mean is over {each} images{rough}."


def _alike(reading: Reading) -> str:
    """Name the two classes whose paths are most alike."""
    table = reading.whole.clone().fill_diagonal_(-2)
    first, second = divmod(int(table.argmax()), len(table))
    names = reading.class_names
    return f"Most alike are {names[first]} and {names[second]} ({table.max().item():.2f})."


def _page(reading: Reading, drawings: Sequence[Drawing], files: dict[str, bytes]) -> str:
    figures = "\n".join(_figure(drawing, files) for drawing in drawings)
    body = f"""{_header(reading)}
<main>
{figures}
{_units(reading)}
{_table(reading)}
</main>
<footer><p>Written by PathGuard. A reading describes these images and this network; it is no test of
a guard.</p></footer>"""
    return document(f"PathGuard: reading of {reading.router} paths", body, _STYLE)


def _header(reading: Reading) -> str:
    facts = {
        "router": reading.router,
        "images": f"{len(reading.labels)}",
        "classes": f"{len(reading.class_names)}",
        "sites": f"{len(reading.site_names)}",
        "path columns": f"{reading.layout.length}",
        "network right": f"{reading.accuracy:.1%}",
        "attacked": f"{reading.attacked}",
        "seed": f"{reading.seed}",
    }
    note = ""
    if reading.course is None:
        note = (
            f"<p class='note'>None of the {reading.attacked} attacked images changed the network's "
            "answer, so there is no course to show.</p>"
            if reading.attacked
            else "<p class='note'>There are no attacked images to follow, so the course of attacked "
            "images is left out.</p>"
        )
    return f"""<header>
<h1>What the paths say</h1>
<p>A path is what the channels of the network's sites did for one image. Here the paths of labelled
images are read: which classes share them, what an attack does to them on the way, and which channels
speak for a class.</p>
{definitions(facts)}{note}
</header>"""


def _figure(drawing: Drawing, files: dict[str, bytes]) -> str:
    light, dark = (_data_uri(files[name]) for name in _files(drawing))
    return f"""<section id="{drawing.name}">
<h2>{escape(drawing.title)}</h2>
<figure>
<picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">
<img src="{light}" alt="{escape(drawing.alt)}"></picture>
<figcaption>{escape(drawing.text)}</figcaption>
</figure>
</section>"""


def _units(reading: Reading) -> str:
    pictures = _thumbnails(reading)
    opened = " open" if len(reading.class_names) <= ALL_OPEN else ""
    parts = []
    for label, (name, units) in enumerate(zip(reading.class_names, reading.units, strict=True)):
        rows = "".join(f"<li>{_unit(reading, label, unit, pictures)}</li>" for unit in units)
        body = f"<ol>{rows}</ol>" if units else "<p>No channel stands out for this class.</p>"
        parts.append(f"<details{opened}><summary>{escape(name)}</summary>{body}</details>")
    return f"""<section id="units">
<h2>The channels that speak for a class</h2>
<p>Per class, the channels whose mean over the class lies furthest above that over the other images,
in standard deviations over all images, and the {EXAMPLES} images that excite each most.
Images of the class itself have a <span class="own">coloured frame</span>. Found and shown on the same
{len(reading.labels)} images, so the strongest effects are flattered by having been picked.</p>
{"".join(parts)}
</section>"""


def _unit(reading: Reading, label: int, unit: Unit, pictures: dict[int, str]) -> str:
    classes = [int(reading.labels[index]) for index in unit.examples]
    shown = "".join(
        f'<img class="{"own" if found == label else "other"}" src="{pictures[index]}" '
        f'alt="{escape(reading.class_names[found])}" title="{escape(reading.class_names[found])}">'
        for index, found in zip(unit.examples, classes, strict=True)
    )
    return (
        f"<p><b>{escape(reading.site_names[unit.site])}</b> channel {unit.channel} "
        f"<span>{escape(unit.statistic)}, +{unit.effect:.2f} sd, {classes.count(label)} of "
        f"{len(classes)} images are of this class</span></p><div class='strip'>{shown}</div>"
    )


def _table(reading: Reading) -> str:
    """Write out the medians that the drawings show."""
    heads = ["columns", "own class nearest", "shuffled", "near zero", "effective columns"]
    columns = [
        [f"{c.stop - c.start}" for c in reading.layout.columns],
        [f"{value:.3f}" for value in reading.separability],
        [f"{value:.3f}" for value in reading.shuffled],
        [f"{value:.3f}" for value in reading.sparsity.near_zero[1].tolist()],
        [f"{value:.1f}" for value in reading.sparsity.effective[1].tolist()],
    ]
    course = reading.course
    if course is not None:
        heads += ["attacked to itself", "attacked to target", "control", "before to target"]
        for curve in (course.to_clean, course.to_target, course.control, course.before):
            columns.append([f"{value:.3f}" for value in curve[1].tolist()])
    rows = [
        [name, *(value.replace("-", "\N{MINUS SIGN}") for value in values)]
        for name, *values in zip(reading.site_names, *columns, strict=True)
    ]
    numbers = table(
        "Medians over images or pairs; quartiles are the bands of the figures above.",
        ["site", *heads],
        rows,
    )
    return f"""<section id="numbers">
<h2>The numbers, site by site</h2>
{numbers}
</section>"""


def _thumbnails(reading: Reading) -> dict[int, str]:
    """Return every picture that a unit shows, by its index, as a data URI."""
    wanted = {index for units in reading.units for unit in units for index in unit.examples}
    return {index: _thumbnail(reading, index) for index in sorted(wanted)}


def _thumbnail(reading: Reading, index: int) -> str:
    image = Image.fromarray(reading.pictures[index].numpy())
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return _data_uri(buffer.getvalue())


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


_STYLE = """
figure img { display: block; max-width: 100%; height: auto; max-height: 44rem; }
#course img, #separability img, #sparsity img { width: 100%; }
#similarity img { width: min(100%, 36rem); }
ol { list-style: none; margin: .4rem 0 .6rem; padding: 0; display: grid; gap: .7rem; }
li p { margin: 0 0 .25rem; font-size: .88rem; }
li p span { color: var(--soft); margin-left: .4rem; }
.strip { display: flex; flex-wrap: wrap; gap: .3rem; }
.strip img { width: 60px; height: 60px; object-fit: contain; image-rendering: pixelated;
  border: 2px solid var(--faint); border-radius: 3px; }
.strip img.own { border-color: var(--own); }
span.own { border: 2px solid var(--own); border-radius: 3px; padding: 0 .25rem; }
"""
