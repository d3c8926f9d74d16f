"""What a guard gets to look at beside the path: the witness of a card, and echoes chosen by rule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defense.errors import ArtifactError, ConfigError
from defense.looks import Echo, Extras, Perturbation
from defense.offline.cards import load_network
from defense.offline.networks import CifarResNet
from defense.offline.pixels import PixelSpace
from defense.offline.witness import fold
from defense.sites import device_of, first_tensor
from defense.witness import Witness

CANDIDATES = (Perturbation("mirror"), Perturbation("shift", 1))
"""Changes that leave most pictures what they are; digits, for one, turn over when mirrored."""
SAMPLE = 500
STEADY = 0.9
"""Share of clean inputs whose answer a perturbation must leave alone to become an echo."""
BATCH = 32


def make_extras(
    model: nn.Module,
    inputs: Tensor,
    *,
    witness_card: Path | None,
    space: PixelSpace | None,
    class_names: Sequence[str],
    perturbations: Sequence[Perturbation] | None = None,
) -> Extras:
    """Return the witness that `witness_card` describes, and the echo that suits a backbone.

    inputs: (N, ...) clean inputs of `model`; the first 500 choose among `perturbations`, or among a
    mirror image and a shift of one pixel. class_names: of the backbone's outputs, in their order.
    space: how pixels become inputs; without it there can be no witness.

    Raises ConfigError for a witness without a pixel space, ArtifactError for a card of another kind
    of network or of other classes.
    """
    witness = None
    if witness_card is not None:
        if space is None:
            raise ConfigError(
                "a witness reads pixels, and the preprocessing here is no shift and scale of pixels "
                "per channel; fit without a witness"
            )
        witness = read_witness(witness_card, space, class_names)
    candidates = CANDIDATES if perturbations is None else tuple(perturbations)
    return Extras(witness, choose_echo(model, inputs[:SAMPLE], candidates))


def read_witness(card: Path, space: PixelSpace, class_names: Sequence[str]) -> Witness:
    """Return the network that `card` describes as a witness of inputs in `space`."""
    network, normalise = load_network(card)
    if type(network) is not CifarResNet:
        raise ArtifactError(
            f"{card} describes a {type(network).__name__}, and a witness is a CifarResNet; train one "
            "with 'pathguard train --method consistent'"
        )
    classes, side = _classes_and_side(card)
    return fold(
        network,
        normalise,
        backbone_scale=space.scale,
        backbone_shift=space.shift,
        classes=classes,
        wanted=class_names,
        side=side,
    )


def _classes_and_side(card: Path) -> tuple[list[str], int]:
    facts: dict[str, Any] = json.loads(card.read_text())
    try:
        return [str(name) for name in facts["classes"]], int(facts["input"]["shape"][-1])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ArtifactError(
            f"{card} does not say which classes its network knows, or of which size of images; "
            "give a card that 'pathguard train' wrote"
        ) from error


def choose_echo(
    model: nn.Module, inputs: Tensor, candidates: Sequence[Perturbation]
) -> Echo | None:
    """Return an echo of those candidates under which the model's answers to `inputs` mostly stay.

    None where none does, or where inputs (N, ...) are no images (N, C, H, W) of real numbers.
    """
    if inputs.dim() != 4 or not inputs.is_floating_point() or len(inputs) == 0:
        return None
    before = _answers(model, inputs)
    steady = [
        change
        for index, change in enumerate(candidates)
        if _share(before == _answers(model, change.apply(inputs, index))) >= STEADY
    ]
    return Echo(tuple(steady)) if steady else None


def _answers(model: nn.Module, inputs: Tensor) -> Tensor:
    device = device_of(model)
    with torch.inference_mode():
        logits = [first_tensor(model(part.to(device))) for part in inputs.split(BATCH)]
    return torch.cat([part.argmax(1).cpu() for part in logits if part is not None])


def _share(kept: Tensor) -> float:
    return float(kept.double().mean())


def describe_extras(extras: Extras, witness_card: Path | None) -> dict[str, Any]:
    """Return the facts that a guard states about its witness and its echo."""
    witness = None
    if extras.witness is not None and witness_card is not None:
        sha256 = json.loads(witness_card.read_text())["sha256"]
        witness = {"card": witness_card.name, "sha256": sha256}
    changes = () if extras.echo is None else extras.echo.perturbations
    echo = [f"{p.kind} {p.amount:g}" if p.amount else p.kind for p in changes]
    return {"witness": witness, "echo": echo}
