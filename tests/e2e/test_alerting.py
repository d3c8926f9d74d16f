"""A real Prometheus scrapes a real TorchServe: clean traffic does not alert, an attack burst does."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from handlers.torchserve_server import free_port
from tests.e2e.conftest import Running
from tests.e2e.requests import post

pytestmark = pytest.mark.server

CONFIG = Path(__file__).parents[2] / "config" / "prometheus"
ALERT = "PathGuardAttackBurst"
START_SECONDS, CLEAN_SECONDS, FIRING_SECONDS = 30.0, 25.0, 150.0


@dataclass(frozen=True)
class Prometheus:
    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=10)
        return list(answer.json()["data"]["result"])

    def alerts(self, state: str) -> set[str]:
        answer = httpx.get(f"{self.url}/api/v1/alerts", timeout=10)
        found = answer.json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in found if alert["state"] == state}


@pytest.fixture
def prometheus(running: Running, tmp_path: Path) -> Iterator[Prometheus]:
    """Debian's Prometheus with the shipped rules, scraping the test's server every second."""
    binary = shutil.which("prometheus")
    if binary is None:
        assert not os.environ.get("CI"), (
            "prometheus is missing; install Debian's package prometheus"
        )
        pytest.skip("needs the prometheus binary (Debian's package prometheus)")
    config = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
    config["global"].update(scrape_interval="1s", scrape_timeout="1s", evaluation_interval="1s")
    config["rule_files"] = [str(CONFIG / Path(name).name) for name in config["rule_files"]]
    targets = {
        "8083": f"127.0.0.1:{running.metrics_port}",
        "8082": f"127.0.0.1:{running.server.settings.metrics_port}",
    }
    for job in config["scrape_configs"]:
        job.pop("scrape_interval", None)
        for static in job["static_configs"]:
            static["targets"] = [targets[old.rsplit(":")[-1]] for old in static["targets"]]
    config.pop("alerting", None)
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        binary,
        f"--config.file={tmp_path}/prometheus.yml",
        f"--storage.tsdb.path={tmp_path}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        found = Prometheus(f"http://127.0.0.1:{port}")
        wait_until(lambda: ready(found), START_SECONDS, (tmp_path / "log").read_text())
        yield found
    finally:
        process.terminate()
        process.wait(timeout=20)


def ready(prometheus: Prometheus) -> bool:
    try:
        return len(prometheus.query("pathguard_guard_info")) > 0
    except httpx.HTTPError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float, said: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, said
        time.sleep(0.5)


def test_clean_traffic_does_not_alert_and_an_attack_burst_does(
    running: Running, prometheus: Prometheus, clean: list[bytes], attacked: list[bytes]
) -> None:
    deadline = time.monotonic() + CLEAN_SECONDS
    offset = 0
    while time.monotonic() < deadline:
        post(running.server, "counting", clean[offset : offset + 16])
        offset = (offset + 16) % 256
    # Other tests break the configuration of the shared server on purpose, which this one may still see.
    found = prometheus.alerts("firing") | prometheus.alerts("pending")
    assert not found - {"PathGuardConfigInvalid"}

    deadline = time.monotonic() + FIRING_SECONDS
    while ALERT not in prometheus.alerts("firing"):
        assert time.monotonic() < deadline, f"{ALERT} did not fire: {prometheus.alerts('pending')}"
        post(running.server, "counting", attacked[:16])
