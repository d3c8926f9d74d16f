"""An attack's images lie in its ball and in the pixels' range after rounding; at eps 0 nothing moves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from defense.offline.attacks import make_attack, uniform_noise
from tests.served import SmallNet

BOUNDED = ("fgsm", "bim", "pgd")
radii = st.one_of(st.floats(0, 1), st.integers(0, 64).map(lambda step: step / 255))


def eight_bit_images(seed: int, count: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=draw).float()
    # Black and white pixels are where bounds bite.
    return images.masked_fill(torch.rand(images.shape, generator=draw) < 0.2, 255.0) / 255


def holds(changed: Tensor, images: Tensor, eps: float) -> bool:
    """Say whether images lie on 8-bit steps, in [0, 1] and within eps of the original."""
    steps = changed * 255
    return (
        bool(((changed >= 0) & (changed <= 1)).all())
        and bool((steps - steps.round()).abs().max() < 1e-3)
        and bool((changed.double() - images.double()).abs().max() <= eps + 1e-6)
    )


@pytest.mark.parametrize("name", BOUNDED)
@given(eps=radii, seed=st.integers(0, 2**31))
def test_an_attack_stays_in_its_ball_and_in_range_on_eight_bit_steps(
    trained: SmallNet, name: str, eps: float, seed: int
) -> None:
    images = eight_bit_images(seed)
    labels = trained(images).argmax(1)
    changed = make_attack(name, eps=eps).run(trained, images, labels, seed=seed)
    assert holds(changed, images, eps)


@pytest.mark.parametrize("name", BOUNDED)
@given(seed=st.integers(0, 2**31))
def test_an_attack_of_no_size_changes_nothing(trained: SmallNet, name: str, seed: int) -> None:
    images = eight_bit_images(seed)
    changed = make_attack(name, eps=0.0).run(trained, images, trained(images).argmax(1), seed=seed)
    assert torch.equal((changed * 255).round(), (images * 255).round())


@given(eps=radii, seed=st.integers(0, 2**31))
def test_noise_stays_in_its_ball_and_in_range_on_eight_bit_steps(eps: float, seed: int) -> None:
    images = eight_bit_images(seed)
    assert holds(uniform_noise(images, eps=eps, seed=seed), images, eps)
    assert torch.equal(
        (uniform_noise(images, eps=0.0, seed=seed) * 255).round(), (images * 255).round()
    )
