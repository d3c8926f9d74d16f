"""Every routing system on the same images: what a path costs, what it tells, what it detects.

The protocol of `pathguard compare`. Attacked images are kept where the network got the clean image
right and the attack turned its answer; clean and attacked rows come from the same images, and no
image lies on both sides of a detector's split. Attacks and paths are kept in a folder, so that a run
that was stopped goes on.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from defense.errors import ConfigError, nearest
from defense.offline.comparison.backbones import Cache, assaults, open_backbone
from defense.offline.comparison.judges import SEEDS
from defense.offline.comparison.networks import (
    PATHWAY_ROUTERS,
    measure_decoupling,
    measure_pathways,
)
from defense.offline.comparison.rows import ENTRIES, Row, measure_entry, softmax_row
from defense.offline.fit import versions
from defense.offline.networks import DecoupledResNet
from defense.offline.progress import Progress
from defense.offline.training import read_split


def compare(
    cards: dict[str, Path],
    source: Path,
    *,
    images: int,
    slow_images: int,
    cache: Cache,
    progress: Progress,
    command: str,
) -> dict[str, Any]:
    """Return the whole comparison: facts of every network, one row per entry that has its network.

    cards: by the name of a backbone, `plain` among them. images: how many test images are attacked;
    slow_images: how many of them routers see that take seconds per image.
    """
    if "plain" not in cards:
        raise ConfigError("the comparison needs the backbone 'plain'; name its card")
    known = {entry.backbone for entry in ENTRIES}
    for name in cards:
        if name not in known:
            raise ConfigError(f"no router is compared on a backbone '{name}'{nearest(name, known)}")
    train, test = read_split(source, "train"), read_split(source, "test")
    rows: list[Row] = []
    networks = {}
    decoupling = None
    for name, card in sorted(cards.items(), key=lambda item: item[0] != "plain"):
        backbone = open_backbone(
            name, card, train, test, count=images, cache=cache, progress=progress
        )
        facts = json.loads(card.read_text())
        networks[name] = {"card": card.name, "test": facts["test"], "sha256": facts["sha256"]}
        for entry in ENTRIES:
            if entry.backbone == name:
                rows.append(measure_entry(entry, backbone, slow_count=slow_images, cache=cache))
                progress.advance()
        if name == "plain":
            rows.append(softmax_row(backbone))
            pathways = [measure_pathways(router, backbone) for router in PATHWAY_ROUTERS]
            plain = backbone
        if isinstance(backbone.network, DecoupledResNet):
            decoupling = measure_decoupling(plain, backbone)
    return {
        "command": command,
        "networks": networks,
        "seeds": list(SEEDS),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
        "pathways": pathways,
        "decoupling": decoupling,
    }


def steps_of(cards: dict[str, Path]) -> int:
    """Return how often `compare` advances its progress."""
    entries = [entry for entry in ENTRIES if entry.backbone in cards]
    return len(cards) * len(assaults()) + len(entries)
