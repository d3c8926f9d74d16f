"""The shift and scale of an archive's preprocessing are measured, not read from its code."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from defense.errors import ArchiveError
from defense.offline.pixels import PixelSpace, deliverable, find_pixel_space
from tests.served import encoded, png

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Archive:
    """A served model with any preprocessing."""

    def __init__(self, preprocess: Callable[[Image.Image], Tensor]) -> None:
        self.backbone: nn.Module = nn.Flatten()
        self.preprocess = preprocess
        # A parameter, because a backbone without any has no device.
        self.backbone.register_buffer("b", torch.zeros(1))

    def answer(self, payloads: Sequence[bytes]) -> list[object]:
        images = [Image.open(io.BytesIO(payload)) for payload in payloads]
        return list(self.backbone(torch.stack([self.preprocess(image) for image in images])))


def array(image: Image.Image, mode: str) -> Tensor:
    pixels = torch.from_numpy(np.array(image.convert(mode), dtype=np.float32)) / 255
    return pixels[None] if mode == "L" else pixels.permute(2, 0, 1)


def colour(image: Image.Image) -> Tensor:
    return (array(image, "RGB") - MEAN[:, None, None]) / STD[:, None, None]


def grey(image: Image.Image) -> Tensor:
    return array(image, "L") * 2 - 1


def resized(image: Image.Image) -> Tensor:
    return colour(image.convert("RGB").resize((12, 12)).crop((2, 2, 10, 10)))


def repeated_grey(image: Image.Image) -> Tensor:
    """Sees grey whatever comes, in three channels."""
    return array(image, "L").repeat(3, 1, 1)


def unconverted_grey(image: Image.Image) -> Tensor:
    """Takes grey files alone, and repeats them."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).expand(3, 8, 8) / 255


def negative(image: Image.Image) -> Tensor:
    return 1 - array(image, "L")


GREY_FILE = png(torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)))
COLOUR_FILE = encoded(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    ("preprocess", "example", "scale", "shift", "mode"),
    [
        (colour, COLOUR_FILE, 1 / STD, -MEAN / STD, "RGB"),
        (colour, GREY_FILE, 1 / STD, -MEAN / STD, "RGB"),
        (resized, COLOUR_FILE, 1 / STD, -MEAN / STD, "RGB"),
        (grey, GREY_FILE, torch.tensor([2.0]), torch.tensor([-1.0]), "L"),
        (grey, COLOUR_FILE, torch.tensor([2.0]), torch.tensor([-1.0]), "L"),
        (negative, GREY_FILE, torch.tensor([-1.0]), torch.tensor([1.0]), "L"),
    ],
)
def test_shift_and_scale_are_found_per_channel(
    preprocess: Callable[[Image.Image], Tensor],
    example: bytes,
    scale: Tensor,
    shift: Tensor,
    mode: str,
) -> None:
    space = find_pixel_space(Archive(preprocess), example)
    torch.testing.assert_close(space.scale.flatten(), scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(space.shift.flatten(), shift, rtol=1e-4, atol=1e-5)
    assert space.mode == mode


def gamma(image: Image.Image) -> Tensor:
    return array(image, "L") ** 2.2


def standardised(image: Image.Image) -> Tensor:
    pixels = array(image, "L")
    return (pixels - pixels.mean()) / pixels.std()


def centred(image: Image.Image) -> Tensor:
    pixels = array(image, "L")
    return pixels - pixels.mean()


def vignette(image: Image.Image) -> Tensor:
    return array(image, "L") * torch.linspace(0.5, 1, 8)


def flat(image: Image.Image) -> Tensor:
    return array(image, "L").flatten()


def with_alpha(image: Image.Image) -> Tensor:
    return torch.cat([array(image, "RGB"), torch.ones(1, 8, 8)])


@pytest.mark.parametrize("preprocess", [gamma, standardised, centred, vignette, flat, with_alpha])
def test_preprocessing_that_is_no_shift_and_scale_is_an_error(
    preprocess: Callable[[Image.Image], Tensor],
) -> None:
    with pytest.raises(
        ArchiveError, match="no shift and scale of pixels per channel, so attacks on"
    ):
        find_pixel_space(Archive(preprocess), GREY_FILE)


def pixels_of(channels: int, *, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, channels, 8, 8), generator=draw) / 255


@pytest.mark.parametrize(
    ("preprocess", "example", "channels", "arrives"),
    [
        (colour, COLOUR_FILE, 3, True),
        (colour, GREY_FILE, 3, True),
        (grey, GREY_FILE, 1, True),
        (grey, COLOUR_FILE, 1, True),
        (resized, COLOUR_FILE, 3, False),
        (repeated_grey, GREY_FILE, 3, False),
        (unconverted_grey, GREY_FILE, 3, False),
    ],
)
def test_pixels_are_deliverable_where_a_png_of_them_arrives_unchanged(
    preprocess: Callable[[Image.Image], Tensor], example: bytes, channels: int, arrives: bool
) -> None:
    archive = Archive(preprocess)
    space = find_pixel_space(archive, example)
    assert deliverable(archive, space, pixels_of(channels)) is arrives


def test_images_of_another_size_than_the_input_are_not_deliverable() -> None:
    def enlarged(image: Image.Image) -> Tensor:
        return array(image.resize((16, 16)), "L")

    archive = Archive(enlarged)
    space = find_pixel_space(archive, GREY_FILE)
    assert not deliverable(archive, space, pixels_of(1))


def test_pixels_and_inputs_are_each_others_inverse() -> None:
    space = PixelSpace((1 / STD).view(-1, 1, 1), (-MEAN / STD).view(-1, 1, 1), "RGB")
    pixels = pixels_of(3)
    torch.testing.assert_close(space.to_pixels(space.to_input(pixels)), pixels)


def test_inputs_beyond_the_range_become_the_nearest_pixel() -> None:
    space = PixelSpace(torch.ones(1, 1, 1), torch.zeros(1, 1, 1), "L")
    inputs = torch.tensor([-3.0, 0.5001, 7.0]).view(1, 1, 1, 3)
    torch.testing.assert_close(space.to_pixels(inputs).flatten(), torch.tensor([0, 128 / 255, 1]))


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_a_png_holds_the_pixels_themselves(mode: str, channels: int) -> None:
    space = PixelSpace(torch.ones(channels, 1, 1), torch.zeros(channels, 1, 1), mode)
    pixels = pixels_of(channels)
    for image, file in zip(pixels, space.pngs(pixels), strict=True):
        with Image.open(io.BytesIO(file)) as found:
            assert (found.format, found.mode) == ("PNG", mode)
            torch.testing.assert_close(array(found, mode), image)


def test_the_model_of_pixels_answers_as_the_backbone_does_for_its_inputs() -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Dropout(0.5))
    space = PixelSpace(torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), -1.0), "L")
    model = space.model(backbone)
    pixels = pixels_of(1).requires_grad_()
    answer = model(pixels)
    torch.testing.assert_close(answer, backbone(space.to_input(pixels)))
    answer.sum().backward()
    assert pixels.grad is not None
    assert not model.training
