"""Which image serves what: no image serves two ends, and one part stays sealed until the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defense.errors import DataError

SEALED_PART = (5, 5)
"""`ImageSet.part` of the images that nothing is fitted, calibrated or tuned on."""
ATTACKED_SHARE = 0.3
"""Of the images that are not sealed: those that have an attacked twin for every attack."""
FIT_SHARE = 1 / 3
"""Of the attacked images: those whose twins a detector may learn from. The others test it."""
POOL_SEED = 2718
"""Pools are the same for every seed of a study, so that attacks on them can be kept."""
LEAST = 100


@dataclass(frozen=True)
class Pools:
    """Row numbers of images in random order, so that the first few are of all classes.

    sealed: judged once, at the end. attacked: they have attacked twins. plain: the rest.
    """

    sealed: Tensor
    attacked: Tensor
    plain: Tensor


@dataclass(frozen=True)
class Split:
    """One seed's use of the pools: row numbers of images, in random order.

    views: clean images that a detector learns what is usual from. fit: images whose attacked twins
    it may learn from. calibration: clean images that fix thresholds. test: what is reported.
    """

    views: Tensor
    fit: Tensor
    calibration: Tensor
    test: Tensor

    def parts(self) -> dict[str, Tensor]:
        """Return the row numbers by what they serve."""
        return {
            "views": self.views,
            "fit": self.fit,
            "calibration": self.calibration,
            "test": self.test,
        }


def make_pools(sealed: Tensor) -> Pools:
    """Part images, of which `sealed` (N,) marks those to keep sealed; DataError where they are few."""
    open_rows = (~sealed).nonzero().squeeze(1)
    order = open_rows[_shuffled(len(open_rows), POOL_SEED)]
    cut = round(ATTACKED_SHARE * len(order))
    sealed_rows = sealed.nonzero().squeeze(1)
    pools = Pools(sealed_rows[_shuffled(len(sealed_rows), POOL_SEED)], order[:cut], order[cut:])
    if min(len(pools.sealed), len(pools.attacked)) < LEAST:
        raise DataError(
            f"{len(sealed)} images are too few for a study: {len(pools.sealed)} would stay sealed and "
            f"{len(pools.attacked)} be attacked, and both take {LEAST}; give more images"
        )
    return pools


def make_split(pools: Pools, seed: int) -> Split:
    """Part the attacked pool into fit and test, the plain one into views and calibration."""
    attacked = pools.attacked[_shuffled(len(pools.attacked), seed)]
    plain = pools.plain[_shuffled(len(pools.plain), seed)]
    cut, half = round(FIT_SHARE * len(attacked)), len(plain) // 2
    return Split(
        views=plain[:half],
        fit=attacked[:cut],
        calibration=plain[half:],
        test=attacked[cut:],
    )


def _shuffled(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
