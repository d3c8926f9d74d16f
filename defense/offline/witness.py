"""A trained residual classifier made into a witness: batch norm folded in, no module left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from defense.errors import ArtifactError
from defense.offline.networks import BasicBlock, CifarResNet, Normalisation
from defense.state import to_device
from defense.witness import Block, Layer, Witness


@torch.no_grad()
def fold(
    network: CifarResNet,
    normalise: Normalisation,
    *,
    backbone_scale: Tensor,
    backbone_shift: Tensor,
    classes: Sequence[str],
    wanted: Sequence[str],
    side: int = 32,
    dtype: torch.dtype = torch.float16,
) -> Witness:
    """Return `network` as a witness beside a backbone whose input is scale x pixel + shift.

    backbone_scale, backbone_shift: (C, 1, 1), as in `PixelSpace`, for pixels in [0, 1]. classes: what
    the network's outputs are called; wanted: what the backbone's are, the order of the witness's
    logits. side: of the images that the network was trained on. Weights are kept in `dtype`.

    Raises ArtifactError where the classes are not the same, or a block does more than a plain one.
    """
    order = _order(tuple(classes), tuple(wanted), network.head.out_features)
    blocks = [module for module in network.modules() if isinstance(module, BasicBlock)]
    odd = next((block for block in blocks if type(block) is not BasicBlock), None)
    if odd is not None:
        raise ArtifactError(
            f"a block of the witness is a {type(odd).__name__}, which folding would change; train "
            "the witness as a plain CifarResNet"
        )
    mean, std = (torch.tensor(column).view(-1, 1, 1) for column in (normalise.mean, normalise.std))
    # pixel = (input - shift) / scale, and what the witness reads is (pixel - mean) / std.
    scale = 1 / (backbone_scale.cpu() * std)
    stem = _folded(*_convolution_and_norm(network.stem[0], network.stem[1]))
    head = Layer(network.head.weight[order], network.head.bias[order])
    cpu = torch.device("cpu")
    return Witness(
        stem=to_device(stem, cpu, dtype),
        blocks=to_device(tuple(_block(block) for block in blocks), cpu, dtype),
        head=to_device(head, cpu, dtype),
        side=side,
        scale=scale,
        shift=-backbone_shift.cpu() * scale - mean / std,
    )


def _order(classes: tuple[str, ...], wanted: tuple[str, ...], outputs: int) -> list[int]:
    """Return which output of the witness stands at each place of the backbone's."""
    if sorted(classes) != sorted(wanted) or len({*classes}) != outputs:
        odd = sorted({*classes} ^ {*wanted})
        what = f"'{odd[0]}' is known to one of them alone" if odd else "names repeat or are missing"
        raise ArtifactError(
            f"the witness has {outputs} outputs called by {len(classes)} names, the backbone "
            f"{len(wanted)} classes, and {what}; take a witness for the same classes"
        )
    return [classes.index(name) for name in wanted]


def _block(block: BasicBlock) -> Block:
    first = _folded(block.conv1, block.bn1)
    halve = isinstance(block.pool, nn.MaxPool2d)
    # max(a x) is a max(x) for positive a alone, so a negative factor is turned round for pooling.
    sign = torch.where(block.bn1.weight < 0, -1.0, 1.0).view(-1, 1, 1)
    turned = halve and bool((sign < 0).any())
    if turned:
        first = Layer(first.weight * sign[..., None], first.bias * sign.flatten())
    return Block(
        conv1=first,
        conv2=_folded(block.conv2, block.bn2),
        shortcut=None if isinstance(block.shortcut, nn.Identity) else _shortcut(block.shortcut),
        sign=sign if turned else None,
        halve=halve,
    )


def _shortcut(module: nn.Module) -> Layer:
    _, convolution, norm = module.children()
    return _folded(*_convolution_and_norm(convolution, norm))


def _convolution_and_norm(
    convolution: nn.Module, norm: nn.Module
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    return convolution, norm


def _folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> Layer:
    """Return one convolution that does what a convolution and its batch norm do in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    weight = convolution.weight * factor.view(-1, 1, 1, 1)
    return Layer(weight, norm.bias - norm.running_mean * factor)
