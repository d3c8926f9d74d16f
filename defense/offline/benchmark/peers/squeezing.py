"""Feature squeezing: does the answer hold still when the image is simplified?

Xu, Evans and Qi, "Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks" (NDSS
2018, https://arxiv.org/abs/1704.01155), with the three squeezers that the authors join for CIFAR-10.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from defense.offline.benchmark.peers.contract import Case, Sample, Score
from defense.offline.benchmark.peers.features import answers
from defense.sites import device_of

BITS = 5
SEARCH = 13
PATCH = 3
STRENGTH = 2 / 255
ROWS = 32
"""Images that are squeezed at once: so few stay in the cache."""


def feature_squeezing(case: Case) -> Score:
    """Largest L1 distance, in [0, 2], between the answers to an image and to it squeezed."""

    device = device_of(case.model)

    def moved(pixels: Tensor, answer: Tensor) -> Tensor:
        squeezed = [squeeze(pixels) for squeeze in (fewer_bits, median, non_local_means)]
        shifts = [(answers(case.model, x).softmax(1) - answer).abs().sum(1) for x in squeezed]
        return torch.stack(shifts).amax(0)

    def score(sample: Sample) -> Tensor:
        answer = sample.routed.logits.double().cpu().softmax(1)
        parts = zip(sample.pixels.float().split(ROWS), answer.split(ROWS), strict=True)
        return torch.cat([moved(pixels.to(device), own) for pixels, own in parts])

    return score


def fewer_bits(pixels: Tensor) -> Tensor:
    """Round pixels in [0, 1] to 5 bits."""
    levels = float(2**BITS - 1)
    return (pixels * levels).round() / levels


def median(pixels: Tensor) -> Tensor:
    """Return the median of every 2x2 window, the upper one of four, as SciPy's filter gives it."""
    padded = functional.pad(pixels, (1, 0, 1, 0), mode="replicate")
    windows: Tensor = padded.unfold(2, 2, 1).unfold(3, 2, 1).flatten(4)
    return windows.sort(dim=4).values[..., 2]


def non_local_means(pixels: Tensor) -> Tensor:
    """Average every pixel with those of a 13x13 window whose 3x3 surroundings look alike.

    A reconstruction: the authors use OpenCV's, which compares colours in another space.
    """
    far, near = SEARCH // 2, PATCH // 2
    height, width = pixels.shape[2:]
    around = functional.pad(pixels, (far,) * 4, mode="replicate")
    total, weights = torch.zeros_like(pixels), torch.zeros_like(pixels[:, :1])
    for down in range(SEARCH):
        for right in range(SEARCH):
            other = around[:, :, down : down + height, right : right + width]
            apart = (other - pixels).square().mean(1, keepdim=True)
            apart = functional.avg_pool2d(apart, PATCH, 1, near, count_include_pad=False)
            weight = (-apart / STRENGTH**2).exp()
            total += weight * other
            weights += weight
    return total / weights
