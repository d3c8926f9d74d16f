"""Ordinary archives of networks that `pathguard train` made, as their users would pack them."""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

from defense.errors import ArchiveError
from defense.offline.archiver import make_archive
from defense.offline.cards import load_network
from defense.offline.networks import NETWORKS


def pack_network(card: Path, target: Path) -> None:
    """Pack the network that `card` describes as a TorchServe archive, its card and classes with it.

    Nothing in it is pickled: the weights travel as safetensors.
    """
    network, _ = load_network(card)
    if type(network).__name__ not in NETWORKS:
        raise ArchiveError(
            f"{card} describes a {type(network).__name__}, which is for attacks and not for serving; "
            "pack a network of another training method"
        )
    offline = files("defense.offline")
    with (
        tempfile.TemporaryDirectory() as folder,
        as_file(offline / "networks.py") as networks,
        as_file(offline / "archived" / "network_handler.py") as handler,
    ):
        facts, weights = Path(folder) / "card.json", Path(folder) / "weights.safetensors"
        shutil.copyfile(card, facts)
        shutil.copyfile(card.with_name(json.loads(card.read_text())["weights"]), weights)
        make_archive(target, handler=str(handler), extra_files=[networks, facts, weights])
