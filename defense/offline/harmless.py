"""Changes of clean images that a client may make without ill intent: what a fit calls clean."""

from __future__ import annotations

from torch import Tensor

from defense.offline.attacks import uniform_noise
from defense.offline.benchmark.shifts import LEVELS, SHIFTS, regridded

MILD = (1, 2)
"""Levels of every shift that a guard is fitted to; stronger ones are left to be measured."""
STEPS = (4, 8)
"""Bounds of the uniform noise, in 1/255: as large as the attacks of the same bound."""

CHANGES = 3 + len(SHIFTS) * len(MILD) + len(STEPS)
"""How many changes `harmless` makes."""


def harmless(pixels: Tensor, seed: int) -> dict[str, Tensor]:
    """Return changes of `pixels` (N, C, H, W) in [0, 1] by name, each of that shape, in 8-bit steps.

    Moved or dithered by one step, encoded again, noisy, blurred: the same picture to people.
    """
    changed = regridded(pixels, seed=seed)
    changed |= {
        f"{name} {level}": shift(pixels, level, seed)
        for name, shift in SHIFTS.items()
        for level in MILD
    }
    for steps in STEPS:
        noisy = uniform_noise(pixels, eps=steps / LEVELS, seed=seed + steps)
        changed[f"uniform noise {steps}/{LEVELS}"] = noisy
    return changed
