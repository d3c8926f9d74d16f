"""A worker that is killed under load: counts survive, nothing counts twice, nobody has to help."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from handlers.torchserve_server import TorchServe, free_port, on_free_ports
from handlers.torchserve_settings import ServedModel, ServerSettings
from tests.e2e.conftest import Pair, Running, guard_yaml
from tests.e2e.requests import total

pytestmark = pytest.mark.server

WORKERS = 2
RESPAWN_SECONDS = 60
LOAD_SECONDS = 12.0
KILL_AFTER_SECONDS = 3.0


@pytest.fixture
def pool(counting: Pair, tmp_path: Path) -> Iterator[Running]:
    """One model with two workers."""
    port = free_port()
    config = tmp_path / "guard.yaml"
    config.write_text(guard_yaml(port))
    model = ServedModel("pool", counting.guarded, batch_size=4, workers=WORKERS)
    settings = ServerSettings(models=(model,), guard_config=config)
    with TorchServe(on_free_ports(settings)) as server:
        yield Running(server, config, port)


class Load:
    """Sends one image after the other from a few threads and keeps the statuses."""

    def __init__(self, running: Running, image: bytes) -> None:
        self.statuses: list[int] = []
        self._stop = threading.Event()
        url = f"{running.server.inference_url}/predictions/pool"
        headers = running.server.token_header()

        def send() -> None:
            with httpx.Client(headers=headers, timeout=60) as client:
                while not self._stop.is_set():
                    self.statuses.append(client.post(url, content=image).status_code)

        self._threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def exported(running: Running) -> float | None:
    """Return the scored total, or None while nobody exports."""
    try:
        return total(running.metrics_url, "pathguard_requests_total", model="pool")
    except httpx.HTTPError:
        return None


def test_killing_workers_under_load_loses_no_scraped_count_and_counts_nothing_twice(
    pool: Running, clean: list[bytes]
) -> None:
    load = Load(pool, clean[0])
    time.sleep(KILL_AFTER_SECONDS)
    before = exported(pool)
    # Both, one after the other, so that the one that owns the exporter's port is among them.
    first, second = pool.server.worker_pids("pool")
    os.kill(first, signal.SIGKILL)
    time.sleep(LOAD_SECONDS / 2)
    middle = exported(pool)
    os.kill(second, signal.SIGKILL)
    time.sleep(LOAD_SECONDS / 2)
    load.stop()

    after = exported(pool)
    assert before is not None
    assert middle is not None, "nobody took the exporter's port over"
    assert after is not None, "nobody took the exporter's port over"
    assert 0 < before <= middle <= after
    answered = sum(status in (200, 403) for status in load.statuses)
    lost = len(load.statuses) - answered
    # A request that died with its worker may have been counted just before; no other may differ.
    assert answered <= after <= answered + lost
    deadline = time.monotonic() + RESPAWN_SECONDS
    while {first, second} & set(pool.server.worker_pids("pool")):
        assert time.monotonic() < deadline, "a dead worker was not replaced"
        time.sleep(0.2)
    assert load.statuses[-1] == 200
