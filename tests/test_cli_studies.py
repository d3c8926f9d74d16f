"""The commands of studies: paths drawn, routers compared, units measured, networks packed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from defense.archive import read_archive
from defense.offline import comparison, costs
from defense.offline.comparison.rows import Entry
from defense.offline.demo.digits import DigitFolders
from tests.cli import Run, archive, digits, guard, run, tiny_card

__all__ = ["archive", "digits", "guard", "run", "tiny_card"]  # fixtures that pytest finds here


def test_the_paths_of_a_guard_become_a_page(
    run: Run, archive: Path, guard: Path, digits: DigitFolders, tmp_path: Path
) -> None:
    code, _, said = run(
        *("inspect", guard, "--paths", tmp_path / "page", "--archive", archive),
        *("--data", digits.test, "--limit", 120, "--attack", "fgsm", "--eps", 0.1),
    )
    assert code == 0, said
    page = (tmp_path / "page" / "index.html").read_text()
    assert "activation" in page
    assert "http" not in page.split("<body")[1].replace("http-equiv", "")


def test_relative_paths_of_a_page_mean_what_they_say(
    run: Run, archive: Path, guard: Path, digits: DigitFolders, tmp_path: Path
) -> None:
    for name, target in (("guard", guard), ("digits.mar", archive), ("images", digits.test)):
        (tmp_path / name).symlink_to(target)
    words = ("--archive", "digits.mar", "--data", "images", "--limit", 60, "--attack", "fgsm")
    code, _, said = run("inspect", "guard", "--paths", "page", *words)
    assert code == 0, said
    assert (tmp_path / "page" / "index.html").exists()


def test_the_paths_of_a_router_for_studies_become_a_page_without_a_guard(
    run: Run, archive: Path, digits: DigitFolders, tmp_path: Path
) -> None:
    code, _, said = run(
        *("inspect", "--router", "contribution", "--paths", tmp_path / "page"),
        *("--archive", archive, "--data", digits.test, "--limit", 60, "--eps", 0.1),
    )
    assert code == 0, said
    assert "contribution" in (tmp_path / "page" / "index.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("inspect",), "there is nothing to inspect; name a guard folder"),
        (("inspect", "--paths", "page"), "paths are those of images in an archive; add --archive"),
        (
            ("compare", "--data", "x", "--backbone", "plain"),
            "--backbone takes NAME=CARD, such as plain=cifar10.json, not 'plain'",
        ),
    ],
)
def test_what_is_missing_is_named(run: Run, words: tuple[str, ...], message: str) -> None:
    code, _, said = run(*words)
    assert code == 1
    assert message in said
    assert "Traceback" not in said


def test_images_without_classes_have_no_paths_to_compare(
    run: Run, archive: Path, digits: DigitFolders, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted(digits.test.glob("*/*.png"))[:20]:
        shutil.copy(path, flat)
    code, _, said = run("inspect", "--paths", "page", "--archive", archive, "--data", flat)
    assert code == 1
    assert "these images have no classes that the network knows; give one folder per class" in said


def test_a_network_is_packed_and_the_next_step_is_named(
    run: Run, tiny_card: Path, tmp_path: Path
) -> None:
    code, _, said = run("pack", tiny_card, "--out", tmp_path / "tiny.mar")
    assert code == 0
    assert "Next: pathguard fit --archive" in said
    assert read_archive(tmp_path / "tiny.mar").model_name == "tiny"


def test_a_comparison_and_the_units_are_written_as_tables(
    run: Run, tiny_card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "ENTRIES", (Entry("activation", note="mean: the control"),))
    monkeypatch.setattr(comparison, "PATHWAY_ROUTERS", ())
    monkeypatch.setattr(costs, "ROUNDS", 1)
    backbone = ("--data", tiny_card.parent / "data", "--backbone", f"plain={tiny_card}")
    code, _, said = run("compare", *backbone, "--images", 30)
    assert code == 0, said
    assert "activation (mean: the control)" in (tmp_path / "benchmarks/routers.md").read_text()
    assert (tmp_path / "benchmarks/routers.json").exists()
    code, _, said = run("units", *backbone, "--images", 40)
    assert code == 0, said
    assert "| plain |" in (tmp_path / "benchmarks/units.md").read_text()


def test_a_part_of_the_images_is_taken_by_number(
    run: Run, archive: Path, digits: DigitFolders
) -> None:
    common = ("fit", "--archive", archive, "--data", digits.fit, "--out", "guard")
    code, _, said = run(*common, "--part", "half")
    assert code == 1
    assert (
        "--part takes one of several parts such as 1/2, or some such as 1-4/5, not 'half'" in said
    )
    code, _, said = run(*common, "--part", "1/2")
    assert code == 0
    assert "Guard written to guard" in said
