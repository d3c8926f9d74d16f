"""Features without which no path detector's figures mean anything; each goes to a common classifier."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from defense.offline.benchmark.peers.contract import Case, Sample
from defense.offline.benchmark.peers.squeezing import median


def activations(_case: Case, sample: Sample) -> Tensor:
    """Return the pooled activations as they are, (N, D)."""
    return sample.routed.path.double().cpu()


def shuffled_path(case: Case, sample: Sample) -> Tensor:
    """Return the same numbers of each row in an order of its own, (N, D): which channel is lost.

    The order is drawn from the seed and the row, so that it does not depend on the batch.
    """
    path = sample.routed.path.cpu()
    orders = [
        torch.randperm(
            path.shape[1],
            generator=torch.Generator().manual_seed(zlib.crc32(row.numpy().tobytes(), case.seed)),
        )
        for row in path
    ]
    return path.gather(1, torch.stack(orders)).double()


def pixel_statistics(_case: Case, sample: Sample) -> Tensor:
    """Return what pixels alone tell, (N, 6 C): brightness, contrast, roughness, clipped values."""
    pixels = sample.pixels.double().cpu()
    found = [
        pixels,
        (pixels - pixels.mean((2, 3), keepdim=True)).square(),
        pixels.diff(dim=2).abs(),
        pixels.diff(dim=3).abs(),
        (pixels - median(pixels)).abs(),
        ((pixels == 0) | (pixels == 1)).double(),
    ]
    return torch.cat([statistic.mean((2, 3)) for statistic in found], dim=1)
