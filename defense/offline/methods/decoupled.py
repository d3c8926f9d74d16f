"""Interpretable network decoupling: train controllers that open a path for every image.

Li et al., https://arxiv.org/abs/1906.01166 (ECCV 2020). Losses and constants are those of the
authors' published code; the studies below ask what the trained controllers do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from defense.offline.networks import Controller, Decision, DecoupledBlock, DecoupledResNet
from defense.offline.training import EVALUATION_BATCH, logits


@dataclass(frozen=True)
class DecoupledObjective:
    """Cross-entropy plus, summed over controllers, what makes their masks a path.

    The authors give 1, 0.01 and 1.5e-4 with ratio 0 for ResNet-56 on CIFAR-10, and 1, 0.005 and 0.01
    with ratio 0.6 for ResNet-18 on ImageNet. Ours tell more of the input and press less: in one trial
    of each on noisy digits, information at 0.01 left masks nearly the same for all images (variation
    0.03; 0.12 at 0.1). label_smoothing is that of plain training.
    """

    lambda_alignment: float = 1.0
    """Weight of KL(softmax of the layer's output || softmax of its mask), the mean over entries."""
    lambda_information: float = 0.1
    """Weight of the cross-entropy of a linear classifier of the mask: the mask tells the class."""
    lambda_sparsity: float = 0.003
    """Weight of |open channels - wanted open channels|, the former as a mean over the batch."""
    open_ratio: float = 0.6
    """The wanted share of open channels, in [0, 1], of every controller.

    It is that of training: the noise takes ratios towards a half there, so that without it, in eval
    mode, a ratio lies somewhat farther from a half.
    """
    label_smoothing: float = 0.1

    def loss(self, network: nn.Module, x: Tensor, labels: Tensor, epoch: int) -> Tensor:
        """Return the mean loss of a `DecoupledResNet`."""
        assert isinstance(network, DecoupledResNet)
        with network.recorded() as decisions:
            answers = logits(network, x)
        total = functional.cross_entropy(answers, labels, label_smoothing=self.label_smoothing)
        for decision in decisions:
            total = (
                total
                + self.lambda_alignment * alignment(decision)
                + self.lambda_information * information(decision, labels)
                + self.lambda_sparsity * sparsity(decision, self.open_ratio)
            )
        return total

    def settle(self, network: nn.Module, epoch: int) -> None:
        """Any weights will do."""


def alignment(decision: Decision) -> Tensor:
    """Return the KL divergence of mask from output, over all N x C entries as the authors take it."""
    mask, output = decision.mask.log_softmax(1), decision.output.softmax(1)
    return functional.kl_div(mask, output, reduction="none").mean()


def information(decision: Decision, labels: Tensor) -> Tensor:
    """Return -E log q(label | mask): what it falls below H(label) by, the mask tells of the class."""
    return functional.cross_entropy(decision.controller.classifier(decision.mask), labels)


def sparsity(decision: Decision, open_ratio: float) -> Tensor:
    """Return by how many channels the mean number of open ones misses the wanted one."""
    return (decision.mask.sum(1).mean() - open_ratio * decision.mask.shape[1]).abs()


@dataclass(frozen=True)
class Openness:
    """How a controller of C channels decides over many images; shares and ratios lie in [0, 1].

    variation: mean of |mask - mean mask|, at most 0.5; towards 0 the path has collapsed to one
    that all images take. always_open + always_closed + dependent = 1.
    """

    open_ratio: float
    variation: float
    always_open: float
    always_closed: float
    dependent: float


@torch.no_grad()
def open_ratios(network: DecoupledResNet, inputs: Tensor) -> dict[str, Openness]:
    """Return what every controller of a network in eval mode makes of inputs `(N, 3, H, W)`."""
    names = {
        module: name for name, module in network.named_modules() if isinstance(module, Controller)
    }
    masks: dict[str, list[Tensor]] = {name: [] for name in names.values()}
    for batch in inputs.split(EVALUATION_BATCH):
        with network.recorded() as decisions:
            network(batch)
        for decision in decisions:
            masks[names[decision.controller]].append(decision.mask)
    return {name: openness(torch.cat(parts)) for name, parts in masks.items()}


def openness(mask: Tensor) -> Openness:
    """Return the statistics of binary masks `(N, C)`."""
    share = mask.mean(0)
    opened, closed = (mask == 1).all(0), (mask == 0).all(0)
    return Openness(
        open_ratio=share.mean().item(),
        variation=(mask - share).abs().mean().item(),
        always_open=opened.float().mean().item(),
        always_closed=closed.float().mean().item(),
        dependent=(~opened & ~closed).float().mean().item(),
    )


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of convolutions and linear layers for an image.

    dense: those of the plain network. effective: `(N,)`, those that an image's open channels take,
    and the controllers that chose them.
    """

    dense: int
    effective: Tensor


@torch.no_grad()
def flops(network: DecoupledResNet, inputs: Tensor) -> Cost:
    """Count for inputs `(N, 3, H, W)` of a network in eval mode.

    A closed channel spares the convolution that makes it and, if that is a block's first, its share
    of the one that reads it.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    dense: dict[nn.Module, int] = {}

    def count(layer: nn.Module, _args: object, output: Tensor) -> None:
        dense[layer] = layer.get_parameter("weight").numel() * output[0, 0].numel()

    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        with network.recorded() as decisions:
            network(inputs)
    finally:
        for handle in handles:
            handle.remove()
    shares = {decision.controller: decision.mask.double().mean(1) for decision in decisions}
    closed = torch.stack([spared(block, dense, shares) for block in network.blocks]).sum(0)
    control = sum(dense[fc] for chosen in shares for fc in (chosen.fc1, chosen.fc2))
    everything = sum(dense.values())
    return Cost(everything - control, everything - closed)


def spared(
    block: DecoupledBlock, dense: dict[nn.Module, int], shares: dict[Controller, Tensor]
) -> Tensor:
    """Return the multiply-adds `(N,)` that closed channels spare a block."""
    first, second = shares[block.control1], shares[block.control2]
    return dense[block.conv1] * (1 - first) + dense[block.conv2] * (1 - first * second)
