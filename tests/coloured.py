"""Tiny images that a tiny network learns in seconds, for tests of training."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from torch import nn

from defense.offline.networks import Architecture, CifarResNet
from defense.offline.training import LabelledImages, TrainingSettings

TINY = Architecture(depths=(1, 2), widths=(6, 8), stem=4, classes=3)
SETTINGS = TrainingSettings(epochs=4, batch_size=16, small_epochs=1, small_size=8, crop=2, seed=3)


def coloured_images(count: int = 50, side: int = 12) -> LabelledImages:
    """Return noisy images whose brightest channel is their class."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    pixels = torch.randint(0, 90, (count, 3, side, side), generator=draw)
    pixels[torch.arange(count), labels] += 120
    return LabelledImages(pixels.to(torch.uint8), labels, ("red", "green", "blue"))


def tiny_network(architecture: Architecture = TINY) -> CifarResNet:
    """Return a network whose first weights are always the same."""
    torch.manual_seed(5)
    return CifarResNet(architecture)


def silent() -> Console:
    """Return a console that nobody reads."""
    return Console(file=StringIO())


def interrupt_at(network: nn.Module, call: int) -> Callable[[], None]:
    """Make the network's n-th forward pass raise KeyboardInterrupt; call the result to undo it."""
    calls = 0

    def hook(_module: nn.Module, _args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt

    return network.register_forward_pre_hook(hook).remove


def same_tensors(first: nn.Module, second: nn.Module) -> bool:
    """Tell whether two networks agree in every bit of every tensor."""
    other = second.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


def write_folder(root: Path, split: str, images: LabelledImages) -> None:
    """Write images as `root/split/CLASS/NUMBER.png`."""
    for number, (pixels, label) in enumerate(zip(images.pixels, images.labels, strict=True)):
        file = root / split / images.classes[int(label)] / f"{number:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file)
