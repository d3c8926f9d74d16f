"""Trails for the console's tests, written as a server would write them, and a console over them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from defense.config import Limits
from defense.console.desk import Desk, Settings
from defense.console.serve import bound_console
from defense.trail import PAYLOADS_FOLDER, Incident, Tally
from tests.served import encoded

NOW = datetime(2026, 3, 4, 3, 7, 30, tzinfo=UTC)
TARGETS: dict[Any, float] = {"flag": 0.01, "reject": 0.001}
FINGERPRINT = "ab" * 32
REASONS: dict[str, Any] = {
    "predicted": "cat",
    "runner_up": "dog",
    "sites": [
        {
            "site": "layer2.0.relu",
            "deviation": 9.25,
            "channels": [
                {"channel": 17, "deviation": 6.1},
                {"channel": 3, "deviation": -4.2},
            ],
        }
    ],
    "votes": [
        {"site": "layer1.0.relu", "class": "dog", "share": 0.61},
        {"site": "layer2.0.relu", "class": "cat", "share": 0.55},
    ],
    "witness": {"class": "dog", "share": 0.84},
}
NEAR: dict[str, Any] = {
    "nearest_clean": [
        {"image": "dog/3.png", "class": "dog", "distance": 0.912},
        {"image": "elsewhere/9.png", "class": "dog", "distance": 1.1},
    ],
    "nearest_predicted": [{"image": "cat/0.png", "class": "cat", "distance": 1.734}],
    "pathway": {
        "open": 0.31,
        "own": 0.22,
        "best": {"class": "dog", "share": 0.77},
        "strays": [{"site": "layer2.0.relu", "channels": [4, 9]}],
    },
}
"""What lines say beside `REASONS` where the guard names clean images, and knows class pathways."""


def name_of(number: int) -> str:
    """Return the id of the incident with this number."""
    return f"{number:032x}"


def incident(number: int, **changes: Any) -> Incident:
    """Return incident `number`, so many minutes before NOW."""
    usual: dict[str, Any] = {
        "id": name_of(number),
        "time": NOW - timedelta(minutes=number),
        "request": f"request-{number}",
        "model": "animals",
        "version": "1.0",
        "fingerprint": FINGERPRINT,
        "mode": "enforce",
        "verdict": "reject",
        "p_value": 0.0002,
        "score": 3.5,
        "target_fpr": TARGETS,
        "reasons": REASONS,
    }
    return Incident(**usual | changes)


def tally(minutes_ago: float, model: str = "animals", **verdicts: int) -> Tally:
    """Return what was counted in the minute that ended so many minutes before NOW."""
    every = dict.fromkeys(("accept", "flag", "reject", "error", "invalid", "failed"), 0)
    return Tally(
        time=NOW - timedelta(minutes=minutes_ago),
        seconds=60.0,
        model=model,
        version="1.0",
        fingerprint=FINGERPRINT,
        verdicts=every | verdicts,
        p_values={},
        target_fpr=TARGETS,
    )


def write_trail(folder: Path, entries: Sequence[Incident | Tally], junk: bytes = b"") -> Path:
    """Write entries, and lines that are none, into a trail; return its folder."""
    (folder / PAYLOADS_FOLDER).mkdir(parents=True, exist_ok=True)
    lines = b"".join(entry.line() for entry in entries)
    (folder / "trail-1.jsonl").write_bytes(lines + junk)
    return folder


def keep_payload(folder: Path, number: int, content: bytes) -> str:
    """Write what a client sent into a trail; return the name for its incident."""
    name = f"{name_of(number)}.bin"
    path = folder / PAYLOADS_FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return name


def picture(seed: int = 0, size: int = 8) -> bytes:
    """Return a PNG of coloured noise."""
    generator = np.random.default_rng(seed)
    return encoded(generator.integers(0, 256, (size, size, 3), dtype=np.uint8))


def desk(folder: Path, **changes: Any) -> Desk:
    settings = Settings(folder, Limits(), by="ada", clock=lambda: NOW)
    return Desk(replace(settings, **changes))


@dataclass(frozen=True)
class Running:
    """A console that is served. url: with the token; address: without."""

    url: str
    client: httpx.Client

    @property
    def address(self) -> str:
        return self.url.partition("/?")[0]


@contextmanager
def running(desk: Desk) -> Iterator[Running]:
    """Serve a console on a free port; the client has been let in."""
    with bound_console(desk, 0) as console:
        thread = threading.Thread(target=console.run)
        thread.start()
        address = console.url.partition("/?")[0]
        try:
            with httpx.Client(base_url=address, headers={"Origin": address}) as client:
                assert client.get(console.url).status_code == 303
                yield Running(console.url, client)
        finally:
            console.server.should_exit = True
            thread.join()
