"""Step over the boundary where it is flat, among the features of an invertible network, and go back.

A reconstruction: of the published idea (fast adversarial images from the latent space of an invertible
classifier) only the frame is known, not the paper's equations. The classifier is `InvertibleResNet`.
Its head is linear in the average of the features over their P positions. To move that average by m,
the features must move by d_p at each position with mean m, and the sum of |d_p|^2 is least where all
d_p are m. From class y to t, the shortest m is along w_t - w_y, and its length has a closed form. No
gradient of the network is taken: one pass, one inversion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defense.errors import ConfigError
from defense.offline.attacks.attack import Attack, frozen
from defense.offline.invertible import InvertibleResNet
from defense.offline.networks import Normalisation
from defense.sites import device_of


@dataclass(frozen=True)
class LatentMove:
    """Attack images by the features of `network`; see `latent_attack`."""

    network: InvertibleResNet
    normalise: Normalisation
    kappa: float
    eps: float | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return images (N, C, H, W) in [0, 1], of other answers than labels (N,)."""
        device = device_of(self.network)
        images, labels = images.to(device), labels.to(device)
        with frozen(self.network), torch.no_grad():
            inputs = self.normalise(images * 255)
            moved, _ = cross(self.network, inputs, labels, self.kappa)
        std = torch.tensor(self.normalise.std, device=device).view(1, -1, 1, 1)
        change = (moved - inputs) * std
        if self.eps is not None:
            size = change.abs().amax((1, 2, 3), keepdim=True)
            change = change * (self.eps / size.clamp(min=1e-12)).clamp(max=1)
        return (images + change).clamp(0, 1)


def cross(
    network: InvertibleResNet, inputs: Tensor, labels: Tensor, kappa: float
) -> tuple[Tensor, Tensor]:
    """Return the network's inputs (N, 3, H, W) across their nearest boundary, and the classes there."""
    latent = network.trunk(inputs)
    move, there = shortest(network.head, latent.mean((2, 3)), labels, kappa)
    return network.invert(latent + move[:, :, None, None]), there


def shortest(
    head: nn.Linear, features: Tensor, labels: Tensor, kappa: float
) -> tuple[Tensor, Tensor]:
    """Return the shortest moves (N, C) of features (N, C) out of their labels' regions.

    With them, the second result: the class (N,) whose logit is then `kappa` above the label's. No
    other logit is above it, or the way to that class were shorter. Where a class is that far above
    already, the move is 0.
    """
    logits = head(features)
    own = labels[:, None]
    towards = head.weight[None] - head.weight[labels][:, None]
    lacking = (logits.gather(1, own) - logits + kappa).clamp(min=0)
    length = towards.norm(dim=2)
    distance = (lacking / length).scatter(1, own, torch.inf)
    there = distance.argmin(1)
    row = torch.arange(len(labels), device=labels.device)
    factor = lacking[row, there] / length[row, there].square()
    return factor[:, None] * towards[row, there], there


def latent_attack(
    network: InvertibleResNet,
    normalise: Normalisation,
    *,
    kappa: float = 1.0,
    eps: float | None = None,
) -> Attack:
    """Return the attack by the features of `network`; the model that it is run on decides nothing.

    normalise: how `network` takes pixels. kappa: by how much the network's logit of the new class
    exceeds the old one's. eps: changes that leave this L-infinity ball are scaled back to its edge.
    """
    if kappa < 0:
        raise ConfigError(f"the latent attack's kappa must be at least 0, got {kappa}")
    name = "latent" if eps is None else f"latent_{eps * 255:g}"
    move = LatentMove(network, normalise, kappa, eps)
    return Attack(name, eps, lambda _model: move, family="latent")
