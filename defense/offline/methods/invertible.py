"""Training of an invertible residual network (i-ResNet, https://arxiv.org/abs/1811.00995)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from defense.offline.invertible import InvertibleResNet
from defense.offline.training import CrossEntropy


@dataclass(frozen=True)
class InvertibleObjective:
    """Cross-entropy to labels smoothed by this share; branches are held to contractions."""

    label_smoothing: float = 0.1

    def loss(self, network: nn.Module, x: Tensor, labels: Tensor, epoch: int) -> Tensor:
        """Return the mean loss."""
        return CrossEntropy(self.label_smoothing).loss(network, x, labels, epoch)

    def settle(self, network: nn.Module, epoch: int) -> None:
        """Hold the norms of an `InvertibleResNet`."""
        assert isinstance(network, InvertibleResNet)
        network.hold()
