"""A guarded server on which faults are caused, and what can be seen of it."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import yaml
from PIL import Image

from tests.campaigns.harness import Guarded
from tests.e2e.requests import post, total

PATIENCE_SECONDS = 180.0
CALM = {
    "flag": {"score": 1e9},
    "reject": {"score": 1e9},
    "probing": "off",
    "score_budget_ms": 1500,
    "second_look": {"below_p": 0.9, "budget_ms": 1000},
}
"""Every request that is judged is accepted, and most are looked at twice."""


def noise_images(count: int, seed: int) -> list[bytes]:
    """Return PNGs of 32x32 coloured noise."""
    draw = np.random.default_rng(seed)
    buffers = [io.BytesIO() for _ in range(count)]
    for buffer in buffers:
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
    return [buffer.getvalue() for buffer in buffers]


def wait_until(condition: Callable[[], bool], what: str) -> float:
    """Return the seconds until something is true; an exporter may change hands meanwhile."""
    begun = time.monotonic()
    while time.monotonic() - begun < PATIENCE_SECONDS:
        try:
            if condition():
                return time.monotonic() - begun
        except httpx.HTTPError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"it never came true that {what}")


@dataclass(frozen=True)
class Answers:
    """What became of some requests."""

    statuses: list[int]
    verdicts: list[str]

    @property
    def text(self) -> str:
        """Say how many got which status and verdict."""
        pairs = [f"{s} {v}".strip() for s, v in zip(self.statuses, self.verdicts, strict=True)]
        return ", ".join(f"{pairs.count(pair)} x {pair}" for pair in sorted(set(pairs)))

    def all(self, status: int, verdict: str) -> bool:
        return set(self.statuses) == {status} and set(self.verdicts) == {verdict}


@dataclass(frozen=True)
class Scene:
    """A server with `FaultyGuard`s, the file that tells them what fails, and images to send."""

    guarded: Guarded
    archive: Path
    fault: Path
    images: Sequence[bytes]

    def ask(self, *, server: Guarded | None = None) -> Answers:
        """Send all images, so that they can share batches."""
        to = server or self.guarded
        answers = post(to.server, to.model, self.images)
        verdicts = [answer.headers.get("X-PathGuard-Verdict", "") for answer in answers]
        return Answers([answer.status_code for answer in answers], verdicts)

    @contextmanager
    def injected(self, fault: str) -> Iterator[None]:
        """Let a part of every worker fail inside the block."""
        self.fault.write_text(fault)
        try:
            yield
        finally:
            self.fault.write_text("")

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's series that have these labels."""
        return total(self.guarded.metrics_url, f"pathguard_{name}", **labels)

    def document(self, **keys: Any) -> str:
        """Return a guard.yaml with `keys` laid over the calm settings."""
        settings: Mapping[str, Any] = {**CALM, **keys}
        port = {"port": self.guarded.metrics_port}
        return yaml.safe_dump({"version": 1, "defaults": settings, "metrics": port})

    def configure(self, **keys: Any) -> None:
        """Edit guard.yaml and wait until every worker has applied it."""
        text = self.document(**keys)
        if self.guarded.config.is_file() and self.guarded.config.read_text() == text:
            return
        with self.reloads("applied"):
            fresh = self.guarded.config.with_suffix(".new")
            fresh.write_text(text)
            fresh.replace(self.guarded.config)

    @contextmanager
    def reloads(self, result: str) -> Iterator[None]:
        """Wait at the end of the block until every worker has counted an edit as `result`."""
        before = self.metric("config_reloads_total", result=result)
        workers = len(self.guarded.workers())
        yield
        wait_until(
            lambda: self.metric("config_reloads_total", result=result) >= before + workers,
            f"every worker found the edit {result}",
        )

    def exporter_owner(self) -> int:
        """Return the process id of the worker that exports the metrics."""
        (owner,) = [
            pid
            for pid in self.guarded.workers()
            for connection in psutil.Process(pid).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
            and connection.laddr.port == self.guarded.metrics_port
        ]
        return owner

    def ready(self, workers: int) -> bool:
        """Say whether so many workers are ready, by TorchServe's own word."""
        described = self.guarded.server._describe(self.guarded.model)["workers"]
        return [worker["status"] for worker in described] == ["READY"] * workers
