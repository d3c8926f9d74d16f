"""Faults of what lies around the guard: processes, the metrics directory, the clock."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import sleep, time
from typing import Any

import psutil

from defense.errors import ServerError
from defense.exporter import BASE_VARIABLE, VALUE_FILE_BYTES, VALUE_FILES
from tests.campaigns.broken_parts import Fault, Seen
from tests.campaigns.harness import Guarded, serving
from tests.campaigns.injected import SLOW_SECONDS
from tests.campaigns.scene import CALM, Scene, wait_until
from tests.e2e.requests import total

TAKEOVER_SECONDS = 2.0
RESPONSE_TIMEOUT_S = 5
CLOCK_LIBRARIES = ("/usr/lib/*/faketime/libfaketime.so.1", "/usr/lib/faketime/libfaketime.so.1")


def worker_killed(on: Scene) -> Seen:
    """Kill a worker while it computes a batch."""
    on.configure()
    before = on.metric("requests_total")
    pids = on.guarded.workers()
    with ThreadPoolExecutor(1) as pool, on.injected("slow forward"):
        asked = pool.submit(on.ask)
        sleep(SLOW_SECONDS / 3)
        busy = max(pids, key=_seconds_of_work)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        found = asked.result()
    wait_until(lambda: on.ready(len(pids)), "the workers are back")
    middle = on.metric("requests_total")
    after = on.ask()
    counted = on.metric("requests_total") - middle
    lost = [status for status in found.statuses if status in (500, 507)]
    return Seen(
        len(lost) == len(found.statuses)
        and middle == before
        and after.all(200, "accept")
        and counted == len(on.images)
        and busy not in on.guarded.workers(),
        f"{found.text}; no count was lost or made up; afterwards {after.text}, each counted once",
    )


def _seconds_of_work(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def exporter_killed(on: Scene) -> Seen:
    """Kill the worker that owns the exporter's port."""
    on.configure()
    on.ask()
    before = on.metric("requests_total")
    workers = len(on.guarded.workers())
    os.kill(on.exporter_owner(), signal.SIGKILL)  # which closes the port
    seconds = wait_until(lambda: on.metric("requests_total") > 0, "another worker exports")
    after = on.metric("requests_total")
    wait_until(lambda: on.ready(workers), "the worker is back")
    return Seen(
        seconds <= TAKEOVER_SECONDS and after == before,
        f"another worker exported after {seconds:.1f} s; counters unchanged",
    )


def native_hang(on: Scene) -> Seen:
    """Let the detector hang where no signal reaches it."""
    with _another(on, response_timeout_s=RESPONSE_TIMEOUT_S) as server:
        pids = server.workers()
        with on.injected("detector hangs in native code"):
            found = on.ask(server=server)
        wait_until(lambda: on.ask(server=server).all(200, "accept"), "a fresh worker answers")
        fresh = server.workers() != pids
    return Seen(
        set(found.statuses) == {500} and fresh,
        f"{found.text} after responseTimeout ({RESPONSE_TIMEOUT_S} s); a fresh worker answers",
    )


def server_restarted(on: Scene) -> Seen:
    """Kill TorchServe's JVM and nothing else, and start the server again."""
    with _another(on) as first:
        folder = _metrics_folder(first)
        workers = first.workers()
        on.ask(server=first)
        process = first.server._process
        assert process is not None
        process.kill()
        process.wait()
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in workers), "workers ended")
    with _another(on) as second:
        fresh = total(second.metrics_url, "pathguard_requests_total")
        found = on.ask(server=second)
        counted = total(second.metrics_url, "pathguard_requests_total")
        gone = not folder.exists()
    return Seen(
        fresh == 0 and found.all(200, "accept") and counted == len(on.images) and gone,
        f"workers ended by themselves; after the start counters at {fresh:g}, then {found.text}, "
        f"{counted:g} counted; the old metrics directory is {'gone' if gone else 'left'}",
    )


def directory_full(on: Scene) -> Seen:
    """Let the disk of the metrics run full under a server, kill a worker, and make room again."""
    with _small_disk() as disk:
        if disk is None:
            return Seen(None, "no tmpfs may be mounted here")
        with _environment(BASE_VARIABLE, str(disk)), _another(on) as server:
            _fill(disk)
            counted = total(server.metrics_url, "pathguard_requests_total")
            found = on.ask(server=server)
            counted = total(server.metrics_url, "pathguard_requests_total") - counted
            (worker,) = server.workers()
            os.kill(worker, signal.SIGKILL)
            wait_until(lambda: "cannot write to the metrics" in server.log(), "the log says so")
            (disk / "filler").unlink()
            wait_until(lambda: on.ask(server=server).all(200, "accept"), "the worker is back")
    return Seen(
        found.all(200, "accept") and counted == len(on.images),
        f"full: {found.text}, {counted:g} counted; a fresh worker waited, with a sentence in the "
        "log, and came when there was room",
    )


