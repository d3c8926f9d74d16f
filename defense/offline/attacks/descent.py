"""Attacks by gradient that torchattacks has not, or not as they should be.

PGD (Madry et al. 2018) and CW (Carlini and Wagner 2017) are here because torchattacks' PGD returns
its last iterate, keeps its step and climbs the cross-entropy alone, which leaves one image in ten of
a network trained with label smoothing in a local optimum; and because its CW reads the margin
wrongly where logits are negative and does not ask for the confidence that it is given. All judge
8-bit images, so that rounding undoes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defense.offline.attacks.attack import AttackFunction, eight_bit

Loss = Callable[[Tensor, Tensor], Tensor]
"""What an attack climbs: a value per image (N,) of logits (N, K) and labels (N,)."""


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return by how much the best wrong class leads the label's: (N,); above 0 means fooled."""
    own = labels[:, None]
    return logits.scatter(1, own, -torch.inf).amax(1) - logits.gather(1, own)[:, 0]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy to the labels (N,)."""
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def logits_ratio(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the margin over the distance of the first from the third logit (N,): DLR.

    Croce and Hein, https://arxiv.org/abs/2003.01690. Margins are taken where there are two classes.
    """
    lead = margin(logits, labels)
    if logits.shape[1] < 3:
        return lead
    highest = logits.topk(3).values
    ratio: Tensor = lead / (highest[:, 0] - highest[:, 2] + 1e-12)
    return ratio


