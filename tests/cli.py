"""What tests of commands share: a runner, and archives and guards that were made by commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from defense.cli.app import main
from defense.offline.backbones import train_backbone
from defense.offline.demo.digits import DigitFolders, pack_digits, train_digits, write_digits
from defense.offline.methods import METHODS
from defense.offline.progress import Silent
from tests.coloured import SETTINGS, TINY, coloured_images, write_folder

Run = Callable[..., tuple[int, str, str]]
ATTACKED = ("--attacks", "fgsm", "--eps", "0.1")
"""What the guard for the digits learns from."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> DigitFolders:
    return write_digits(tmp_path_factory.mktemp("cli"), seed=0)


@pytest.fixture(scope="module")
def archive(digits: DigitFolders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "digits.mar"
    pack_digits(train_digits(digits.train, seed=0, progress=Silent()), path)
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `pathguard` with arguments, in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pathguard", *map(str, arguments)])
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        assert code is None or isinstance(code, int)
        return code or 0, printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def guard(archive: Path, digits: DigitFolders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard") / "guard"
    with pytest.MonkeyPatch.context() as patch:
        words = ["pathguard", "fit", "--archive", archive, "--data", digits.fit, *ATTACKED]
        patch.setattr(sys, "argv", [*map(str, words), "--out", str(folder)])
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    return folder


@pytest.fixture(scope="module")
def tiny_card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The card of a network that knows the tiny coloured images in `data` beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    for split, count in (("train", 120), ("test", 90)):
        write_folder(folder / "data", split, coloured_images(count))
    train_backbone(
        folder / "data",
        folder / "tiny.safetensors",
        method=METHODS["plain"],
        architecture=TINY,
        settings=replace(SETTINGS, epochs=6, average_decay=0.5, small_epochs=0),
        checkpoint=folder / "checkpoint",
        command="",
    )
    return folder / "tiny.json"
