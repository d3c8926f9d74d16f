"""The cumulative rule: which inputs of a linear map its outputs rest on. Shared by effective paths.

Source: Qiu et al. (CVPR 2019, https://arxiv.org/abs/1904.08089), eqs. (1)-(3). A convolution, a
linear layer, an average and a sum are all windows over positions here, each with its weights.

Shapes: C channels, P positions (pixels or tokens), O output channels, L output positions, K places of
a window, c input channels of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PRODUCTS = 2**21
"""Weighted inputs that are sorted at once: below 100 MB with all that goes with them."""


@dataclass(frozen=True)
class Map:
    """A linear map at work on one image.

    weight: (O, c, K). index: (L, K) the positions under each window, P where there is padding. value:
    (C, P) its input. output: (O, L), of which the sign counts.
    """

    weight: Tensor
    index: Tensor
    value: Tensor
    output: Tensor


def average(index: Tensor, value: Tensor, output: Tensor) -> Map:
    """Return the map that adds up the windows `index` of every channel of `value` by itself."""
    weight = torch.ones(1, 1, 1, device=value.device).expand(value.shape[0], 1, index.shape[1])
    return Map(weight, index, value, output)


def rests_on(at: Map, mask: Tensor, theta: float) -> Tensor:
    """Return which inputs (C, P) the outputs in `mask` (O, L) rest on: `smallest_set` of each."""
    channels, positions = at.value.shape
    outputs, width, _ = at.weight.shape
    value = F.pad(at.value.float(), (0, 1)).flatten()  # the place behind each channel adds nothing
    kept = torch.zeros_like(value, dtype=torch.bool)
    within = torch.arange(width, device=value.device)
    sharing = outputs * width // channels  # output channels of a group
    for active in mask.nonzero().split(max(1, PRODUCTS // at.weight[0].numel())):
        out, place = active.unbind(1)
        channel = (out // sharing * width)[:, None] + within
        where = channel[:, :, None] * (positions + 1) + at.index[place, None, :]
        products = (value[where] * at.weight[out].float()).flatten(1)
        products = torch.where(at.output[out, place, None] < 0, -products, products)
        kept[where.flatten(1)[smallest_set(products, theta)]] = True
    return kept.view(channels, -1)[:, :positions].contiguous()


def smallest_set(products: Tensor, theta: float) -> Tensor:
    """Return, row by row of (R, K), the fewest products that sum to theta of the row's total.

    Where the total is not positive it is the single largest. Zeros are never taken.
    """
    ordered, order = products.sort(dim=1, descending=True, stable=True)
    sums = ordered.cumsum(1, dtype=torch.float64)
    needed = theta * sums[:, -1:]
    taken = (sums - ordered < needed) & (needed > 0)
    taken[:, 0] = True
    return torch.zeros_like(taken).scatter(1, order, taken & (ordered != 0))


def windows(value: Tensor, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Tensor:
    """Return the positions under each window over maps (1, C, H, W): (L, K), H x W for padding."""
    height, width = value.shape[2:]
    count = height * width
    places = torch.arange(1, count + 1, device=value.device, dtype=torch.float64)
    index = F.unfold(places.view(1, 1, height, width), kernel, dilation, padding, stride)
    index = index[0].T.long() - 1
    return torch.where(index < 0, count, index)


def cells(value: Tensor, output: Tensor) -> Tensor:
    """Return the positions that adaptive pooling averages for each output, as `windows` does."""
    (height, width), (rows, columns) = value.shape[2:], output.shape[2:]
    down, across = (_spans(*sizes, value.device) for sizes in ((height, rows), (width, columns)))
    index = down[:, None, :, None] * width + across[None, :, None, :]
    outside = (down < 0)[:, None, :, None] | (across < 0)[None, :, None, :]
    return torch.where(outside, height * width, index).reshape(rows * columns, -1)


def _spans(size: int, parts: int, device: torch.device) -> Tensor:
    """Return the places of every part of an axis: (parts, longest), -1 behind shorter ones."""
    part = torch.arange(parts, device=device)
    start, stop = part * size // parts, -(-(part + 1) * size // parts)
    place = start[:, None] + torch.arange(-(-size // parts) + 1, device=device)
    return torch.where(place < stop[:, None], place, -1)


def maxima(pool: nn.MaxPool2d, value: Tensor, mask: Tensor) -> Tensor:
    """Return where the maxima of the windows in `mask` lie in `value` (1, C, H, W)."""
    _, index = F.max_pool2d(
        value, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, True
    )
    kept = torch.zeros_like(value, dtype=torch.bool).contiguous()
    channel = torch.arange(value.shape[1], device=value.device)[:, None, None]
    kept.view(-1)[(index[0] + channel * value[0, 0].numel())[mask[0]]] = True
    return kept
