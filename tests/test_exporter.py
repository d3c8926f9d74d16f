"""One worker owns the port, all workers' counts are in it, and both survive the owner's death."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client import values

from defense import exporter
from defense.config import MetricsSettings
from defense.errors import ServerError
from defense.exporter import BASE_VARIABLE, Exporter, open_metrics_directory

WORKER = """
import sys
from prometheus_client import CollectorRegistry
from defense.config import MetricsSettings
from defense.exporter import Exporter, open_metrics_directory
from defense.metrics import ModelMetrics, make_instruments
from defense.payload import InvalidReason
from defense.types import Verdict


class Request:
    verdict, invalid, failure, p_value, probing = Verdict.ACCEPT, None, None, 0.5, False


folder = open_metrics_directory()
metrics = ModelMetrics(make_instruments(CollectorRegistry()), model="small", version="1.0")
metrics.mode("enforce")
failed = lambda: metrics.error("exporter")
Exporter(folder, MetricsSettings(port=int(sys.argv[1])), failed).start()
sys.stdout.write(f"{folder}\\n")
sys.stdout.flush()
for line in sys.stdin:
    metrics.count([Request()] * int(line))
    sys.stdout.write("counted\\n")
    sys.stdout.flush()
"""

ACCEPTED = r'^pathguard_requests_total\{model="small",verdict="accept",version="1\.0"\} (\S+)$'


class Worker:
    """A process that counts requests when told to."""

    def __init__(self, port: int, base: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WORKER, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, BASE_VARIABLE: str(base)},
        )

    def said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def count(self, requests: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{requests}\n")
        self.process.stdin.flush()
        assert self.said() == "counted"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def start(port: int, tmp_path: Path) -> Iterator[Callable[[], Worker]]:
    """Return a function that starts a worker under this process."""
    workers: list[Worker] = []

    def one() -> Worker:
        workers.append(Worker(port, tmp_path))
        return workers[-1]

    yield one
    for worker in workers:
        worker.kill()


def eventually(look: Callable[[], bool]) -> bool:
    """Say whether something comes true before a generous deadline."""
    deadline = time.monotonic() + 30
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def exported(port: int) -> str | None:
    """Return what the exporter says, or None where nobody listens."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/metrics").raise_for_status().text
    except httpx.TransportError:
        return None


def answers(port: int) -> bool:
    return exported(port) is not None


def accepted(port: int) -> float | None:
    found = re.search(ACCEPTED, exported(port) or "", re.MULTILINE)
    return float(found[1]) if found else None


def owner_of(port: int, workers: list[Worker]) -> Worker:
    """Return the worker that listens on a port."""
    listening = [
        worker
        for worker in workers
        for connection in psutil.Process(worker.process.pid).net_connections("tcp")
        if connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
    ]
    (owner,) = listening
    return owner


