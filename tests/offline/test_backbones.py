"""Backbones with their cards: written, read back, gone on from, refused where they do not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from defense.errors import ArtifactError, ConfigError
from defense.offline import networks
from defense.offline.backbones import first_network, train_backbone
from defense.offline.cards import load_network
from defense.offline.methods import METHODS, method_named
from defense.offline.networks import Architecture, CifarResNet
from defense.offline.training import evaluate, read_split
from tests.coloured import SETTINGS, TINY, coloured_images, write_folder


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """Return the card of a tiny backbone trained from a folder."""
    write_folder(tmp_path / "data", "train", coloured_images(33))
    write_folder(tmp_path / "data", "test", coloured_images(12))
    train_backbone(
        tmp_path / "data",
        tmp_path / "out" / "tiny.safetensors",
        method=METHODS["plain"],
        architecture=TINY,
        settings=SETTINGS,
        checkpoint=tmp_path / "work" / "checkpoint",
        command="pathguard train data",
    )
    return tmp_path / "out" / "tiny.json"


def test_a_card_describes_the_backbone_that_lies_beside_it(backbone: Path, tmp_path: Path) -> None:
    network, normalise = load_network(backbone)
    card = json.loads(backbone.read_text())
    result = evaluate(network, read_split(tmp_path / "data", "test"), normalise)
    assert {name: card["test"][name] for name in asdict(result)} == asdict(result)
    assert card["command"] == "pathguard train data"
    assert card["recipe"]["seed"] == SETTINGS.seed
    assert card["parameters"] == sum(value.numel() for value in network.parameters())
    assert len(card["training"]["loss"]) == SETTINGS.epochs
    assert not list(backbone.parent.glob("*.partial"))


def test_weights_that_the_card_does_not_describe_are_refused(backbone: Path) -> None:
    weights = backbone.with_suffix(".safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(ArtifactError, match="are not the ones it describes"):
        load_network(backbone)
    weights.unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_network(backbone)


def test_weights_of_another_shape_than_the_card_says_are_refused(backbone: Path) -> None:
    card = json.loads(backbone.read_text())
    card["architecture"]["stem"] = 6
    backbone.write_text(json.dumps(card))
    with pytest.raises(ArtifactError, match="do not fit the network it describes; train them"):
        load_network(backbone)
    card["architecture"]["network"] = "Transformer"
    backbone.write_text(json.dumps(card))
    with pytest.raises(ArtifactError, match=r"cannot be read .*Transformer.*; give a card that"):
        load_network(backbone)


def test_training_goes_on_from_a_card(backbone: Path) -> None:
    images = read_split(backbone.parents[1] / "data", "train")
    network = first_network(METHODS["plain"], Architecture(), images, backbone)
    trained, _ = load_network(backbone)
    assert isinstance(network, CifarResNet)
    assert network.architecture == TINY
    for name, value in trained.state_dict().items():
        assert torch.equal(network.state_dict()[name], value)
    assert not network.stem[0].weight.requires_grad


def test_training_goes_on_with_the_images_it_began_with_alone(backbone: Path) -> None:
    with pytest.raises(ArtifactError, match=r"a network of other images .* give the data"):
        first_network(METHODS["plain"], TINY, coloured_images(99), backbone)


def test_a_method_that_refines_says_that_it_needs_a_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="goes on from a trained network; name its card with"):
        train_backbone(
            tmp_path,
            tmp_path / "out.safetensors",
            method=replace(METHODS["plain"], needs_start=True),
            architecture=TINY,
            settings=SETTINGS,
            checkpoint=tmp_path / "c",
            command="",
        )


def test_an_unknown_method_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no training method 'plane'; did you mean 'plain'\?"):
        method_named("plane")


def test_the_file_of_networks_runs_without_this_project() -> None:
    code = "import networks, sys; sys.exit('defense' in sys.modules)"
    folder = Path(networks.__file__).parent
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=folder, env={"PYTHONPATH": str(folder)}
    )
