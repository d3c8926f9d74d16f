"""Networks beside the one under attack, and images that it gets right."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.conftest import Digits
from tests.served import SmallNet


def similar(net: SmallNet, seed: int) -> SmallNet:
    """Return a network of other weights, close enough to share the errors of `net`."""
    other = SmallNet()
    draw = torch.Generator().manual_seed(seed)
    for name, weight in net.state_dict().items():
        noise = torch.randn(weight.shape, generator=draw)
        other.state_dict()[name].copy_(weight + 0.05 * weight.std() * noise)
    return other.eval()


def known(net: SmallNet, digits: Digits, count: int) -> tuple[Tensor, Tensor]:
    """Return images that the network gets right, and their labels."""
    rows = (net(digits.images).argmax(1) == digits.labels).nonzero().flatten()[:count]
    return digits.images[rows], digits.labels[rows]
