"""Training with class-specific gates (CSGCNN, https://arxiv.org/abs/2007.08194, section 3).

Every third epoch the last feature map passes through the gates of the label's class, few of which
may be open; filters settle on few classes, and the standard path inherits it. The published code
optimises the two paths by an Adam each; here one SGD serves both, and `gate_rate` stands for the
second rate (ours).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from defense.offline.networks import ClassGatedResNet
from defense.offline.training import CrossEntropy
from defense.routers.class_gates import DENSITY, excess, project

PERIOD = 3


@dataclass(frozen=True)
class ClassGatesObjective:
    """Cross-entropy of the standard path; in gated epochs that of the gated one, and density.

    warmup: epochs without gates before the first; the paper has 10, a trained start needs none.
    gate_rate: gates step so many times as far as weights do. Beside it, `density_weight` decides how
    fast a gate closes that no class needs: by both times the learning rate, tenfold for momentum.
    """

    warmup: int = 0
    density_weight: float = 1e-3
    density: float = DENSITY
    gate_rate: float = 50.0
    label_smoothing: float = 0.1

    def gated(self, epoch: int) -> bool:
        """Say whether labels pass through their gates in `epoch`, counted from 0."""
        return epoch >= self.warmup and epoch % PERIOD == PERIOD - 1

    def loss(self, network: nn.Module, x: Tensor, labels: Tensor, epoch: int) -> Tensor:
        """Return the mean loss of a `ClassGatedResNet`."""
        if not self.gated(epoch):
            return CrossEntropy(self.label_smoothing).loss(network, x, labels, epoch)
        assert isinstance(network, ClassGatedResNet)
        gates = faster(network.class_gates, self.gate_rate)
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = network.gated_forward(x, labels, gates).float()
        loss = functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return loss + self.density_weight * excess(gates, self.density)

    @torch.no_grad()
    def settle(self, network: nn.Module, epoch: int) -> None:
        """Keep gates in [0, 1] and one of every filter's at 1, from the first gated epoch on."""
        assert isinstance(network, ClassGatedResNet)
        if any(map(self.gated, range(epoch + 1))):
            network.class_gates.copy_(project(network.class_gates))


def faster(value: Tensor, rate: float) -> Tensor:
    """Return `value` itself, with `rate` times its gradient."""
    still = value.detach()
    return still + rate * (value - still)
