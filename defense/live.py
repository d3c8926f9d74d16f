"""`guard.yaml` while the server runs: an edit takes effect in every worker within two seconds."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from defense.config import Settings, parse_settings, read_content
from defense.errors import ConfigError, PathGuardError

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
NOT_APPLIED = "guard.yaml was not applied, the settings in force stay: %s"

T = TypeVar("T")


class ConfigWatcher:
    """Polls a file and hands every valid edit to `apply`.

    Polling, because editors, ConfigMaps and network file systems replace files in ways that
    notifications miss. An edit counts when it is found twice: half of a file may be valid too.
    `apply` may refuse an edit with a PathGuardError; then, and when the file cannot be read or is
    not valid, the settings in force stay. What was applied is also written to the file `kept`.
    """

    def __init__(
        self,
        path: Path,
        kept: Path,
        apply: Callable[[Settings], None],
        report: Callable[[str], None],
    ) -> None:
        """`report` is called with "applied" or "invalid" after every edit that was seen."""
        self._path = path
        self._kept = kept
        self._apply = apply
        self._report = report
        self._handled = self._seen = self._signature()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pathguard-config", daemon=True)

    def begin(self, apply: Callable[[Settings], T]) -> T:
        """Return what `apply` makes of the file as a worker starts, before `start`.

        A worker that takes the place of a dead one goes on with what was in force, where the file
        is not valid any more; else PathGuardError.
        """
        try:
            return self._apply_and_keep(self._path, apply)
        except PathGuardError as error:
            if not self._kept.is_file():
                raise
            logger.error(NOT_APPLIED, error)
            applied = self._apply_and_keep(self._kept, apply)
            self._report("invalid")
            return applied

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def poll(self) -> None:
        """Look once."""
        before, self._seen = self._seen, self._signature()
        if self._seen != before or self._seen == self._handled:
            return
        self._handled = self._seen
        try:
            self._apply_and_keep(self._path, self._apply)
        except Exception as error:
            # Whatever it is, the next edit has to be seen.
            logger.error(NOT_APPLIED, error)
            self._report("invalid")
        else:
            logger.info("guard.yaml was applied")
            self._report("applied")

    def _apply_and_keep(self, path: Path, apply: Callable[[Settings], T]) -> T:
        content = read_content(path)
        if not content.strip():  # as editors leave it for a moment; never meant
            raise ConfigError(f"{path} is empty; write 'version: 1' for the defaults")
        applied = apply(parse_settings(content, where=str(self._path)))
        fresh = self._kept.with_suffix(f".{os.getpid()}")  # several workers keep the same
        try:
            fresh.write_bytes(content)
            fresh.replace(self._kept)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            logger.warning("guard.yaml could not be kept for fresh workers: %s", error.strerror)
        return applied

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _run(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            self.poll()


def existing(path: Path) -> Path:
    """Return `path`; ConfigError where there is no such file."""
    if not path.is_file():
        raise ConfigError(f"there is no configuration file {path}; name an existing guard.yaml")
    return path
