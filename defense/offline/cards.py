"""Networks that we trained: a safetensors file and, beside it, the card that says how it was made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load

from defense.errors import ArtifactError
from defense.offline.invertible import InvertibleResNet
from defense.offline.networks import NETWORKS, Architecture, Network, Normalisation

DESCRIBED: dict[str, type[Network]] = {**NETWORKS, InvertibleResNet.__name__: InvertibleResNet}
"""Networks by the name that a card gives: those that archives can carry, and one that they cannot."""


def load_network(card: Path) -> tuple[Network, Normalisation]:
    """Return the network that `card` describes, in eval mode, and its input's normalisation."""
    try:
        facts = json.loads(card.read_text())
        weights = card.with_name(facts["weights"]).read_bytes()
        shape, statistics = facts["architecture"], facts["input"]
        digest = facts["sha256"]
        kind = DESCRIBED[shape["network"]]
        depths, widths = tuple(shape["depths"]), tuple(shape["widths"])
        network = kind(Architecture(depths, widths, shape["stem"], shape["classes"]))
        normalise = Normalisation(tuple(statistics["mean"]), tuple(statistics["std"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{card} and its weights cannot be read ({error!r}); give a card that 'pathguard "
            "train' wrote"
        ) from error
    if hashlib.sha256(weights).hexdigest() != digest:
        raise ArtifactError(
            f"the weights beside {card} are not the ones it describes ({digest}); train them again"
        )
    try:
        network.load_state_dict(load(weights))
    except (SafetensorError, RuntimeError) as error:
        raise ArtifactError(
            f"the weights beside {card} do not fit the network it describes; train them again"
        ) from error
    return network.eval(), normalise
