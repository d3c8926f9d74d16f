"""Between image files and backbone inputs: where attacks work, and how what they make is delivered.

Vision preprocessing ends in a shift and scale per channel. A single-colour image stays one under
resizing and cropping, so a few of them reveal shift and scale without knowing the code. An attacked
image is delivered as a PNG through the archive's own preprocessing wherever that gives back exactly
what was attacked, else at the backbone's input; a report says which.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from defense.errors import ArchiveError, DataError
from defense.offline.collect import Served, backbone_inputs
from defense.sites import device_of

TOLERANCE = 2e-3
LEVELS = 255


@dataclass(frozen=True)
class PixelSpace:
    """input = scale x pixel + shift, per channel. scale, shift: (C, 1, 1); `mode` is PIL's, L or RGB."""

    scale: Tensor
    shift: Tensor
    mode: str

    def to_input(self, pixels: Tensor) -> Tensor:
        """Pixels (N, C, H, W) in [0, 1] to backbone inputs."""
        return pixels * self.scale.to(pixels.device) + self.shift.to(pixels.device)

    def to_pixels(self, inputs: Tensor) -> Tensor:
        """Backbone inputs (N, C, H, W) to pixels in [0, 1], rounded to 8 bits."""
        pixels = (inputs.float() - self.shift) / self.scale
        return (pixels.clamp(0, 1) * LEVELS).round() / LEVELS

    def model(self, backbone: nn.Module) -> nn.Module:
        """Return the backbone as a function of pixels in [0, 1], for attacks."""
        return _PixelModel(backbone, self.scale, self.shift)

    def png(self, pixels: Tensor) -> bytes:
        """Encode one image (C, H, W) in [0, 1] as an 8-bit PNG."""
        array = (pixels * LEVELS).round().to(torch.uint8).numpy()
        image = Image.fromarray(array[0] if self.mode == "L" else array.transpose(1, 2, 0))
        return _encoded(image)

    def pngs(self, pixels: Tensor) -> list[bytes]:
        """Encode images (N, C, H, W) in [0, 1]."""
        return [self.png(image) for image in pixels]


class _PixelModel(nn.Module):
    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: nn.Module, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        device = device_of(backbone)
        self.register_buffer("scale", scale.to(device))
        self.register_buffer("shift", shift.to(device))
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.backbone(pixels * self.scale + self.shift)  # type: ignore[no-any-return]


def find_pixel_space(served: Served, example: bytes) -> PixelSpace:
    """Measure the shift and scale of an archive's preprocessing.

    Raises ArchiveError where it is no shift and scale of pixels: then no pixel attack is defined.
    """
    with Image.open(io.BytesIO(example)) as image:
        mode, size = ("L" if image.mode in ("L", "1", "I;16") else "RGB"), image.size
    levels = torch.tensor([0.0, 51.0, 102.0, 255.0])
    flat = [_encoded(Image.new(mode, size, _colour(mode, int(level)))) for level in levels]
    inputs = backbone_inputs(served, flat).double()
    if len(inputs) != len(flat):  # several views of a request are no image of it
        raise _not_affine()
    values = inputs.flatten(2).mean(dim=2) if inputs.dim() == 4 else inputs[:, :0]
    x = (levels / LEVELS).double()
    if values.shape[1] not in (1, 3):
        raise _not_affine()
    scale = (values[-1] - values[0]) / (x[-1] - x[0])
    shift = values[0]
    predicted = x[:, None] * scale + shift
    spread = (inputs - predicted[:, :, None, None]).abs().max()
    exact = float(spread) <= TOLERANCE * float(scale.abs().max())  # false for NaN
    if not exact or bool((scale == 0).any()):
        raise _not_affine()
    mode = "L" if values.shape[1] == 1 else "RGB"
    return PixelSpace(scale.float().view(-1, 1, 1), shift.float().view(-1, 1, 1), mode)


def deliverable(served: Served, space: PixelSpace, pixels: Tensor) -> bool:
    """Say whether PNGs of these pixels (N, C, H, W) reach the backbone as exactly these pixels."""
    rounded = (pixels * LEVELS).round() / LEVELS
    try:
        arrived = backbone_inputs(served, space.pngs(rounded))
    except (ArchiveError, DataError):
        return False
    want = space.to_input(rounded)
    if arrived.shape != want.shape:
        return False
    return bool(((arrived - want) / space.scale).abs().max() < 0.1 / LEVELS)


def _colour(mode: str, level: int) -> int | tuple[int, int, int]:
    return level if mode == "L" else (level, level, level)


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _not_affine() -> ArchiveError:
    return ArchiveError(
        "the archive's preprocessing is no shift and scale of pixels per channel, so attacks on "
        "pixels are not defined for it; evaluate without attacks"
    )
