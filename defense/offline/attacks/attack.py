"""What an attack is: a value with one call, from pixels to 8-bit pixels that a client can send."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from defense.sites import device_of

LEVELS = 255
BATCH = 128

AttackFunction = Callable[[Tensor, Tensor], Tensor]
"""Attacked images (N, C, H, W) in [0, 1] of images and their labels (N,)."""


@dataclass(frozen=True)
class Attack:
    """A named attack with everything but the model: the table, and factories, make them."""

    name: str
    """Unique; carries its size in 1/255 where it has one, such as `pgd_8`."""
    eps: float | None
    """Bound of the change in units of `norm`; None where it minimises it, or knows no bound."""
    build: Callable[[nn.Module], AttackFunction]
    """Makes the attack on a model that takes pixels in [0, 1]. May draw from torch's generator."""
    family: str = ""
    """What leave-one-family-out leaves out: attacks of one kind. The name where none is given."""
    norm: str = "linf"
    """`linf`, `l2` or `l0`."""
    batch: int = BATCH
    """Images that are attacked at once."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", self.family or self.name)

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        """Return attacked images (N, C, H, W) in [0, 1] on the CPU, rounded to 8 bits.

        images: (N, C, H, W) in [0, 1]; labels: (N,). Those of an L-infinity bound stay in the ball
        exactly, those of an L2 bound up to the rounding. The model and all generators are left as
        they were; the same seed gives the same images.
        """
        device = device_of(model)
        with seeded(seed, device), frozen(model):
            attack = self.build(model)
            parts = [
                attack(x.contiguous().to(device), y.to(device)).detach().cpu()
                for x, y in zip(images.split(self.batch), labels.split(self.batch), strict=True)
            ]
        return eight_bit(torch.cat(parts), images, self.eps if self.norm == "linf" else None)


def eight_bit(attacked: Tensor, images: Tensor, eps: float | None) -> Tensor:
    """Round to 8 bits without leaving the L-infinity ball of radius eps, if there is one."""
    rounded = (attacked * LEVELS).round()
    if eps is not None:
        bound = eps * LEVELS + 1e-4
        centre = images.to(attacked.device) * LEVELS
        rounded = rounded.clamp((centre - bound).ceil(), (centre + bound).floor())
    return rounded.clamp(0, LEVELS) / LEVELS


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed every generator that an attack may draw from, and give them back as they were."""
    kept = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode without gradients of its weights, and give it back as it was.

    Some attacks call `backward`, which would leave gradients in the weights, at a third more time.
    """
    training = {module: module.training for module in model.modules()}
    learnt = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        model.eval()
        for weight in learnt:
            weight.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for weight in learnt:
            weight.requires_grad_(True)


def uniform_noise(images: Tensor, *, eps: float, seed: int) -> Tensor:
    """Return images with uniform noise of the same bound: the false-alarm control of every attack."""
    generator = torch.Generator().manual_seed(seed)
    noise = (torch.rand(images.shape, generator=generator) * 2 - 1) * eps
    return eight_bit((images.cpu() + noise).clamp(0, 1), images, eps)