def fooled(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Say which images (N,) are answered with another class than their label's."""
    with torch.no_grad():
        wrong: Tensor = model(eight_bit(images, images, None)).argmax(1) != labels
    return wrong


def in_turn(model: nn.Module, *attempts: AttackFunction) -> AttackFunction:
    """Return the attack that makes the later attempts on those images alone that no earlier fooled."""

    def attack(images: Tensor, labels: Tensor) -> Tensor:
        attacked = attempts[0](images, labels).detach().clone()
        for attempt in attempts[1:]:
            left = (~fooled(model, attacked, labels)).nonzero().flatten()
            if len(left) == 0:
                break
            again = attempt(images[left], labels[left]).detach()
            won = fooled(model, again, labels[left])
            attacked[left[won]] = again[won]
        return attacked

    return attack


@dataclass(frozen=True)
class Descent:
    """Projected gradient ascent with a step that shrinks linearly from twice the radius.

    Returns the iterate of the largest margin. One forward and one backward pass a step, and one
    forward pass at the end.
    """

    model: nn.Module
    eps: float
    """Radius in units of `norm`."""
    steps: int = 20
    loss: Loss = cross_entropy
    norm: str = "linf"
    """`linf` or `l2`."""
    patch: int | None = None
    """Side in pixels of the square, placed at random, that alone is changed; None: all of it."""

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return attacked images (N, C, H, W) in [0, 1] of images and labels (N,)."""
        mask = self._mask(images)
        change = self._inside(self._start(images) * mask)
        best, reached = images.clone(), torch.full_like(images[:, 0, 0, 0], -torch.inf)
        bound = self.eps if self.norm == "linf" else None
        for step in range(self.steps + 1):
            x = eight_bit(images + change, images, bound).requires_grad_()
            logits = self.model(x)
            lead = margin(logits.detach(), labels)
            best = torch.where((lead > reached)[:, None, None, None], x.detach(), best)
            reached = reached.maximum(lead)
            if step < self.steps:
                slope = torch.autograd.grad(self.loss(logits, labels).sum(), x)[0] * mask
                length = 2 * self.eps * (1 - step / self.steps)
                change = self._inside(change + length * self._direction(slope))
                change = (images + change).clamp(0, 1) - images
        return best

    def _start(self, images: Tensor) -> Tensor:
        noise = torch.rand(images.shape).to(images) * 2 - 1
        if self.norm == "linf":
            return self.eps * noise
        return self.eps * _length_one(noise) * torch.rand(len(images), 1, 1, 1).to(images)

    def _direction(self, slope: Tensor) -> Tensor:
        return slope.sign() if self.norm == "linf" else _length_one(slope)

    def _inside(self, change: Tensor) -> Tensor:
        if self.norm == "linf":
            return change.clamp(-self.eps, self.eps)
        return change * (self.eps / _length(change)).clamp(max=1)

    def _mask(self, images: Tensor) -> Tensor:
        """Return where images may change: (N, 1, H, W) of zeros and ones."""
        count, _, height, width = images.shape
        if self.patch is None:
            return torch.ones(count, 1, height, width).to(images)
        inside = []
        for length in (height, width):
            side = min(self.patch, length)
            first = (torch.rand(count, 1) * (length - side + 1)).long()
            place = torch.arange(length)
            inside.append((place >= first) & (place < first + side))
        return (inside[0][:, None, :, None] & inside[1][:, None, None, :]).to(images)


def _length_one(change: Tensor) -> Tensor:
    return change / _length(change)


def _length(change: Tensor) -> Tensor:
    """Return the L2 norm of every image's change: (N, 1, 1, 1), above 0."""
    norms: Tensor = torch.linalg.vector_norm(change, dim=(1, 2, 3), keepdim=True)
    return norms.clamp(min=1e-12)


@dataclass(frozen=True)
class Confident:
    """CW for the L2 norm: the least change with which the margin reaches `confidence`.

    Carlini and Wagner, https://arxiv.org/abs/1608.04644: Adam, loss
    |change|^2 + weight x max(-margin, -confidence). For the binary search over the weight stand
    rounds, each on the images that the one before left, with ten times the weight and from where
    `start` leads: a change that is large and found is shrunk more surely than one is found that is
    small. Pixels are clamped instead of written as tanh, where black and white ones hardly move.
    Where no round reaches the confidence, the largest margin is returned.
    """

    model: nn.Module
    confidence: float = 0.0
    """In logits."""
    steps: int = 40
    rate: float = 0.01
    """Of Adam, in full scales of a pixel: the largest move of a step, about."""
    rounds: int = 3
    start: AttackFunction | None = None
    """Leads from the clean image to where the later rounds begin; None: they begin there too."""

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return attacked images (N, C, H, W) in [0, 1] of images and labels (N,)."""
        attacked, reached = self._round(images, images, labels, 1.0)
        for number in range(1, self.rounds):
            left = (reached < self._wanted).nonzero().flatten()
            if len(left) == 0:
                break
            x, y = images[left], labels[left]
            begin = self.start(x, y) if self.start else x
            again, lead = self._round(x, begin, y, 10.0**number)
            better = lead > reached[left]
            attacked[left[better]], reached[left[better]] = again[better], lead[better]
        return attacked

    @property
    def _wanted(self) -> float:
        return max(self.confidence, 1e-6)  # a tie is no success

    def _round(
        self, images: Tensor, begin: Tensor, labels: Tensor, weight: float
    ) -> tuple[Tensor, Tensor]:
        """Return the best images from `begin` on and the margins (N,) that they reach."""
        w = begin.detach().clone().requires_grad_()
        adam = torch.optim.Adam([w], lr=self.rate)
        best, reached = images.clone(), torch.full_like(images[:, 0, 0, 0], -torch.inf)
        least = torch.full_like(reached, torch.inf)
        for step in range(self.steps + 1):
            sent = eight_bit(w.detach(), images, None)
            logits = self.model(sent + (w - w.detach()))  # the client's image, w's gradient
            lead, size = margin(logits, labels), (w - images).square().flatten(1).sum(1)
            now, far = lead.detach(), size.detach()
            enough = now >= self._wanted
            better = torch.where(enough, far < least, (now > reached) & least.isinf())
            best = torch.where(better[:, None, None, None], sent, best)
            reached = torch.where(better, now, reached)
            least = torch.where(better & enough, far, least)
            if step < self.steps:
                short = (self._wanted - lead).clamp(min=0)
                adam.zero_grad()
                (size + weight * short).sum().backward()
                adam.step()
                w.data.clamp_(0, 1)
        return best, reached
