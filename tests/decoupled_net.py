"""A small network with controllers, for grey images; its paths depend on the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from defense.offline.networks import Controller
from tests.served import images_like_noise


class DecoupledNet(nn.Module):
    """Two convolutions, each of which has a controller, behind one that has none."""

    def __init__(self, classes: int = 10, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.control1 = Controller(width, width, classes, reduction=1)
        self.control2 = Controller(width, width, classes, reduction=1)
        self.act = nn.ReLU()
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = self.control1.gate(self.act(self.conv1(x)), by=x)
        x = x + self.control2.gate(self.act(self.conv2(x)), by=x)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


@torch.no_grad()
def decoupled_net(seed: int = 371) -> DecoupledNet:
    """Return a network whose controllers open about half of the channels, others for every image.

    With the default seed the contract's images come nowhere near a threshold, whatever the rounding.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DecoupledNet().eval()
        for control in (net.control1, net.control2):
            nn.init.normal_(control.fc1.weight)
            centre(net, control, images_like_noise(64, 3))
    return net


@torch.no_grad()
def centre(net: nn.Module, control: Controller, x: Tensor) -> None:
    """Shift what a controller computes so that the mean of inputs `x` lies on every threshold."""
    seen: list[Tensor] = []
    handle = control.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    net(x)
    handle.remove()
    pooled = seen[0].mean((0, 2, 3))
    control.fc1.bias.copy_(1 - control.fc1.weight @ pooled)
    control.fc2.bias.copy_(-control.fc2.weight.sum(1))
