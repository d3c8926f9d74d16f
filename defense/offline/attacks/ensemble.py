"""Targeted images that several networks mistake for the same class (https://arxiv.org/abs/1708.05493).

Dong et al. let Adam walk on the image down the mean cross-entropy of k networks to one wrong class;
what all of them believe, others often believe too. The constants are recalled from the paper, not read
in it: 10 to 20 steps of size 5 of 255, no penalty on the distance, which is stated afterwards as the
root-mean-square deviation. On 32x32 images steps of 5 are plain to see; here they are of size 1, so no
pixel moves by much more than 10 of 255.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional

from defense.errors import ConfigError
from defense.offline.attacks.attack import Attack, frozen
from defense.sites import device_of

STEPS = 10
STEP = 1 / 255


def ensemble_attack(
    networks: Sequence[nn.Module], *, steps: int = STEPS, step: float = STEP, penalty: float = 0.0
) -> Attack:
    """Return the attack on all `networks` at once; the model that it is run on decides nothing.

    networks: of pixels in [0, 1], with the same classes, all on one device; to attack a model with
    knowledge of it, name it among them. step: of full scale. penalty: weight of the root-mean-square
    deviation, of full scale too, beside the mean cross-entropy. Every image is drawn a target by the
    run's seed, never its own class.
    """
    if not networks:
        raise ConfigError("the ensemble attack needs at least one network, got none; train one")

    def attack(images: Tensor, labels: Tensor) -> Tensor:
        device = device_of(networks[0])
        images, labels = images.to(device), labels.to(device)
        with ExitStack() as stack:
            for network in networks:
                stack.enter_context(frozen(network))
            wanted = other_classes(labels, networks[0](images[:1]).shape[1])
            x = images.clone().requires_grad_()
            adam = torch.optim.Adam([x], lr=step)
            for _ in range(steps):
                loss = joint_loss(networks, x, wanted)
                if penalty:
                    loss = loss + penalty * rmsd(x, images).sum()
                (x.grad,) = torch.autograd.grad(loss, x)
                adam.step()
                x.data.clamp_(0, 1)
        return x.detach()

    return Attack("ensemble", None, lambda _model: attack)


def joint_loss(networks: Sequence[nn.Module], x: Tensor, wanted: Tensor) -> Tensor:
    """Return the cross-entropy to `wanted` (N,), the mean of the networks, summed over `x`."""
    losses = [functional.cross_entropy(network(x), wanted, reduction="sum") for network in networks]
    return torch.stack(losses).mean()


def other_classes(labels: Tensor, classes: int) -> Tensor:
    """Draw for every label (N,) another class, by torch's generator; all are equally likely."""
    draw = torch.randint(1, classes, labels.shape).to(labels.device)
    return (labels + draw) % classes


def rmsd(attacked: Tensor, images: Tensor) -> Tensor:
    """Return each image's root-mean-square deviation (N,), in [0, 1] as the pixels (N, C, H, W) are.

    Its gradient is 0 where nothing has changed.
    """
    square = (attacked - images).square().flatten(1).mean(1)
    return square.clamp(min=1e-12).sqrt()
