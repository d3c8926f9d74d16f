"""The networks whose guarding is priced, their guards, and images to send."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from defense.config import ModelSettings
from defense.errors import ConfigError, nearest
from defense.guard import Guard
from defense.offline.fit import fit_module

SIDE, CLASSES, FIT_IMAGES = 224, 10, 256
SETTINGS = {"flag": {"score": 1e9}, "reject": {"score": 1e9}}
"""Nothing is refused, so that all kinds answer the same requests alike."""


@dataclass(frozen=True)
class Subject:
    """A network to be priced.

    kinds: guarded servings by name, with the settings of each. requests: sent to a kind in a round;
    more where they would not fill two batches. budgeted: whether the budgets of serving are meant for
    it. card: of a network that has weights; else they are drawn at random, for what a network costs
    does not depend on what it learnt.
    """

    name: str
    title: str
    requests: int
    kinds: dict[str, dict[str, Any]]
    budgeted: bool = True
    blocks: tuple[str, tuple[int, ...]] | None = None
    card: Path | None = None
    guard: Path | None = None
    data: Path | None = None

    def settings_of(self, kind: str) -> ModelSettings:
        """Return how a guarded kind is configured."""
        return ModelSettings.model_validate(SETTINGS | self.kinds[kind])

    @property
    def model_source(self) -> str:
        """A model file, as a user of TorchServe writes it."""
        assert self.blocks is not None
        block, depths = self.blocks
        return (
            f"from torchvision.models.resnet import {block}, ResNet\n\n\n"
            "class BenchNet(ResNet):\n"
            "    def __init__(self):\n"
            f"        super().__init__({block}, {list(depths)}, num_classes={CLASSES})\n"
        )


GUARDED: dict[str, dict[str, Any]] = {"guarded": {}, "optimized": {"optimize": True}}
SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            "resnet18", "ResNet-18 at 224x224", 48, GUARDED, blocks=("BasicBlock", (2, 2, 2, 2))
        ),
        Subject(
            "resnet50", "ResNet-50 at 224x224", 24, GUARDED, blocks=("Bottleneck", (3, 4, 6, 3))
        ),
        Subject(
            "cifar10",
            "The shipped CIFAR-10 network at 32x32",
            128,
            {
                "guarded": {"witness": "always"},
                "second_look": {"witness": "second_look"},
                "off": {"witness": "off"},
                "optimized": {"witness": "off", "optimize": True},
            },
            budgeted=False,
            card=Path("model_store/cifar10.json"),
            guard=Path("model_store/cifar10-guard"),
            data=Path("data/cifar10.zip/test"),
        ),
    )
}


def subject_named(name: str) -> Subject:
    """Return the row `name` of the table; ConfigError names the nearest one otherwise."""
    if name not in SUBJECTS:
        raise ConfigError(f"no network '{name}' to measure{nearest(name, SUBJECTS)}")
    return SUBJECTS[name]


def bench_network(name: str, seed: int) -> nn.Module:
    """Return one of torchvision's networks with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net: nn.Module = torchvision.models.get_model(name, num_classes=CLASSES)
        return net.eval()


def bench_images(count: int, seed: int, side: int = SIDE) -> Tensor:
    """Return smooth random images (N, 3, side, side), normalised about as photographs are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 16, 16, generator=generator)
    return nn.functional.interpolate(coarse, (side, side), mode="bilinear")


def bench_guard(model: nn.Module) -> Guard:
    """Fit a default guard to one of torchvision's networks."""
    return fit_module(model, bench_images(FIT_IMAGES, 0).split(32))


def jpegs(count: int, seed: int) -> list[bytes]:
    """Return smooth random images of 256x256 pixels as JPEG files."""
    generator = np.random.default_rng(seed)
    draw = partial(generator.integers, 0, 256, (16, 16, 3), dtype=np.uint8)
    return [_jpeg(draw()) for _ in range(count)]


def _jpeg(coarse: Any) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(coarse).resize((256, 256), Image.Resampling.BILINEAR)
    image.save(file, "JPEG", quality=90)
    return file.getvalue()
