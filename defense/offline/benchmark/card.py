"""The report card: the headline of a benchmark, small enough to travel in the guard it is about."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from defense.artifact import load_guard, save_guard
from defense.errors import ArtifactError
from defense.offline.benchmark.marks import PERCENT, SAID, Row, get, losses, marks

MAX_BYTES = 4000
MOST_LOSSES = 3
MOST_SEEDS = 10
LONGEST = 120
"""Characters of a text that comes from data; the rest stands in the benchmark's own results."""


def report_card(results: Row) -> dict[str, Any]:
    """Return the headline: every mark that was measured, and the attacks that others see better.

    `value` and `sealed` are plain figures, the latter on images that nothing was fitted to; `measured`
    is the former as text.
    """
    data, behind = get(results, "data"), losses(results)
    card = {
        "command": _short(results.get("command")),
        "network": _short(results.get("fingerprint")),
        "seeds": list(get(results, "seeds"))[:MOST_SEEDS],
        "images": data.get("images"),
        "sealed_images": data.get("sealed"),
        "marks": {
            mark.standard.key: {
                "says": mark.standard.words,
                "floor": _plain(mark.limits[0]),
                "goal": _plain(mark.limits[1]),
                "measured": _plain(mark.standard.unit(mark.measured.value)),
                "value": _rounded(mark.measured.value),
                "sealed": None if mark.sealed is None else _rounded(mark.sealed.value),
                "verdict": SAID[mark.verdict],
            }
            for mark in marks(results)
            if mark.measured is not None
        },
        "behind": [
            f"{_short(loss.attack, 24)}: {loss.ours:.3f}, {_short(loss.rival, 24)} {loss.theirs:.3f}"
            for loss in behind[:MOST_LOSSES]
        ],
        "behind_count": len(behind),
        "failed_checks": sum(not check.get("passed") for check in get(results, "sanity").values()),
    }
    size = len(json.dumps(card).encode())
    assert size < MAX_BYTES, f"the card has {size} bytes"
    return card


def with_card(folder: Path, card: dict[str, Any]) -> None:
    """Write a card into the guard in `folder`; what the guard decides by stays as it is.

    ArtifactError where the card is of another network than the guard, or the guard cannot be read.
    """
    guard = load_guard(folder)
    if card.get("network") != guard.fingerprint:
        raise ArtifactError(
            f"the report card is about the network {str(card.get('network'))[:16]} and the guard in "
            f"{folder} is for {guard.fingerprint[:16]}; run 'pathguard benchmark' on that network"
        )
    save_guard(dataclasses.replace(guard, facts=guard.facts | {"report_card": card}), folder)


def _short(text: object, length: int = LONGEST) -> str:
    """Return text that JSON writes in so many bytes, its end cut off where it is longer."""
    found = "" if text is None else str(text).encode("ascii", "replace").decode()
    return found if len(found) <= length else found[: length - 3] + "..."


def _plain(text: str) -> str:
    """Return text of ASCII, which JSON writes in one byte a character."""
    swaps = {PERCENT: " %", "\N{NO-BREAK SPACE}": " ", "\N{EN DASH}": " to ", "\N{MINUS SIGN}": "-"}
    for found, plain in (swaps | {"≥": ">=", "≤": "<="}).items():
        text = text.replace(found, plain)
    return text


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
