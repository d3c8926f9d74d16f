"""The page holds everything, loads nothing, and says what it may say."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from defense.errors import ConfigError
from defense.offline.page import DARK, LIGHT
from defense.offline.reading import (
    Course,
    Reading,
    follow,
    separability,
    similarity,
    sparsity,
    top_units,
)
from defense.offline.reading_figures import (
    draw_course,
    draw_similarity,
    draw_site_similarity,
)
from defense.offline.reading_page import write_page
from defense.types import PathLayout, Site
from tests.synthetic import CLASSES, LAYOUT, clean_runs, shifted_runs

NAMES = (
    "cat",
    "<script>alert('x')</script>",
    "$a & $b",
    "a name that is much longer than its cell",
)
FIGURES = ("course", "separability", "similarity", "similarity-sites", "sparsity")


def course() -> Course:
    clean, labels = clean_runs(60, seed=1)
    found = follow(clean, shifted_runs(60, seed=2), labels, torch.arange(60), LAYOUT)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def reading() -> Reading:
    clean, labels = clean_runs(60, seed=1)
    pictures = torch.randint(
        0, 256, (60, 5, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return Reading(
        router="activation",
        layout=LAYOUT,
        class_names=NAMES,
        labels=labels,
        pictures=pictures,
        accuracy=0.9,
        similarity=similarity(clean.path, labels, LAYOUT),
        separability=separability(clean.path, labels, LAYOUT),
        shuffled=(0.25, 0.2, 0.3),
        sparsity=sparsity(clean.path, LAYOUT),
        units=top_units(clean.path, labels, LAYOUT),
        attacked=54,
        course=course(),
        seed=7,
    )


@pytest.fixture(scope="module")
def page(reading: Reading, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(reading, tmp_path_factory.mktemp("reading") / "new" / "folder")


class Parsed(HTMLParser):
    """Keeps the tags of a page, and complains where they do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_the_page_is_one_file_that_loads_nothing(page: Path) -> None:
    text = page.read_text()
    assert page.name == "index.html"
    assert "://" not in text
    assert "url(" not in text
    parsed = Parsed(text)
    assert parsed.open == []
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in parsed.tags}
    sources = [a["src"] for a in parsed.attributes("img")]
    sources += [a["srcset"] for a in parsed.attributes("source")]
    assert all(source and source.startswith("data:image/png;base64,") for source in sources)


def test_the_page_holds_every_figure_light_and_dark(page: Path) -> None:
    text = page.read_text()
    expected = {f"{name}{kind}.png" for name in FIGURES for kind in ("", "-dark")}
    assert {path.name for path in page.parent.iterdir()} == expected | {"index.html"}
    for name in expected:
        data = (page.parent / name).read_bytes()
        assert base64.b64encode(data).decode() in text, name
        with Image.open(io.BytesIO(data)) as image:
            corner = image.convert("RGB").getpixel((0, 0))
        paper = DARK.paper if "dark" in name else LIGHT.paper
        assert corner == tuple(bytes.fromhex(paper[1:]))


def test_names_are_escaped_wherever_they_stand(page: Path) -> None:
    text = page.read_text()
    assert "<script" not in text
    assert "<summary>&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;</summary>" in text
    assert "$a &amp; $b" in text


def test_every_image_says_what_it_shows_and_every_table_what_it_holds(page: Path) -> None:
    parsed = Parsed(page.read_text())
    assert all(attrs.get("alt") for attrs in parsed.attributes("img"))
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("h1") == 1
    assert tags.count("caption") == tags.count("table") == 1
    assert tags.count("figcaption") == tags.count("figure") == len(FIGURES)
    assert all(attrs.get("scope") for attrs in parsed.attributes("th"))


def test_thumbnails_are_the_pictures_of_the_units(page: Path, reading: Reading) -> None:
    parsed = Parsed(page.read_text())
    thumbs = [a for a in parsed.attributes("img") if a.get("class") in ("own", "other")]
    units = [(c, unit) for c, units in enumerate(reading.units) for unit in units]
    wanted = [(c, index) for c, unit in units for index in unit.examples]
    assert len(thumbs) == len(wanted) > 0
    for thumb, (label, index) in zip(thumbs, wanted, strict=True):
        assert thumb["alt"] == NAMES[int(reading.labels[index])]
        assert thumb["class"] == ("own" if int(reading.labels[index]) == label else "other")
    data = base64.b64decode((thumbs[0]["src"] or "").split(",")[1])
    with Image.open(io.BytesIO(data)) as image:
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    assert torch.equal(pixels.view(5, 6, 3), reading.pictures[wanted[0][1]])


