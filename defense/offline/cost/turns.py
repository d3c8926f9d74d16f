"""Calls that take turns, so that a machine that slows down slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from defense.offline.progress import Progress

Calls = Mapping[str, Callable[[], object]]
SHORT_MS = 200.0
"""A call shorter than this is made three times, of which the shortest counts."""


def rotated(names: list[str], number: int) -> list[str]:
    """Return `names` beginning with another one every round."""
    shift = number % len(names)
    return names[shift:] + names[:shift]


@torch.no_grad()
def take_turns(
    calls: Calls,
    rounds: int,
    progress: Progress,
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, list[float]]:
    """Return milliseconds by call and round. clock: how one call is timed; None: by wall clock."""
    clock = clock or milliseconds
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in rotated(list(calls), number):
            times = [clock(calls[name])]
            if times[0] < SHORT_MS:
                times += [clock(calls[name]) for _ in range(2)]
            found[name].append(min(times))
        progress.advance()
    return found


def milliseconds(call: Callable[[], object]) -> float:
    """Time one call by the wall clock."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000
