"""Networks for tests of effective paths."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tests.served import SmallNet, seeded_net


def decided_net() -> SmallNet:
    """Return a network that looks at edges and whose logits are sums of positive parts.

    Random weights look at brightness, which is the same in all noise, through one channel; their
    logits are small differences of large sums, of which three neurons are half.
    """
    model = seeded_net()
    with torch.no_grad():
        model.stem.weight -= model.stem.weight.mean((2, 3), keepdim=True)
        model.head.weight.abs_()
        for layer in (model.stem, model.block.conv1, model.block.conv2):
            nn.init.zeros_(cast(Tensor, layer.bias))
    return model


def positive(model: nn.Module) -> nn.Module:
    """Make every parameter of `model` positive, from a seed."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 + torch.rand(parameter.shape, generator=draw))
    return model.eval()


class Branches(nn.Module):
    """A residual network with every operation that an effective path can go through."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.relu = nn.ReLU(inplace=True)
        self.grouped = nn.Conv2d(4, 4, 3, stride=2, padding=2, dilation=2, groups=2)
        self.down = nn.AvgPool2d(3, 2, padding=1)
        self.pool = nn.MaxPool2d(2, padding=1)
        self.drop = nn.Dropout()
        self.hidden = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.pool(self.relu(self.grouped(x) + self.down(x)))
        x = self.drop(x.mean((2, 3)))
        return cast(Tensor, self.head(self.relu(self.hidden(x)).view(-1, 6)))


def branches() -> Branches:
    """Return such a network from a seed, its running statistics off their defaults."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = Branches()
        model(torch.rand(8, 2, 7, 7))
        return model.eval()
