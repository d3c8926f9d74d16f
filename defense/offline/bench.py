"""What the guard adds to the bare network, in one process: stock, guarded and a control, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from defense.config import ModelSettings
from defense.guard import Guard
from defense.offline.fit import fit_module
from defense.offline.progress import Progress
from defense.offline.statistics import ratio_row

SIDE, CLASSES, FIT_IMAGES = 224, 10, 256
BATCHES = (1, 8)
SETTINGS = ModelSettings.model_validate(
    {"flag": {"target_fpr": 0.05}, "reject": {"target_fpr": 0.01}}
)


def bench_network(seed: int) -> nn.Module:
    """Return a ResNet-18 with random weights: what it costs does not depend on what it learnt."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net: nn.Module = resnet18(num_classes=CLASSES)
        return net.eval()


def bench_images(count: int, seed: int) -> Tensor:
    """Return smooth random images (N, 3, 224, 224), normalised about as photographs are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 16, 16, generator=generator)
    return nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")


def bench_guard(model: nn.Module, seed: int) -> Guard:
    """Fit a default guard to the bench's network."""
    return fit_module(model, bench_images(FIT_IMAGES, seed).split(32))


def measure_library(rounds: int, seed: int, progress: Progress) -> list[dict[str, Any]]:
    """Time forward passes: bare, with the path captured, and guarded to the verdict.

    The four take turns inside every round, in an order that rotates, so that a machine that slows
    down slows all of them; every figure is a ratio within a round.
    """
    bare, copy, observed = (bench_network(seed) for _ in range(3))
    attached = bench_guard(observed, seed).attach(observed, SETTINGS)
    rows = []
    for batch in BATCHES:
        x = bench_images(batch, seed + 1)
        kinds: dict[str, Callable[[], object]] = {
            "stock": lambda x=x: bare(x),  # type: ignore[misc]
            "control": lambda x=x: copy(x),  # type: ignore[misc]
            "capture": lambda x=x: attached.backbone.run(x),  # type: ignore[misc]
            "guarded": lambda x=x: attached(x),  # type: ignore[misc]
        }
        seconds = _take_turns(kinds, rounds, progress)
        for kind, what in (("capture", "forward and path"), ("guarded", "forward to verdict")):
            row = ratio_row(seconds["stock"], seconds[kind], seconds["control"], seed=seed)
            rows.append({"what": f"library: {what}", "batch": batch, "unit": "ms", **row})
    attached.close()
    return rows


@torch.inference_mode()
def _take_turns(
    kinds: dict[str, Callable[[], object]], rounds: int, progress: Progress
) -> dict[str, list[float]]:
    """Return milliseconds per call and round; the minimum of a few calls stands for a round."""
    for call in kinds.values():
        call()
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    names = list(kinds)
    for number in range(rounds):
        shift = number % len(names)
        for kind in names[shift:] + names[:shift]:
            found[kind].append(min(_milliseconds(kinds[kind]) for _ in range(3)))
        progress.advance()
    return found


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000