def test_counts_of_all_workers_survive_the_death_of_the_one_that_exports_them(
    start: Callable[[], Worker], port: int
) -> None:
    workers = [start(), start()]
    folders = {worker.said() for worker in workers}
    assert len(folders) == 1
    workers[0].count(3)
    workers[1].count(4)
    assert eventually(lambda: accepted(port) == 7)

    owner = owner_of(port, workers)
    owner.kill()
    (other,) = [worker for worker in workers if worker is not owner]
    assert eventually(lambda: accepted(port) == 7)
    assert owner_of(port, [other]) is other
    other.count(2)
    assert accepted(port) == 9

    reborn = start()
    assert {reborn.said()} == folders
    reborn.count(1)
    assert accepted(port) == 10
    assert 'pathguard_mode{mode="enforce",model="small"} 1.0' in (exported(port) or "")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base folder for metrics, with prometheus-client put back into its own mode afterwards."""
    monkeypatch.setenv(BASE_VARIABLE, str(tmp_path))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    return tmp_path


def test_the_directory_belongs_to_the_process_that_started_the_workers(base: Path) -> None:
    folder = open_metrics_directory()
    assert folder.name.startswith(f"pathguard-metrics-{os.getuid()}-{os.getppid()}-")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert os.environ["PROMETHEUS_MULTIPROC_DIR"] == str(folder)
    assert open_metrics_directory() == folder


def test_a_change_of_the_clock_does_not_change_the_directory(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_metrics_directory()
    (folder / "counter_1.db").touch()
    boot_time = psutil.boot_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot_time + 3600)
    assert open_metrics_directory() == folder
    assert (folder / "counter_1.db").exists()


def test_directories_of_servers_that_are_gone_are_removed_and_others_stay(base: Path) -> None:
    ours = f"pathguard-metrics-{os.getuid()}"
    gone = [f"{ours}-{2**22 + 1}-5", f"{ours}-{os.getpid()}-1", f"{ours}-x-y"]
    stay = [f"pathguard-metrics-{os.getuid() + 1}-{2**22 + 1}-5", "something-else"]
    for name in gone + stay:
        (base / name).mkdir()
    folder = open_metrics_directory()
    assert sorted(p.name for p in base.iterdir()) == sorted([*stay, folder.name])


def test_a_directory_whose_process_cannot_be_looked_at_stays(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = base / f"pathguard-metrics-{os.getuid()}-1-5"
    folder.mkdir()
    process = psutil.Process

    def look(pid: int) -> psutil.Process:
        if pid == 1:
            raise psutil.AccessDenied(pid)
        return process(pid)

    monkeypatch.setattr(psutil, "Process", look)
    open_metrics_directory()
    assert folder.exists()


def test_the_temporary_directory_is_the_base_where_none_is_named(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(BASE_VARIABLE)
    monkeypatch.setattr("tempfile.tempdir", str(base))
    assert open_metrics_directory().parent == base


def test_a_base_that_cannot_be_written_to_is_an_error(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base / "file").touch()
    monkeypatch.setenv(BASE_VARIABLE, str(base / "file"))
    with pytest.raises(
        ServerError, match=f"cannot create the metrics directory .* set {BASE_VARIABLE}"
    ):
        open_metrics_directory()


@pytest.mark.parametrize("how", ["open to others", "a link"])
def test_a_directory_that_somebody_else_prepared_is_an_error(base: Path, how: str) -> None:
    folder = open_metrics_directory()
    if how == "a link":
        folder.rename(base / "elsewhere")
        folder.symlink_to(base / "elsewhere")
    else:
        folder.chmod(0o755)
    with pytest.raises(
        ServerError, match=r"the metrics directory .* belongs to somebody else; remove it"
    ):
        open_metrics_directory()


def test_a_taken_port_is_counted_once_and_served_as_soon_as_it_is_free(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(exporter, "TAKEOVER_SECONDS", 0.01)
    failures: list[int] = []
    failed = threading.Event()

    def on_failure() -> None:
        failures.append(1)
        failed.set()

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        one = Exporter(tmp_path, MetricsSettings(port=port), on_failure)
        one.start()
        assert failed.wait(30)
    assert eventually(lambda: answers(port))
    one.stop()
    assert failures == [1]
    assert (
        caplog.text.count(f"cannot export metrics on 127.0.0.1:{port}: Address already in use") == 1
    )


def test_a_stopped_exporter_hands_the_port_to_the_next(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "TAKEOVER_SECONDS", 0.01)
    first, second, third = (
        Exporter(tmp_path, MetricsSettings(port=port), lambda: pytest.fail("no port"))
        for _ in range(3)
    )
    first.start()
    assert eventually(lambda: answers(port))
    second.start()
    third.start()
    third.stop()
    first.stop()
    assert eventually(lambda: answers(port))
    second.stop()
    assert not answers(port)


def test_every_page_of_a_process_values_is_allocated_before_it_is_written(
    start: Callable[[], Worker],
) -> None:
    worker = start()
    folder = Path(worker.said())

    files = list(folder.glob(f"*_{worker.process.pid}.db"))

    assert {file.name.rpartition("_")[0] for file in files} == set(exporter.VALUE_FILES)
    for file in files:
        assert file.stat().st_blocks * 512 >= file.stat().st_size == exporter.VALUE_FILE_BYTES


def test_a_metrics_directory_without_room_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BASE_VARIABLE, str(tmp_path))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "set by the call")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (exporter.VALUE_FILE_BYTES // 2, hard))
    try:
        with pytest.raises(ServerError, match="File too large; make room there, or set PATHGUARD"):
            open_metrics_directory()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
