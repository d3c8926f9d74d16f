"""What the comparison tells of whole networks: units, pathways, and what decoupling saves."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defense.offline.attacks import make_attack
from defense.offline.collect import route
from defense.offline.comparison.backbones import Backbone, open_network
from defense.offline.costs import compare_calls
from defense.offline.fit import fit_router, make_recipe
from defense.offline.methods.decoupled import flops, open_ratios
from defense.offline.networks import DecoupledResNet
from defense.offline.pathways import (
    class_overlap,
    class_pathways,
    faithfulness,
    sparsity,
    transfer,
)
from defense.offline.training import read_split
from defense.offline.units import UnitReport, measure_units
from defense.sites import device_of

PATHWAY_IMAGES = 200
PATHWAY_ROUTERS = ("generative", "distillation")
"""Routers whose path is a mask of channels: a channel is kept where the path is above 0."""


def measure_pathways(name: str, backbone: Backbone) -> dict[str, Any]:
    """Return how faithful the masks of a router are, and what class pathways tell of new images.

    Class pathways come from one half of the images and are tried on the other half.
    """
    recipe = make_recipe(name)
    router = fit_router(backbone.network, recipe, backbone.fit[: max(2, recipe.examples)])
    x, labels = backbone.inputs[:PATHWAY_IMAGES], backbone.labels[:PATHWAY_IMAGES]
    run = route(backbone.network, router, x)
    masks, sites = (run.path > 0).float(), router.layout.sites
    confidence = run.logits.softmax(1).amax(1)
    half = len(x) // 2
    pathways = class_pathways(masks[:half], labels[:half], run.logits.shape[1])
    moved = transfer(backbone.network, sites, x[half:], labels[half:], pathways)
    closed = sparsity(masks, confidence)
    return {
        "router": name,
        "images": len(x),
        **asdict(faithfulness(backbone.network, sites, x, masks)),
        "same_class_overlap": class_overlap(masks, labels),
        "closed": closed.closed.mean().item(),
        "closed_deviation": closed.closed.std().item(),
        "closed_and_confidence": closed.correlation,
        "transfer": {
            kind: {"accuracy": masked.accuracy, **asdict(masked.faithfulness)}
            for kind, masked in (
                ("own class", moved.own),
                ("another class", moved.other),
                ("random channels", moved.random),
            )
        },
    }


def measure_decoupling(plain: Backbone, decoupled: Backbone) -> dict[str, Any]:
    """Return what the controllers close, what that saves on paper, and what it saves in time."""
    network = decoupled.network
    assert isinstance(network, DecoupledResNet)
    x = decoupled.inputs.to(device_of(network))
    cost = flops(network, x)
    found = {name: asdict(value) for name, value in open_ratios(network, x).items()}
    return {
        "controllers": found,
        "open_ratio": mean_open(network, x),
        "dense_multiply_adds": cost.dense,
        "effective_multiply_adds": cost.effective.mean().item(),
        "against_plain": [
            asdict(compare_calls(lambda b=b: plain.network(x[:b]), lambda b=b: network(x[:b]), b))  # type: ignore[misc]
            for b in (1, 32)
        ],
        "skipping_against_masking": asdict(time_skipping(network, x[:1])),
    }


def time_skipping(network: DecoupledResNet, x: Tensor) -> Any:
    """Return the cost of one image with closed channels left out, against all computed and masked."""

    def run(skip: bool) -> None:
        network.skip_closed = skip
        network(x)

    try:
        return compare_calls(lambda: run(False), lambda: run(True), 1)
    finally:
        network.skip_closed = False


def mean_open(network: DecoupledResNet, x: Tensor) -> float:
    """Return the share of all controlled channels that are open, over images."""
    with torch.no_grad(), network.recorded() as decisions:
        network(x)
    return torch.cat([decision.mask for decision in decisions], dim=1).mean().item()


def measure_networks(
    cards: dict[str, Path], source: Path, *, images: int, seed: int
) -> list[UnitReport]:
    """Measure the units of every network on the same test images, and those images attacked."""
    test = read_split(source, "test")
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[:images]
    pixels, labels = test.pixels[order].float() / 255, test.labels[order]
    attack = make_attack("pgd", eps=8 / 255)
    reports = []
    for name, card in cards.items():
        on_pixels = open_network(card)
        attacked = on_pixels.inputs(attack.run(on_pixels, pixels, labels, seed=seed))
        clean = on_pixels.inputs(pixels)
        reports.append(
            measure_units(name, on_pixels.network, clean, labels, attacked=attacked, seed=seed)
        )
    return reports
