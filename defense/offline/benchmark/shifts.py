"""Changes of clean images that no attacker made: what a guard must not take for an attack.

`SHIFTS` are five of the corruptions of CIFAR-10-C at its published severities (Hendrycks & Dietterich
2019, arXiv 1903.12261; numbers as in `make_cifar_c.py` of github.com/hendrycks/robustness). Images
end in rounded 8-bit values, where the published files are cut off to them. `regridded` and
`noise_controls` answer one question: does a detector see the attack, or that the picture is no
longer the JPEG that it once was?

All take pixels (N, C, H, W) in [0, 1], C of 1 or 3, and return such pixels in steps of 1/255, on the
CPU: what a lossless file of them holds.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import conv2d, pad

from defense.errors import DataError

LEVELS = 255
SEVERITIES: dict[str, tuple[float, ...]] = {
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),
    "jpeg": (80, 65, 58, 50, 40),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
}
"""Deviation of the noise, sigma of the blur in pixels, quality of the JPEG, shift of the HSV value,
factor of the contrast; by level, 1 to 5."""
ENCODED_AGAIN = 90
"""Quality of the JPEG that `regridded` writes: high, as of a picture that is passed on."""
HALVINGS = 16


def eight_bit(pixels: Tensor) -> Tensor:
    """Return what an 8-bit file keeps of these pixels."""
    return (pixels.clamp(0, 1) * LEVELS).round() / LEVELS


def gaussian_noise(images: Tensor, deviation: float, seed: int) -> Tensor:
    """Add independent Gaussian noise of one standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    return images + deviation * torch.randn(images.shape, generator=generator)


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Blur with a Gaussian cut off at four sigma; the edge is continued."""
    reach = int(4 * sigma + 0.5)
    steps = torch.arange(-reach, reach + 1, dtype=images.dtype)
    window = (-(steps**2) / (2 * sigma**2)).exp()
    window = window / window.sum()
    flat = pad(images.flatten(0, 1)[:, None], (reach,) * 4, mode="replicate")
    flat = conv2d(conv2d(flat, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))
    return flat.view(images.shape)


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Write every image as a JPEG and read it back."""
    arrays = (eight_bit(images) * LEVELS).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return torch.stack([_through_jpeg(array, quality) for array in arrays])


def _through_jpeg(array: np.ndarray, quality: int) -> Tensor:
    """Pixels (H, W, C) of 8 bits to pixels (C, H, W) in [0, 1]."""
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(
        buffer, "JPEG", quality=quality
    )
    with Image.open(buffer) as image:
        read = torch.from_numpy(np.array(image)).view(array.shape)
    return read.permute(2, 0, 1).float() / LEVELS


def brightness(images: Tensor, shift: float) -> Tensor:
    """Shift the HSV value, which is the largest channel; hue and saturation stay."""
    value = images.amax(dim=1, keepdim=True)
    brighter = (value + shift).clamp(max=1)
    return torch.where(value > 0, images * brighter / value.clamp(min=1 / LEVELS), brighter)


def contrast(images: Tensor, factor: float) -> Tensor:
    """Draw every pixel towards the mean of its channel."""
    mean = images.mean(dim=(2, 3), keepdim=True)
    return (images - mean) * factor + mean


_CHANGES: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "noise": gaussian_noise,
    "blur": lambda images, sigma, _seed: gaussian_blur(images, sigma),
    "jpeg": lambda images, quality, _seed: jpeg(images, int(quality)),
    "brightness": lambda images, shift, _seed: brightness(images, shift),
    "contrast": lambda images, factor, _seed: contrast(images, factor),
}


def _shift(name: str) -> Callable[[Tensor, int, int], Tensor]:
    def shift(images: Tensor, level: int, seed: int) -> Tensor:
        severities = SEVERITIES[name]
        if not 1 <= level <= len(severities):
            raise DataError(
                f"there is no level {level} of the shift '{name}'; "
                f"expected 1 (mild) to {len(severities)} (severe)"
            )
        return eight_bit(_CHANGES[name](_pictures(images), severities[level - 1], seed))

    return shift


