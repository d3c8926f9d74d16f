"""guard.yaml while the server runs: valid edits are applied, invalid ones leave everything as it was."""

from __future__ import annotations

import logging
import os
import re
import threading
from pathlib import Path

import pytest

from defense import live
from defense.config import Settings
from defense.errors import CalibrationError, ConfigError
from defense.live import ConfigWatcher, existing


class Watched:
    """A configuration file, a watcher on it, and what the watcher did."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.applied: list[str] = []
        self.reports: list[str] = []
        self.reported = threading.Event()
        self.refuse: Exception | None = None
        self.write("enforce")
        self.kept = path.with_name("kept.yaml")
        self.watcher = ConfigWatcher(path, self.kept, self.apply, self.report)

    def write(self, mode: str) -> None:
        """Replace the file as editors do, with another modification time than before."""
        fresh = self.path.with_suffix(".new")
        fresh.write_text(f"defaults: {{mode: {mode}}}")
        fresh.replace(self.path)

    def look(self) -> None:
        """Look twice, as an edit has to be found twice."""
        self.watcher.poll()
        self.watcher.poll()

    def apply(self, settings: Settings) -> None:
        if self.refuse:
            raise self.refuse
        self.applied.append(settings.defaults.mode)

    def report(self, result: str) -> None:
        self.reports.append(result)
        self.reported.set()


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "guard.yaml")


def test_a_file_that_does_not_change_is_left_alone(watched: Watched) -> None:
    watched.look()
    assert (watched.applied, watched.reports) == ([], [])


def test_an_edit_is_applied_once(watched: Watched) -> None:
    watched.write("shadow")
    watched.look()
    watched.look()
    assert (watched.applied, watched.reports) == (["shadow"], ["applied"])


def test_an_invalid_edit_is_not_applied_and_is_reported_with_one_sentence(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    watched.write("of")
    with caplog.at_level(logging.ERROR, logger="defense.live"):
        watched.look()
        watched.look()
    assert (watched.applied, watched.reports) == ([], ["invalid"])
    assert len(caplog.messages) == 1
    assert "the settings in force stay: " in caplog.text
    assert "'defaults.mode' is not valid (got 'of')" in caplog.text


@pytest.mark.parametrize("text", ["version: 2001-99-99", "x: !!int a", "\x00", "[" * 1000])
def test_an_edit_that_yaml_stumbles_over_is_invalid_and_the_next_one_counts(
    watched: Watched, text: str
) -> None:
    watched.path.write_text(text)
    watched.look()
    watched.write("flag")
    watched.look()
    assert (watched.applied, watched.reports) == (["flag"], ["invalid", "applied"])


@pytest.mark.parametrize("error", [CalibrationError("too few images"), ZeroDivisionError()])
def test_an_edit_that_cannot_be_applied_is_invalid_and_the_next_one_counts(
    watched: Watched, error: Exception
) -> None:
    watched.refuse = error
    watched.write("flag")
    watched.look()
    watched.refuse = None
    watched.write("shadow")
    watched.look()
    assert (watched.applied, watched.reports) == (["shadow"], ["invalid", "applied"])


def test_a_file_that_disappears_is_invalid_and_its_return_is_an_edit(watched: Watched) -> None:
    watched.path.unlink()
    watched.look()
    watched.look()
    watched.write("flag")
    watched.look()
    assert (watched.applied, watched.reports) == (["flag"], ["invalid", "applied"])


def test_an_edit_of_the_same_length_at_the_same_second_is_seen(watched: Watched) -> None:
    status = watched.path.stat()
    watched.write("shadow ")
    assert watched.path.stat().st_size == status.st_size
    os.utime(watched.path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    watched.look()
    assert watched.applied == ["shadow"]


def test_a_running_watcher_sees_an_edit_and_stops_when_told(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "POLL_SECONDS", 0.01)
    watched.watcher.start()
    try:
        watched.write("flag")
        assert watched.reported.wait(timeout=30)
    finally:
        watched.watcher.stop()
    assert watched.applied == ["flag"]
    assert "pathguard-config" not in [thread.name for thread in threading.enumerate()]


def test_an_edit_reaches_a_worker_within_two_seconds_although_it_has_to_be_found_twice() -> None:
    assert 3 * live.POLL_SECONDS < 2


def test_a_file_that_is_being_written_is_left_alone_until_it_is_whole(watched: Watched) -> None:
    for mode in ("off", "shadow", "flag"):
        watched.write(mode)
        watched.watcher.poll()
    assert watched.applied == []
    watched.watcher.poll()
    assert watched.applied == ["flag"]


def test_an_emptied_file_does_not_bring_the_defaults_back(watched: Watched) -> None:
    watched.path.write_text(" \n")
    watched.look()
    assert (watched.applied, watched.reports) == ([], ["invalid"])


def test_an_emptied_file_is_named(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    watched.path.write_text("")
    watched.look()
    assert "is empty; write 'version: 1' for the defaults" in caplog.text


@pytest.mark.parametrize("broken", ["defaults: [", ""])
def test_a_worker_begins_with_what_was_in_force_where_the_file_is_broken_since(
    watched: Watched, broken: str
) -> None:
    watched.watcher.begin(watched.apply)
    watched.write("flag")
    watched.look()
    watched.path.write_text(broken)
    again = ConfigWatcher(watched.path, watched.kept, watched.apply, watched.report)

    again.begin(watched.apply)

    assert watched.applied == ["enforce", "flag", "flag"]
    assert watched.reports == ["applied", "invalid"]


def test_a_worker_does_not_begin_with_a_broken_file_where_nothing_was_in_force(
    watched: Watched,
) -> None:
    watched.path.write_text("defaults: [")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        watched.watcher.begin(watched.apply)


def test_an_edit_is_applied_where_it_cannot_be_kept(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    watched.kept.mkdir()
    watched.write("flag")
    watched.look()
    assert (watched.applied, watched.reports) == (["flag"], ["applied"])
    assert "could not be kept for fresh workers" in caplog.text


def test_a_configuration_file_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "guard.yaml"
    with pytest.raises(
        ConfigError, match=rf"no configuration file {re.escape(str(path))}; name an"
    ):
        existing(path)
    path.touch()
    assert existing(path) == path
