"""Shifts and controls: 8-bit pictures of a known size of change."""

from __future__ import annotations

import colorsys

import pytest
import torch
from torch import Tensor

from defense.errors import DataError
from defense.offline.benchmark.shifts import (
    SEVERITIES,
    SHIFTS,
    eight_bit,
    noise_controls,
    regridded,
)


def pictures(count: int = 6, channels: int = 3, side: int = 16) -> Tensor:
    """Return smooth random pictures (count, channels, side, side) of 8 bits, away from the limits."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 4, 4, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return eight_bit(0.3 + 0.4 * smooth)


def change(name: str, level: int, images: Tensor) -> float:
    return float((SHIFTS[name](images, level, 0) - images).square().mean().sqrt())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_gives_eight_bit_pictures_and_grows_with_its_level(
    name: str, channels: int
) -> None:
    images = pictures(channels=channels)
    for level in range(1, 6):
        shifted = SHIFTS[name](images, level, 3)
        assert shifted.shape == images.shape
        assert torch.equal(shifted, eight_bit(shifted))
        assert torch.equal(shifted, SHIFTS[name](images, level, 3))
    sizes = [change(name, level, images) for level in range(1, 6)]
    assert sizes[0] > 0
    assert sizes == sorted(sizes)


def test_every_shift_has_the_five_published_levels() -> None:
    assert list(SHIFTS) == ["noise", "blur", "jpeg", "brightness", "contrast"]
    assert {name: len(levels) for name, levels in SEVERITIES.items()} == dict.fromkeys(SHIFTS, 5)


def test_noise_has_the_deviation_of_its_level_and_depends_on_the_seed() -> None:
    flat = torch.full((4, 3, 32, 32), 0.5)
    noisy = SHIFTS["noise"](flat, 3, 0)
    assert float((noisy - flat).std()) == pytest.approx(0.08, rel=0.05)
    assert not torch.equal(noisy, SHIFTS["noise"](flat, 3, 1))


def test_blur_spreads_a_point_as_a_gaussian_and_leaves_a_flat_picture_alone() -> None:
    flat = eight_bit(torch.full((1, 3, 9, 9), 0.4))
    assert torch.equal(SHIFTS["blur"](flat, 5, 0), flat)
    point = torch.zeros(1, 1, 9, 9)
    point[0, 0, 4, 4] = 1
    found = SHIFTS["blur"](point, 5, 0)[0, 0]  # sigma of one pixel
    centre = 1 / (2 * torch.pi)
    assert found[4, 4] == pytest.approx(centre, abs=0.003)
    assert found[4, 5] == pytest.approx(centre * 0.6065, abs=0.003)
    assert found[3, 5] == pytest.approx(centre * 0.3679, abs=0.003)


def test_brightness_shifts_the_value_and_keeps_hue_and_saturation() -> None:
    colours = eight_bit(torch.tensor([[0.2, 0.5, 0.1], [0.9, 0.3, 0.6], [0.0, 0.0, 0.0]]))
    found = SHIFTS["brightness"](colours.T.reshape(1, 3, 1, 3), 4, 0)[0, :, 0].T
    for before, after in zip(colours.tolist(), found.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.2))
        assert after == pytest.approx(expected, abs=0.5 / 255 + 1e-6)


def test_contrast_scales_around_the_mean_of_a_channel() -> None:
    images = pictures()
    found = SHIFTS["contrast"](images, 2, 0)
    mean = images.mean(dim=(2, 3))
    assert torch.allclose(found.mean(dim=(2, 3)), mean, atol=1e-3)
    ratio = found.std(dim=(2, 3)) / images.std(dim=(2, 3))
    assert torch.allclose(ratio, torch.full_like(ratio, 0.5), atol=0.02)


def test_a_picture_that_was_a_jpeg_survives_the_same_jpeg() -> None:
    once = SHIFTS["jpeg"](pictures(channels=1), 1, 0)
    again = SHIFTS["jpeg"](once, 1, 0)
    assert float((again - once).abs().mean()) < 0.2 / 255
    assert change("jpeg", 1, pictures(channels=1)) > 0.2 / 255


def test_a_level_that_does_not_exist_is_an_error() -> None:
    for level in (0, 6):
        with pytest.raises(DataError, match=rf"no level {level} of the shift 'blur'; expected 1"):
            SHIFTS["blur"](pictures(), level, 0)


def test_what_is_no_picture_is_an_error() -> None:
    with pytest.raises(DataError, match=r"have shape \(3, 8, 8\); expected \(N, C, H, W\)"):
        SHIFTS["blur"](torch.zeros(3, 8, 8), 1, 0)
    with pytest.raises(DataError, match="values from -1 to 1; expected pixels from 0 to 1"):
        regridded(torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2), seed=0)
    with pytest.raises(DataError, match="values from nan to nan; expected pixels"):
        regridded(torch.full((1, 1, 2, 2), float("nan")), seed=0)


def test_regridded_pictures_are_moved_dithered_and_encoded_again() -> None:
    images = pictures()
    found = regridded(images, seed=1)
    assert torch.equal(found["shifted"][..., 1:, 1:], images[..., :-1, :-1])
    assert torch.equal(found["shifted"][..., 0, 1:], images[..., 0, :-1])
    steps = ((found["dithered"] - images) * 255).round()
    assert steps.unique().tolist() == [-1, 1]
    assert abs(float(steps.mean())) < 0.1
    assert 0 < float((found["encoded again"] - images).abs().max()) < 0.1
    assert all(torch.equal(changed, eight_bit(changed)) for changed in found.values())
    assert torch.equal(regridded(images, seed=1)["dithered"], found["dithered"])


def test_noise_controls_have_the_norms_of_the_attack_image_by_image() -> None:
    images = pictures(count=3, side=24)
    delta = torch.zeros_like(images)
    delta[1] = 8 / 255 * torch.where(images[1] > 0.5, -1, 1)
    delta[2, 0, :4, :4] = 30 / 255  # few values, much each
    found = noise_controls(images, delta, norm="linf", seed=4)
    uniform, gaussian = (found[name] - images for name in ("uniform", "gaussian"))
    assert torch.allclose(uniform.abs().amax((1, 2, 3)), delta.abs().amax((1, 2, 3)))
    assert torch.allclose(gaussian.flatten(1).norm(dim=1), delta.flatten(1).norm(dim=1), rtol=0.01)
    assert all(torch.equal(noisy, eight_bit(noisy)) for noisy in found.values())
    assert all(torch.equal(noisy[0], images[0]) for noisy in found.values())
    assert torch.equal(
        noise_controls(images, delta, norm="linf", seed=4)["gaussian"], found["gaussian"]
    )


def test_uniform_noise_of_an_attack_that_minimises_its_length_has_that_length() -> None:
    images = pictures(count=2, side=24)
    delta = torch.zeros_like(images)
    delta[:, 0, :4, :4] = 30 / 255  # one pixel of it is no measure of its size
    uniform = noise_controls(images, delta, norm="l2", seed=0)["uniform"] - images
    assert torch.allclose(uniform.flatten(1).norm(dim=1), delta.flatten(1).norm(dim=1), rtol=0.01)
    assert float(uniform.abs().max()) < 15 / 255


def test_noise_smaller_than_half_a_step_everywhere_is_still_noise() -> None:
    images = pictures(count=1)
    delta = torch.zeros_like(images)
    delta[0, 0, 0, :9] = 1 / 255  # an L2 norm of three steps over 768 values
    gaussian = noise_controls(images, delta, norm="l2", seed=0)["gaussian"] - images
    assert float(gaussian.norm()) == pytest.approx(3 / 255, rel=0.05)


def test_a_change_of_another_shape_is_an_error() -> None:
    with pytest.raises(DataError, match="noise controls need one change per image; got images of"):
        noise_controls(pictures(3), torch.zeros(2, 3, 16, 16), norm="l2", seed=0)
