"""A small served model: a residual network and a handler as an archive would bring it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


class Residual(nn.Module):
    """A residual block of two convolutions whose one activation module runs twice, in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.conv2(self.relu(self.conv1(x))) + x)
        return out


class SmallNet(nn.Module):
    """A residual network for grey images of any size."""

    def __init__(self, classes: int = 10, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.act = nn.ReLU()
        self.block = Residual(width)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.head = nn.Linear(16 * width, classes)

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.pool(self.block(self.act(self.stem(x)))).flatten(1)
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


def seeded_net(seed: int = 0) -> SmallNet:
    """Return a network with weights drawn from a seed, ready to serve."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallNet().eval()


def images_like_noise(count: int, seed: int, *, size: int = 8) -> Tensor:
    """Return backbone inputs (count, 1, size, size) in [0, 1]."""
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(seed))


def encoded(array: np.ndarray[Any, Any], kind: str = "PNG") -> bytes:
    """Encode an array (H, W) or (H, W, 3) as an image file."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def png(image: Tensor) -> bytes:
    """Encode a grey image (1, H, W) in [0, 1] as an 8-bit PNG."""
    return encoded((image[0] * 255).round().to(torch.uint8).numpy())


def nan_image(size: int = 8) -> bytes:
    """Return a valid TIFF of floats with one NaN among its pixels."""
    array = np.full((size, size), 100, np.float32)
    array[2, 3] = np.nan
    return encoded(array, "TIFF")


class PngHandler:
    """An archive's own handler: decode, stack, run the model once, answer class and logit."""

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone

    def decode(self, payload: object) -> Tensor:
        assert isinstance(payload, bytes)
        with Image.open(io.BytesIO(payload)) as image:
            array = np.array(image, dtype=np.float32)
        return torch.from_numpy(array)[None] / 255

    def infer(self, batch: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.backbone(batch)
        return logits

    def postprocess(self, logits: Tensor) -> list[object]:
        return [{"class": int(row.argmax()), "logit": float(row.max())} for row in logits]

    def answer(self, payloads: Sequence[object]) -> list[object]:
        return self.postprocess(self.infer(torch.stack([self.decode(p) for p in payloads])))


@contextmanager
def counted_forwards(model: SmallNet) -> Iterator[list[int]]:
    """Collect the batch size of every forward pass that gets as far as the first layer."""
    sizes: list[int] = []
    handle = model.stem.register_forward_hook(lambda _m, _a, out: sizes.append(out.shape[0]))
    try:
        yield sizes
    finally:
        handle.remove()


def hook_count(model: nn.Module) -> int:
    """Return how many forward hooks of any kind a model and its parts carry."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
