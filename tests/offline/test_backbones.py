"""Backbones with their cards: written, read back, gone on from, refused where they do not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from defense.errors import ArtifactError, ConfigError
from defense.offline import networks
from defense.offline.backbones import first_network, halved, train_backbone
from defense.offline.cards import load_network
from defense.offline.methods import METHODS, method_named
from defense.offline.networks import Architecture, CifarResNet
from defense.offline.training import EpochRecord, evaluate, read_split
from tests.coloured import SETTINGS, TINY, coloured_images, tiny_network, write_folder


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


def rounded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return float32 weights, those of layers as half precision can tell them apart."""
    return {n: value.half().float() if value.dim() > 1 else value for n, value in weights.items()}


def test_only_layers_are_halved_so_that_no_small_variance_becomes_zero() -> None:
    network = tiny_network()
    assert isinstance(network.stem[1], nn.BatchNorm2d)
    assert network.stem[1].running_var is not None
    network.stem[1].running_var.fill_(1e-9)
    weights = network.state_dict()
    found = halved(weights)
    assert {name for name, value in found.items() if value.dtype == torch.float16} == {
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    assert found.keys() == weights.keys()
    for name, value in rounded(weights).items():
        assert torch.equal(found[name].to(value.dtype), value)


@pytest.mark.parametrize("half", [True, False])
def test_a_method_says_whether_layers_lie_in_half_precision_and_the_card_is_of_those(
    tmp_path: Path, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The accuracy is that of the rounded weights: here, rounding turns every answer."""

    def train_to_the_edge(
        network: CifarResNet, *_: object, **__: object
    ) -> tuple[EpochRecord, ...]:
        with torch.no_grad():
            for value in network.head.parameters():
                value.zero_()
            # Every image is green by less than half precision can tell from red.
            network.head.weight[1] = 1e-8
            network.stages[-1][-1].bn2.bias.fill_(5.0)  # type: ignore[index]
        return ()

    monkeypatch.setattr("defense.offline.backbones.train", train_to_the_edge)
    write_folder(tmp_path / "data", "train", coloured_images(33))
    write_folder(tmp_path / "data", "test", coloured_images(12))
    out = tmp_path / "tiny.safetensors"
    result = train_backbone(
        tmp_path / "data",
        out,
        method=replace(METHODS["plain"], half=half),
        architecture=TINY,
        settings=SETTINGS,
        checkpoint=tmp_path / "c",
        command="",
    )
    network, normalise = load_network(out.with_suffix(".json"))
    stored = load_file(out)
    layers = torch.float16 if half else torch.float32
    for name, value in network.state_dict().items():
        assert stored[name].dtype == (layers if value.dim() > 1 else value.dtype)
        assert value.dtype in (torch.float32, torch.int64)
        assert torch.equal(stored[name].to(value.dtype), value)
    # The classes in the order of their folders: blue, green, red.
    assert result.per_class == {"blue": float(half), "green": float(not half), "red": 0.0}
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["test"]["per_class"] == result.per_class
    again = evaluate(network, read_split(tmp_path / "data", "test"), normalise)
    assert asdict(again) == asdict(result)


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