def test_the_numbers_of_the_table_are_those_of_the_reading(page: Path, reading: Reading) -> None:
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', page.read_text())
    assert [name for name, _ in rows] == ["a", "b", "c"]
    assert reading.course is not None
    for site, (_, cells) in enumerate(rows):
        values = re.findall("<td>(.*?)</td>", cells)
        numbers = [float(value.replace("\N{MINUS SIGN}", "-")) for value in values]
        expected = [
            LAYOUT.sites[site].channels,
            reading.separability[site],
            reading.shuffled[site],
            float(reading.sparsity.near_zero[1, site]),
            float(reading.sparsity.effective[1, site]),
            float(reading.course.to_clean[1, site]),
            float(reading.course.to_target[1, site]),
            float(reading.course.control[1, site]),
            float(reading.course.before[1, site]),
        ]
        assert numbers == pytest.approx(expected, abs=0.051)
        assert numbers[5:] == pytest.approx(expected[5:], abs=0.00051)


def test_the_page_says_how_many_images_stand_behind_it(page: Path, reading: Reading) -> None:
    text = page.read_text()
    assert reading.course is not None
    assert f"the middle half of {reading.course.pairs} images" in text
    assert "of 54 that were attacked" in text
    assert "means of so few images are rough" in text


@pytest.mark.parametrize(
    ("attacked", "sentence"),
    [(54, "None of the 54 attacked images changed"), (0, "There are no attacked images to follow")],
)
def test_without_a_course_the_page_says_why(
    reading: Reading, tmp_path: Path, attacked: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("separability", "similarity", "site_similarity", "sparsity"):
        monkeypatch.setattr(f"defense.offline.reading_page.draw_{name}", lambda *_: b"drawn")
    page = write_page(dataclasses.replace(reading, course=None, attacked=attacked), tmp_path)
    assert sentence in page.read_text()
    assert "attacked to target" not in page.read_text()
    assert not (tmp_path / "course.png").exists()


def test_a_course_that_never_crosses_is_said_and_drawn_so(
    reading: Reading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("separability", "similarity", "site_similarity", "sparsity"):
        monkeypatch.setattr(f"defense.offline.reading_page.draw_{name}", lambda *_: b"drawn")
    assert reading.course is not None
    faithful = dataclasses.replace(reading.course, to_clean=reading.course.to_target + 0.1)
    page = write_page(dataclasses.replace(reading, course=faithful), tmp_path)
    assert "never stay nearer to the class that they are taken for" in page.read_text()
    assert "thin vertical line" not in page.read_text()


def test_sites_that_fill_no_row_are_all_drawn(reading: Reading) -> None:
    sites = tuple(Site(f"layer{i}", 0, 4, 1) for i in range(7))
    deep = dataclasses.replace(
        reading,
        layout=PathLayout(sites, ("mean",)),
        similarity=torch.eye(CLASSES).repeat(7, 1, 1),
    )
    with Image.open(io.BytesIO(draw_site_similarity(deep, LIGHT))) as image:
        second_row = image.convert("L").crop((0, image.height // 2, image.width // 6, image.height))
    assert min(second_row.tobytes()) < 200


def test_many_classes_are_drawn_without_numbers_and_with_fewer_names(reading: Reading) -> None:
    count = 70
    table = torch.eye(count).repeat(3, 1, 1)
    many = dataclasses.replace(
        reading, class_names=tuple(f"class {i}" for i in range(count)), similarity=table
    )
    with Image.open(io.BytesIO(draw_similarity(many, DARK))) as image:
        assert max(image.size) < 2000


def test_the_same_reading_draws_the_same_and_no_setting_of_the_process_changes(
    reading: Reading,
) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    assert draw_course(reading, DARK) == draw_course(reading, DARK)
    assert dict(matplotlib.rcParams) == before


def test_a_missing_extra_is_an_error_that_says_how_to_install_it(
    reading: Reading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"extra 'report'; pip install 'pathguard.report.'"):
        write_page(reading, tmp_path / "none")
    assert not (tmp_path / "none").exists()
