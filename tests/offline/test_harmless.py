"""What a client may send without ill intent: the same picture, in 8-bit steps, each time the same."""

from __future__ import annotations

import pytest
import torch

from defense.offline.harmless import CHANGES, harmless

PIXELS = torch.randint(0, 256, (6, 3, 12, 12), generator=torch.Generator().manual_seed(0)) / 255


def test_every_change_leaves_pictures_of_eight_bits_and_of_their_shape() -> None:
    changed = harmless(PIXELS, 0)
    assert len(changed) == CHANGES
    for name, images in changed.items():
        assert images.shape == PIXELS.shape, name
        assert bool(((images >= 0) & (images <= 1)).all()), name
        torch.testing.assert_close(images * 255, (images * 255).round(), rtol=0, atol=1e-4)
        assert bool((images != PIXELS).any(dim=1).flatten(1).any(dim=1).all()), name


def test_the_same_seed_makes_the_same_changes_and_another_one_other_noise() -> None:
    first, again, other = harmless(PIXELS, 1), harmless(PIXELS, 1), harmless(PIXELS, 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("dithered", "noise 1", "uniform noise 8/255"):
        assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("steps", [4, 8])
def test_uniform_noise_stays_within_its_bound(steps: int) -> None:
    change = (harmless(PIXELS, 0)[f"uniform noise {steps}/255"] - PIXELS) * 255
    assert float(change.abs().amax()) == pytest.approx(steps, abs=1e-3)