def directory_read_only(on: Scene) -> Seen:
    """Start a server whose metrics directory is on a disk that cannot be written to."""
    with _small_disk("ro") as disk:
        if disk is None:
            return Seen(None, "no tmpfs may be mounted here")
        try:
            with _environment(BASE_VARIABLE, str(disk)), _another(on):
                return Seen(False, "the server started")
        except ServerError as error:
            return Seen("cannot create the metrics directory" in str(error), "that is what it says")


def clock_steps(on: Scene) -> Seen:
    """Set the clock of the workers an hour back, and two hours ahead."""
    library = next((found for glob in CLOCK_LIBRARIES for found in Path("/").glob(glob[1:])), None)
    if library is None:
        return Seen(None, "libfaketime is not installed")
    with tempfile.TemporaryDirectory() as folder:
        clock = Path(folder) / "clock"
        clock.write_text("+0")
        python = Path(folder) / "python3"  # of the workers alone: the JVM does not start with it
        python.write_text(
            f"#!/bin/sh\nLD_PRELOAD={library} FAKETIME_TIMESTAMP_FILE={clock} FAKETIME_NO_CACHE=1 "
            f'FAKETIME_DONT_FAKE_MONOTONIC=1 exec {sys.executable} "$@"\n'
        )
        python.chmod(0o700)
        with _workers_run_by(python), _another(on) as server:
            steps = [_step(on, server, clock, seconds) for seconds in (-3600, 3600)]
    text = "; ".join(step.text for step in steps)
    return Seen(all(step.kept for step in steps), f"{text} (the workers' clock, by libfaketime)")


def _step(on: Scene, server: Guarded, clock: Path, seconds: int) -> Seen:
    clock.write_text(f"{seconds:+d}")
    before = total(server.metrics_url, "pathguard_requests_total")
    found = on.ask(server=server)
    counted = total(server.metrics_url, "pathguard_requests_total") - before
    stamp = total(server.metrics_url, "pathguard_last_scored_timestamp_seconds")
    edits = total(server.metrics_url, "pathguard_config_reloads_total")
    server.config.write_text(server.config.read_text() + "# edited\n")
    wait_until(
        lambda: total(server.metrics_url, "pathguard_config_reloads_total") > edits,
        "the edit was applied",
    )
    return Seen(
        found.all(200, "accept")
        and counted == len(on.images)
        and abs(stamp - time() - seconds) < 60,
        f"{seconds:+d} s: {found.text}, {counted:g} counted, an edit applied",
    )


@contextmanager
def _another(on: Scene, **model: int) -> Iterator[Guarded]:
    """Run one more server, with one worker."""
    own: dict[str, Any] = {"batch_size": len(on.images), "max_batch_delay_ms": 200} | model
    with serving(on.archive, defaults=CALM, **own) as server:
        yield server


@contextmanager
def _workers_run_by(python: Path) -> Iterator[None]:
    own, sys.executable = sys.executable, str(python)
    try:
        yield
    finally:
        sys.executable = own


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def _small_disk(mode: str = "rw") -> Iterator[Path | None]:
    """Mount a small disk in memory, where that is allowed."""
    size = 4 * len(VALUE_FILES) * VALUE_FILE_BYTES
    with tempfile.TemporaryDirectory() as folder:
        options = f"size={size},{mode}"
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
            yield None
            return
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


def _fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def _metrics_folder(server: Guarded) -> Path:
    (worker,) = server.workers()
    files = [Path(mapped.path) for mapped in psutil.Process(worker).memory_maps()]
    return next(path.parent for path in files if path.suffix == ".db")


FAULTS = (
    Fault(
        "workers killed in mid-batch (kill -9)",
        "their batch is lost (TorchServe: 500 or 507); counters survive, nothing counts twice",
        "`host_model:pathguard_coverage_ratio:rate5m`, `PathGuardCoverageLow`",
        worker_killed,
    ),
    Fault(
        "worker that owns the exporter killed",
        f"another exports within {TAKEOVER_SECONDS:g} s; counters survive",
        "`up`, `PathGuardExporterDown` where nobody takes over",
        exporter_killed,
    ),
    Fault(
        "detector hangs in native code",
        "TorchServe ends the worker at its responseTimeout: 500; a fresh one takes its place",
        "`PathGuardCoverageLow`; TorchServe's log",
        native_hang,
    ),
    Fault(
        "JVM killed and started again",
        "no worker is left behind; counters begin at zero; the old directory is removed",
        "`up`, `PathGuardExporterDown`; then a counter reset, which `rate()` sees",
        server_restarted,
    ),
    Fault(
        "metrics directory full",
        "running workers go on and count; a fresh one starts when there is room, and says so",
        "`PathGuardCoverageLow`; the log",
        directory_full,
    ),
    Fault(
        "metrics directory read-only",
        "the server does not start, with a sentence that says why",
        "the start itself",
        directory_read_only,
    ),
    Fault(
        "clock set back and ahead by an hour",
        "answers, counts, limits and edits go on as ever",
        "`pathguard_last_scored_timestamp_seconds` follows the clock",
        clock_steps,
    ),
)
