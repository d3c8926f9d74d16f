"""A small residual network for small images (He et al., https://arxiv.org/abs/1512.03385).

Two departures make it cheap on a CPU: a stage halves the image with max pooling inside its first
block instead of a strided convolution, and only the stem works at full resolution.

This file imports torch alone: archives carry it as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """Shape of a `CifarResNet`: blocks and channels per stage, channels of the stem, classes."""

    depths: tuple[int, ...] = (1, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256)
    stem: int = 32
    classes: int = 10

    def __post_init__(self) -> None:
        """Refuse shapes that describe no network."""
        if not self.depths or len(self.depths) != len(self.widths):
            raise ValueError(
                f"a network needs one depth and one width per stage, got depths={self.depths} "
                f"and widths={self.widths}"
            )
        if min(*self.depths, *self.widths, self.stem, self.classes) < 1:
            raise ValueError(f"every number of an architecture must be at least 1, got {self}")


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation per channel, of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Map uint8 `(N, C, H, W)` to normalised float32 of the same shape, channels last."""
        mean = torch.tensor(self.mean, device=pixels.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(1, -1, 1, 1)
        scaled = (pixels.float() / 255 - mean) / std
        return scaled.contiguous(memory_format=torch.channels_last)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; with `halve` the image loses half its side."""

    def __init__(self, inputs: int, outputs: int, *, halve: bool) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, outputs, 3)
        self.pool = nn.MaxPool2d(2) if halve else nn.Identity()
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = convolution(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, halve=halve)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, inputs, H, W)` to `(N, outputs, H', W')`: half the side, or the same."""
        inner = self.relu1(self.bn1(self.pool(self.conv1(x))))
        return self.relu2(self.bn2(self.conv2(inner)) + self.shortcut(x))  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """Residual classifier of images whose side is a multiple of `2 ** len(depths)`."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.stem = nn.Sequential(
            convolution(3, architecture.stem, 3), nn.BatchNorm2d(architecture.stem), nn.ReLU()
        )
        self.stages = nn.Sequential()
        channels = architecture.stem
        for depth, width in zip(architecture.depths, architecture.widths, strict=True):
            first = BasicBlock(channels, width, halve=True)
            rest = [BasicBlock(width, width, halve=False) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(first, *rest))
            channels = width
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, architecture.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images `(N, 3, H, W)` to logits `(N, classes)`."""
        features = self.pool(self.stages(self.stem(x)))
        return self.head(features.flatten(1))  # type: ignore[no-any-return]


def convolution(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    """Return a convolution that keeps the image's size; the batch norm behind it is its bias."""
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)


def shortcut(inputs: int, outputs: int, *, halve: bool) -> nn.Module:
    """Return the identity where shapes allow it, else a pooled 1x1 projection."""
    if inputs == outputs and not halve:
        return nn.Identity()
    pool = nn.AvgPool2d(2) if halve else nn.Identity()
    return nn.Sequential(pool, convolution(inputs, outputs, 1), nn.BatchNorm2d(outputs))


NETWORKS: dict[str, type[CifarResNet]] = {"CifarResNet": CifarResNet}
"""By the name that a card gives; all start from the weights of a plain one."""
