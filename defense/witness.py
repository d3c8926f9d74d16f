"""The witness: a second, small classifier whose answer stands beside the backbone's.

What fools one network need not fool another (Szegedy et al., https://arxiv.org/abs/1312.6199, found
that it often does; how often is for an evaluation to say). A witness reads what the backbone reads;
its logits are evidence for a detector and never an answer.

It is data: the weights of a residual classifier, batch norm folded in, run as plain functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from defense.errors import ArtifactError
from defense.state import to_device


@dataclass(frozen=True)
class Layer:
    """weight: (out, in, k, k) of a convolution or (out, in) of a linear map; bias: (out,)."""

    weight: Tensor
    bias: Tensor

    def convolve(self, x: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H, W)."""
        return functional.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


@dataclass(frozen=True)
class Block:
    """Two 3x3 convolutions beside a shortcut; with `halve` the image loses half its side.

    sign: (out, 1, 1) of +1 and -1, what channels are multiplied by behind the first pooling; a batch
    norm whose factor is negative cannot be folded into a convolution in front of max pooling.
    """

    conv1: Layer
    conv2: Layer
    shortcut: Layer | None
    sign: Tensor | None
    halve: bool

    def run(self, x: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H', W')."""
        inner, beside = self.conv1.convolve(x), x
        if self.halve:
            inner, beside = functional.max_pool2d(inner, 2), functional.avg_pool2d(x, 2)
        if self.sign is not None:
            inner = inner * self.sign
        if self.shortcut is not None:
            beside = self.shortcut.convolve(beside)
        return functional.relu(self.conv2.convolve(functional.relu(inner)) + beside)


@dataclass(frozen=True)
class Witness:
    """A folded residual classifier; `defense.offline.witness.fold` makes one.

    side: of the square images that it reads; others are resized. scale, shift: (C, 1, 1), which turn
    the backbone's input into the witness's own: scale x input + shift. Weights may be stored in half
    precision; they are run in float32.
    """

    stem: Layer
    blocks: tuple[Block, ...]
    head: Layer
    side: int
    scale: Tensor
    shift: Tensor

    def __post_init__(self) -> None:
        if self.side < 1:
            raise ArtifactError(f"a witness reads images of side {self.side}; fit the guard again")

    @property
    def classes(self) -> int:
        """K, the length of its logits."""
        return self.head.bias.numel()

    def logits(self, inputs: Tensor) -> Tensor:
        """Return float32 logits (N, K) of backbone inputs (N, C, H, W), each row by itself.

        They run on the device of `inputs`, and with a gradient where gradients are on.
        """
        return self._on(inputs.device)._run(inputs.float())

    def _run(self, inputs: Tensor) -> Tensor:
        x = inputs * self.scale + self.shift
        if x.shape[2:] != (self.side, self.side):
            size = (self.side, self.side)
            x = functional.interpolate(x, size, mode="bilinear", antialias=True)
        x = functional.relu(self.stem.convolve(x))
        for block in self.blocks:
            x = block.run(x)
        return functional.linear(x.mean((2, 3)), self.head.weight, self.head.bias)

    @cached_property
    def _ready(self) -> dict[torch.device, Witness]:
        return {}

    def _on(self, device: torch.device) -> Witness:
        if device not in self._ready:
            with torch.inference_mode(False):  # else these weights could never take part in a graph
                self._ready[device] = to_device(self, device, torch.float32)
        return self._ready[device]
