"""Lines of an audit trail, for tests that need some."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from defense.metrics import P_BUCKETS
from defense.trail import VERDICTS, Incident, Tally

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
GUARD = {"model": "small", "version": "1.0", "fingerprint": "f" * 64, "guard": "a" * 16}
RATES = {"flag": 0.01, "reject": 0.001}
WHY = {
    "predicted": "cat",
    "runner_up": "dog",
    "sites": [
        {
            "site": "layer2.relu#0",
            "deviation": 4.2,
            "channels": [{"channel": 17, "deviation": -6.1}],
        }
    ],
    "votes": [
        {"site": "layer1.relu#0", "class": "dog", "share": 0.6},
        {"site": "layer2.relu#0", "class": "cat", "share": 0.9},
    ],
    "witness": {"class": "dog", "share": 0.8},
    "nearest_clean": [{"image": "dog/1.png", "class": "dog", "distance": 0.9}],
    "nearest_predicted": [{"image": "cat/7.png", "class": "cat", "distance": 1.732}],
    "pathway": None,
}


def incident(minute: float = 0, **fields: Any) -> Incident:
    """Return an incident some minutes after the start."""
    given = {"verdict": "flag", "p_value": 0.005, "score": 3.0, "reasons": WHY} | fields
    time = START + timedelta(minutes=minute)
    common: dict[str, Any] = {"time": time, "id": uuid4().hex, "request": str(uuid4())}
    return Incident(**(common | {"target_fpr": RATES, "mode": "enforce"} | GUARD | given))


def tally(
    minute: float = 0,
    *,
    verdicts: Mapping[str, int] | None = None,
    p_values: Mapping[float, int] | None = None,
    **fields: Any,
) -> Tally:
    """Return a tally some minutes after the start."""
    common: dict[str, Any] = {"time": START + timedelta(minutes=minute), "seconds": 60.0}
    counts = {
        "verdicts": {verdict: (verdicts or {}).get(verdict, 0) for verdict in VERDICTS},
        "p_values": {bound: (p_values or {}).get(bound, 0) for bound in P_BUCKETS},
    }
    return Tally(**(common | {"target_fpr": RATES} | GUARD | counts | fields))


def uniform(count: int) -> dict[float, int]:
    """Return the buckets of so many requests whose p-values are spread evenly over (0, 1]."""
    bounds = [0.0, *P_BUCKETS]
    return {
        high: round(count * high) - round(count * low)
        for low, high in zip(bounds, P_BUCKETS, strict=False)
    }


def write(folder: Path, lines: Iterable[Incident | Tally], name: str = "trail-1-0.jsonl") -> None:
    """Write lines as a worker would have."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("ab") as file:
        file.writelines(line.line() for line in lines)
