"""One exporter port for all workers of a server, with counters that survive a worker's death.

prometheus-client's multiprocess mode keeps every process' values in files. They lie in a directory
that belongs to this start of the server, named after the process that started the workers, so there
is nothing to wipe and nothing of an earlier start is counted again. One worker at a time holds the
lock and owns the port; when it dies, the kernel drops the lock and another one takes over.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

import psutil
from prometheus_client import CollectorRegistry, start_http_server, values
from prometheus_client.multiprocess import MultiProcessCollector

from defense.config import MetricsSettings
from defense.errors import ServerError

logger = logging.getLogger(__name__)

BASE_VARIABLE = "PATHGUARD_METRICS_DIR"
PREFIX = "pathguard-metrics"
TAKEOVER_SECONDS = 0.5
VALUE_FILES = ("counter", "histogram", "gauge_max", "gauge_mostrecent")
"""What prometheus-client calls the files of the instruments' kinds, less process and suffix."""
VALUE_FILE_BYTES = 1 << 18
"""Several times what our instruments take; the last worker of a long row has to find room as well."""


def open_metrics_directory() -> Path:
    """Create this server start's directory and put prometheus-client into multiprocess mode.

    The base is `PATHGUARD_METRICS_DIR`, else the temporary directory. Directories of servers that
    are gone are removed.
    """
    base = Path(os.environ.get(BASE_VARIABLE) or tempfile.gettempdir())
    folder = base / f"{PREFIX}-{os.getuid()}-{_identity(psutil.Process(os.getppid()))}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise ServerError(
            f"cannot create the metrics directory {folder}: {error.strerror}; "
            f"set {BASE_VARIABLE} to a directory that the server may write to"
        ) from error
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ServerError(f"the metrics directory {folder} belongs to somebody else; remove it")
    _remove_stale(base)
    _reserve(folder)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    # prometheus-client reads the variable once, when it is imported; a handler may have done that.
    values.ValueClass = values.MultiProcessValue()
    return folder


def _reserve(folder: Path) -> None:
    """Allocate this process' files whole: a page that a full disk refuses later kills the process."""
    fresh = folder / f"{os.getpid()}.new"
    try:
        for kind in VALUE_FILES:
            path = folder / f"{kind}_{os.getpid()}.db"
            if not path.exists():  # else its process number was another worker's, whose counts stay
                fresh.write_bytes(bytes(VALUE_FILE_BYTES))
                fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise ServerError(
            f"cannot write to the metrics directory {folder}: {error.strerror}; make room there, or "
            f"set {BASE_VARIABLE} to a directory that the server may write to"
        ) from error


def _identity(process: psutil.Process) -> str:
    """Tell a process by its number and its age since boot, which no change of the clock alters."""
    return f"{process.pid}-{round((process.create_time() - psutil.boot_time()) * 100)}"


def _remove_stale(base: Path) -> None:
    for folder in base.glob(f"{PREFIX}-{os.getuid()}-*-*"):
        pid, _, _ = folder.name.removeprefix(f"{PREFIX}-{os.getuid()}-").partition("-")
        try:
            alive = folder.name.endswith(_identity(psutil.Process(int(pid))))
        except (psutil.NoSuchProcess, ValueError):
            alive = False
        except psutil.Error:
            continue
        if not alive:
            shutil.rmtree(folder, ignore_errors=True)


class Exporter:
    """Serves `/metrics` from this process whenever it holds the lock."""

    def __init__(
        self, folder: Path, settings: MetricsSettings, on_failure: Callable[[], None]
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._on_failure = on_failure
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pathguard-exporter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Give the port back; another worker takes over."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        with open(self._folder / "exporter.lock", "w") as lock:
            while not _locked(lock):
                if self._stopped.wait(TAKEOVER_SECONDS):
                    return
            self._serve()

    def _serve(self) -> None:
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(self._folder))
        complained = False
        while not self._stopped.is_set():
            try:
                server, thread = start_http_server(
                    self._settings.port, self._settings.host, registry
                )
            except OSError as error:
                if not complained:
                    self._on_failure()
                    logger.error(
                        "cannot export metrics on %s:%d: %s; free the port or set another in "
                        "guard.yaml under metrics",
                        self._settings.host,
                        self._settings.port,
                        error.strerror,
                    )
                complained = True
                self._stopped.wait(TAKEOVER_SECONDS)
                continue
            self._stopped.wait()
            server.shutdown()
            server.server_close()
            thread.join()


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
