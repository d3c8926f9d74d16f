"""What taking a path costs: time and memory against the bare forward pass, in turn."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from defense.backbone import GatedBackbone
from defense.offline.collect import as_offline
from defense.routers import Router, serves
from defense.sites import device_of

BATCHES = (1, 32)
ROUNDS = 7
SECONDS = 20.0
"""Rounds stop after so long: a router that takes seconds per image is not measured to the percent."""


@dataclass(frozen=True)
class Cost:
    """At one batch size: ms per image bare and with the path, their ratio, extra MiB at the peak."""

    batch: int
    bare_ms: float
    path_ms: float
    ratio: float
    extra_mib: float
    rounds: int


def measure_cost(model: nn.Module, router: Router, inputs: Tensor) -> list[Cost]:
    """Measure `router` on `inputs` (N, ...) at every batch size, the two passes taking turns."""
    inputs = inputs[: max(BATCHES)].to(device_of(model))
    return [_cost_at(model, router, inputs[:batch].contiguous()) for batch in BATCHES]


def _cost_at(model: nn.Module, router: Router, x: Tensor) -> Cost:
    if serves(router):
        with GatedBackbone(model, router) as gated:
            return compare_calls(lambda: model(x), lambda: gated.run(x), len(x))
    offline = as_offline(router)
    return compare_calls(lambda: model(x), lambda: offline.route(model, x), len(x))


def compare_calls(bare: Callable[[], object], other: Callable[[], object], batch: int) -> Cost:
    """Measure two passes over `batch` images, taking turns."""
    with torch.inference_mode():
        bare()
        extra = peak_mib(other) - peak_mib(bare)
        started = time.perf_counter()
        pairs: list[tuple[float, float]] = []
        while len(pairs) < ROUNDS and (not pairs or time.perf_counter() - started < SECONDS):
            pairs.append((_milliseconds(bare), _milliseconds(other)))
    return Cost(
        batch=batch,
        bare_ms=statistics.median(a for a, _ in pairs) / batch,
        path_ms=statistics.median(b for _, b in pairs) / batch,
        ratio=statistics.median(b / a for a, b in pairs),
        extra_mib=extra,
        rounds=len(pairs),
    )


def _milliseconds(call: Callable[[], object]) -> float:
    """Return the least of three calls where calls are short."""
    found: list[float] = []
    while len(found) < 3 and sum(found) < 500:
        start = time.perf_counter()
        call()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        found.append((time.perf_counter() - start) * 1000)
    return min(found)


def peak_mib(call: Callable[[], object]) -> float:
    """Return the most that `call` held at once of torch's memory, in MiB: the GPU's, or the CPU's."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with (
        _without_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        call()
    held = peak = 0
    events = profiled.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Keep the profiler from writing its own start and stop, past Python, into a progress bar."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
