"""`guard.yaml` while the server runs: an edit takes effect in every worker within two seconds."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from defense.config import Settings, read_settings
from defense.errors import ConfigError

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5


class ConfigWatcher:
    """Polls a file and hands every valid edit to `apply`.

    Polling, because editors, ConfigMaps and network file systems replace files in ways that
    notifications miss. `apply` may refuse an edit with a PathGuardError; then, and when the file
    cannot be read or is not valid, the settings in force stay.
    """

    def __init__(
        self,
        path: Path,
        apply: Callable[[Settings], None],
        report: Callable[[str], None],
    ) -> None:
        """`report` is called with "applied" or "invalid" after every edit that was seen."""
        self._path = path
        self._apply = apply
        self._report = report
        self._seen = self._signature()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pathguard-config", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def poll(self) -> None:
        """Look once."""
        signature = self._signature()
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._apply(read_settings(self._path))
        except Exception as error:
            # Whatever it is, the next edit has to be seen.
            logger.error("guard.yaml was not applied, the settings in force stay: %s", error)
            self._report("invalid")
        else:
            logger.info("guard.yaml was applied")
            self._report("applied")

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
