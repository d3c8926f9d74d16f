"""What is shipped fits together, without any data: cards, weights, guard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from defense.artifact import load_guard
from defense.config import ModelSettings
from defense.guard import check_backbone
from defense.offline.cards import load_network

STORE = Path(__file__).parents[1] / "model_store"
CARDS = sorted(STORE.glob("*.json"))
LARGEST = 12_000_000


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_a_shipped_network_is_the_one_that_its_card_describes(card: Path) -> None:
    network, normalise = load_network(card)
    facts = json.loads(card.read_text())
    with torch.inference_mode():
        logits = network(normalise(torch.zeros(2, *facts["input"]["shape"], dtype=torch.uint8)))
    assert logits.shape == (2, len(facts["classes"]))
    assert card.with_suffix(".safetensors").stat().st_size <= LARGEST
    assert 0 < facts["test"]["accuracy"] <= 1
    assert 0 <= facts["test"]["calibration_error"] <= 1
    assert facts["command"].startswith("pathguard train --data data/cifar10.zip")


def test_the_shipped_guard_belongs_to_the_shipped_backbone() -> None:
    guard = load_guard(STORE / "cifar10-guard")
    network, _ = load_network(STORE / "cifar10.json")
    check_backbone(guard, network)
    with guard.attach(network, ModelSettings()) as attached, torch.inference_mode():
        result = attached(torch.zeros(2, 3, 32, 32))
    assert len(result.verdicts) == 2
    assert guard.class_names == tuple(json.loads((STORE / "cifar10.json").read_text())["classes"])


def test_there_is_something_shipped() -> None:
    assert "cifar10" in {card.stem for card in CARDS}
