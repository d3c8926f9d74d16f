"""How faithful channel masks are: what a network still answers when only a pathway is left open.

Measures of GEN-CNP (Lin et al., 2023, arXiv 2309.09887): mIC, mDC, acIOU and the transfer of class
pathways. Their names are the paper's; the definitions are a reconstruction after those usual for
class activation maps (Chattopadhay et al., 2018, arXiv 1710.11063), and the two controls are ours.

Masks are (N, D), D the channels of all sites side by side (a `PathLayout` with one statistic):
1 keeps a channel, 0 closes it. Any router whose path can be cut to that can be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defense.errors import DataError
from defense.routers.gating import gated
from defense.sites import device_of, first_tensor
from defense.types import PathLayout, Site

BATCH = 100


@dataclass(frozen=True)
class Faithfulness:
    """What masks do to the confidence in the class that the bare network predicts, over N images.

    increase: mIC, the share whose confidence rises. drop: mDC, the mean of max(0, p - p_masked).
    drop_relative: the same divided by p; which of the two the paper reports is not known.
    agreement: the share that keeps its predicted class. All in [0, 1].
    """

    increase: float
    drop: float
    drop_relative: float
    agreement: float


@dataclass(frozen=True)
class Sparsity:
    """How much of the network each image closes.

    closed: (N,) share of channels, in [0, 1]. correlation: Pearson's, of `closed` with the confidence
    of the bare network; None where one of the two is the same for all images.
    """

    closed: Tensor
    correlation: float | None


@dataclass(frozen=True)
class Masked:
    """Accuracy against the labels, and faithfulness, of images under masks of one kind."""

    accuracy: float
    faithfulness: Faithfulness


@dataclass(frozen=True)
class Transfer:
    """Images under the pathway of their class, of a random other class, and of random channels.

    The random channels are as many at every site as the class keeps there, drawn for each image.
    """

    own: Masked
    other: Masked
    random: Masked


@dataclass(frozen=True)
class TransferMasks:
    """The masks (N, D) of a transfer and of its two controls."""

    own: Tensor
    other: Tensor
    random: Tensor


def faithfulness(
    model: nn.Module, sites: Sequence[Site], inputs: Tensor, masks: Tensor
) -> Faithfulness:
    """Run inputs (N, ...) bare and under masks (N, D), and compare; DataError on wrong shapes."""
    masked = answers(model, sites, inputs, masks)
    return compare(answers(model, (), inputs, masks[:, :0]), masked)


def compare(bare: Tensor, masked: Tensor) -> Faithfulness:
    """Compare the logits (N, K) of the bare network with those of the masked one."""
    predicted = bare.argmax(1, keepdim=True)
    before, after = (logits.softmax(1).gather(1, predicted) for logits in (bare, masked))
    drop = (before - after).clamp_min(0)
    return Faithfulness(
        increase=(after > before).double().mean().item(),
        drop=drop.mean().item(),
        drop_relative=(drop / before).mean().item(),
        agreement=(masked.argmax(1, keepdim=True) == predicted).double().mean().item(),
    )


def answers(model: nn.Module, sites: Sequence[Site], inputs: Tensor, masks: Tensor) -> Tensor:
    """Return the logits (N, K) of inputs (N, ...) under masks (N, D), on the CPU in float64."""
    columns = PathLayout(tuple(sites), ("mask",)).columns
    expected = (len(inputs), sum(site.channels for site in sites))
    if tuple(masks.shape) != expected or len(inputs) == 0:
        raise DataError(
            f"masks of shape {tuple(masks.shape)} do not fit {expected[0]} images and "
            f"{expected[1]} channels; give one row per image, at least one, and one column per channel"
        )
    device, parts = device_of(model), []
    for batch, rows in zip(inputs.split(BATCH), masks.float().split(BATCH), strict=True):
        on_device = rows.to(device)
        with torch.no_grad(), gated(model, sites, [on_device[:, site] for site in columns]):
            logits = first_tensor(model(batch.to(device)))
        assert logits is not None
        parts.append(logits.double().cpu())
    return torch.cat(parts)


def class_overlap(masks: Tensor, labels: Tensor) -> float:
    """Return acIOU: the intersection over union of two masks, averaged over the pairs of a class.

    Classes (labels (N,)) count alike; one with a single image has no pair and is left out. Two
    masks that keep nothing are the same: 1. DataError where no class has two images.
    """
    groups = [masks[labels == label] for label in labels.unique()]
    overlaps = [_pairwise_overlap(group) for group in groups if len(group) > 1]
    if not overlaps:
        raise DataError("no class has two images to compare the masks of; give more images")
    return sum(overlaps) / len(overlaps)


def _pairwise_overlap(masks: Tensor) -> float:
    """Return the mean overlap of two different rows of masks (n, D), in memory of n x n."""
    masks = masks.float()
    both, size = masks @ masks.T, masks.sum(1)
    either = size[:, None] + size - both
    overlap = torch.where(either > 0, both / either, 1.0).double()
    return ((overlap.sum() - overlap.trace()) / (len(masks) * (len(masks) - 1))).item()


def sparsity(masks: Tensor, confidence: Tensor) -> Sparsity:
    """Return how much masks (N, D) close, beside the confidence (N,) of the bare network."""
    closed = 1 - masks.double().mean(1)
    pair = torch.stack([closed, confidence.double()])
    varies = bool((pair.amax(1) > pair.amin(1)).all())
    return Sparsity(closed, torch.corrcoef(pair)[0, 1].item() if varies else None)


def class_pathways(
    masks: Tensor, labels: Tensor, classes: int, *, threshold: float = 0.5
) -> Tensor:
    """Return (K, D): the channels that at least `threshold` of a class's masks (N, D) keep.

    DataError names the first class without a mask.
    """
    counts = torch.bincount(labels, minlength=classes)
    if not bool(counts.all()):
        missing = int((counts == 0).nonzero()[0])
        raise DataError(f"class {missing} has no mask to take its pathway from; give images of it")
    kept = masks.new_zeros(classes, masks.shape[1]).index_add_(0, labels, masks)
    return (kept / counts[:, None] >= threshold).float()


def transfer(
    model: nn.Module,
    sites: Sequence[Site],
    inputs: Tensor,
    labels: Tensor,
    pathways: Tensor,
    *,
    seed: int = 0,
) -> Transfer:
    """Run unseen inputs (N, ...) under the pathways (K, D) of their labels (N,), and two controls."""
    masks = transfer_masks(sites, labels, pathways, seed=seed)
    bare = answers(model, (), inputs, masks.own[:, :0])

    def under(kind: Tensor) -> Masked:
        masked = answers(model, sites, inputs, kind)
        accuracy = (masked.argmax(1) == labels).double().mean().item()
        return Masked(accuracy, compare(bare, masked))

    return Transfer(under(masks.own), under(masks.other), under(masks.random))


def transfer_masks(
    sites: Sequence[Site], labels: Tensor, pathways: Tensor, *, seed: int = 0
) -> TransferMasks:
    """Return the masks that images of `labels` (N,) run under, from pathways (K, D) of K classes.

    DataError where there is no other class to compare with, or a label has no pathway.
    """
    classes = len(pathways)
    if classes < 2 or not bool(((labels >= 0) & (labels < classes)).all()):
        raise DataError(
            f"{classes} pathways are too few for these labels; give one for every class, at least two"
        )
    draw = torch.Generator().manual_seed(seed)
    others = labels + torch.randint(1, classes, labels.shape, generator=draw)
    own = pathways[labels]
    by_site = own.split([site.channels for site in sites], dim=1)
    shuffled = [
        part.gather(1, torch.rand(part.shape, generator=draw).argsort(1)) for part in by_site
    ]
    return TransferMasks(own, pathways[others % classes], torch.cat(shuffled, dim=1))