SHIFTS: dict[str, Callable[[Tensor, int, int], Tensor]] = {name: _shift(name) for name in _CHANGES}
"""Name to a function of images, level from 1 to 5 and seed."""


def regridded(images: Tensor, *, seed: int) -> dict[str, Tensor]:
    """Return clean images that lost or changed the grid of blocks which JPEG left in them.

    `shifted`: moved one pixel down and right, the edge repeated. `dithered`: every value one step
    up or down at random. `encoded again`: through one more JPEG. Saved losslessly all three look
    the same to people, and to a detector that looks at what it should.
    """
    images = _pictures(images)
    generator = torch.Generator().manual_seed(seed)
    step = torch.randint(0, 2, images.shape, generator=generator) * 2 - 1
    moved = pad(images, (1, 0, 1, 0), mode="replicate")[..., :-1, :-1]
    return {
        "shifted": eight_bit(moved),
        "dithered": eight_bit(images + step / LEVELS),
        "encoded again": eight_bit(jpeg(images, ENCODED_AGAIN)),
    }


def noise_controls(images: Tensor, change: Tensor, *, norm: str, seed: int) -> dict[str, Tensor]:
    """Return clean images with random noise that is, image by image, as large as an attack's change.

    change: (N, C, H, W), attacked minus clean images. norm: in which the attack is bounded or made
    small, linf or l2. `uniform` has the attack's length in that norm and `gaussian` its L2 norm,
    after rounding and clipping. An L2 norm too small for noise in every
    value lands on the few where the noise is largest, as whole steps, because a file knows no less.
    """
    images, change = _pictures(images), change.detach().float().cpu()
    if change.shape != images.shape:
        raise DataError(
            f"noise controls need one change per image; got images of shape {tuple(images.shape)} "
            f"and changes of shape {tuple(change.shape)}"
        )
    generator = torch.Generator().manual_seed(seed)
    length = _length(change)
    bound = (change.abs().amax(dim=(1, 2, 3), keepdim=True) * LEVELS).round()
    uniform = torch.rand(images.shape, generator=generator)
    steps = (uniform * (2 * bound + 1)).floor().clamp(max=2 * bound) - bound
    normal = torch.randn(images.shape, generator=generator)
    even = eight_bit(images + steps / LEVELS)
    return {
        "uniform": even if norm == "linf" else _scaled_noise(images, 2 * uniform - 1, length),
        "gaussian": _scaled_noise(images, normal, length),
    }


def _scaled_noise(images: Tensor, noise: Tensor, length: Tensor) -> Tensor:
    """Scale noise, image by image, until what 8 bits keep of it has an L2 norm of `length` (N,).

    Rounding and clipping change the norm, but never let it fall as the scale grows: so halve.
    """
    low = torch.zeros(len(images), 1, 1, 1)
    high = torch.ones_like(low)  # noise of size 1 fills any picture
    enough = length * (1 - 1e-4)  # sums of equal steps differ in their last digits
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        short = (_length(eight_bit(images + middle * noise) - images) < enough).view_as(low)
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return eight_bit(images + high * noise)


def _length(change: Tensor) -> Tensor:
    """Return the L2 norm of every image's change (N, C, H, W): (N,)."""
    length: Tensor = torch.linalg.vector_norm(change, dim=(1, 2, 3))
    return length


def _pictures(images: Tensor) -> Tensor:
    """Check pixels and bring them to 8-bit steps on the CPU."""
    images = images.detach().float().cpu()
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise DataError(
            f"images to shift have shape {tuple(images.shape)}; expected (N, C, H, W) with 1 or 3 "
            "channels"
        )
    if len(images) and not (float(images.min()) >= 0 and float(images.max()) <= 1):
        raise DataError(
            f"images to shift have values from {float(images.min()):g} to {float(images.max()):g}; "
            "expected pixels from 0 to 1, not the network's normalised inputs"
        )
    return eight_bit(images)
