"""How near two requests are that differ as different images do: fitted to clean paths."""

from __future__ import annotations

import torch
from torch import Tensor

from defense.config import Probing
from defense.memory import Nearness, apart

SKETCH = 64
"""Numbers of a sketch: random projections keep distances to some tenth (Johnson & Lindenstrauss)."""
RARE = 0.01
SAFETY = 0.5
"""Two requests are near within this share of what only so rare clean images have a neighbour in."""


def fit_nearness(fit: Tensor, calibration: Tensor, *, seed: int) -> Nearness:
    """Fit to clean paths of different images: fit (n, D) for the scale, calibration (m, D).

    As many calibration images are compared as a memory holds by default: the more there are, the
    nearer is the nearest.
    """
    deviation = fit.double().std(dim=0, correction=0)
    varies = deviation > 1e-9 * deviation.max().clamp(min=1e-30)
    scale = torch.where(varies, 1 / deviation, 0.0)
    draw = torch.Generator().manual_seed(seed)
    directions = torch.randn(fit.shape[1], SKETCH, generator=draw, dtype=torch.float64)
    columns = int(varies.sum().clamp(min=1))
    projection = (scale[:, None] * directions / (columns * SKETCH) ** 0.5).float()
    known = Nearness(projection, 0.0).sketch(calibration[: Probing().remember])
    nearest = apart(known, known).fill_diagonal_(torch.inf).amin(dim=1)
    nearest = nearest[nearest.isfinite()]
    radius = float(SAFETY * nearest.double().quantile(RARE)) if len(nearest) else 0.0
    return Nearness(projection, radius)
