"""An invertible network returns the image, keeps its bounds, and is trained and described as others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from defense.errors import ArchiveError, ArtifactError
from defense.offline.archived import pack_network
from defense.offline.backbones import first_network, train_backbone
from defense.offline.cards import load_network
from defense.offline.invertible import (
    CONTRACTION,
    LEAST_GAIN,
    BoundedConv2d,
    InvertibleBlock,
    InvertibleResNet,
    TrunkNorm,
    Unfold,
    mixed,
)
from defense.offline.methods import METHODS
from defense.offline.networks import Architecture
from defense.offline.training import train
from tests.coloured import (
    SETTINGS,
    TINY,
    coloured_images,
    interrupt_at,
    same_tensors,
    silent,
    write_folder,
)

SMALL = Architecture(depths=(1, 2), widths=(6, 8), stem=12, classes=3)
METHOD = METHODS["invertible"]


def small_network(architecture: Architecture = SMALL) -> InvertibleResNet:
    torch.manual_seed(2)
    return InvertibleResNet(architecture)


@pytest.fixture(scope="module")
def settled() -> InvertibleResNet:
    """A network whose batch norms know some images, and whose branches are as steep as they may be."""
    network = small_network().train()
    for module in network.modules():
        if isinstance(module, BoundedConv2d):
            module.weight.data *= 10
    for _ in range(30):
        network.hold()
    for seed in range(5):
        network(pictures(8, seed))
    return network.eval()


def pictures(count: int, seed: int = 0, side: int = 8) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def matrix_of(convolution: nn.Conv2d, side: int) -> Tensor:
    """Return a convolution without its bias as the matrix that it is, on maps of one side."""
    units = torch.eye(convolution.in_channels * side**2)
    maps = units.view(-1, convolution.in_channels, side, side)
    margin = convolution.padding[0]
    assert isinstance(margin, int)
    return nn.functional.conv2d(maps, convolution.weight, padding=margin).flatten(1).T.detach()


@torch.no_grad()
def test_the_image_comes_back_from_its_features(settled: InvertibleResNet) -> None:
    images = pictures(6, seed=9)
    features = settled.trunk(images)
    assert features.shape == (6, 48, 2, 2)
    assert torch.allclose(settled(images), settled.answer(features))
    assert float((settled.invert(features) - images).abs().max()) < 1e-4


@torch.no_grad()
def test_other_features_have_an_image_too(settled: InvertibleResNet) -> None:
    features = torch.randn(4, 48, 2, 2, generator=torch.Generator().manual_seed(1))
    assert float((settled.trunk(settled.invert(features)) - features).abs().max()) < 1e-3


@torch.no_grad()
def test_neither_way_stretches_by_more_than_the_network_says(settled: InvertibleResNet) -> None:
    there, back = settled.stretch(8)
    assert 1 / back <= there < float("inf")
    images = pictures(6, seed=9)
    features = settled.trunk(images)
    for size in (1e-2, 1.0):
        moved = features + size * torch.randn(features.shape)
        change = (settled.invert(moved) - images).flatten(1).norm(dim=1)
        length = (moved - features).flatten(1).norm(dim=1)
        assert bool((change <= back * length * 1.001).all())
        assert bool((length <= there * change * 1.001).all())


@pytest.mark.parametrize("size", [1, 3])
@torch.no_grad()
def test_the_norm_of_a_convolution_is_an_upper_bound_and_close(size: int) -> None:
    torch.manual_seed(0)
    convolution = BoundedConv2d(4, 5, size, bound=0.9)
    for side in (3, 6):
        true = float(torch.linalg.matrix_norm(matrix_of(convolution, side), 2))
        assert true <= convolution.norm(side) * (1 + 1e-6)
    assert convolution.norm(6) < true * 1.15
    assert true <= convolution.norm(7) + 1e-6


@pytest.mark.parametrize("size", [1, 3])
@torch.no_grad()
def test_holding_shrinks_what_is_too_steep_and_nothing_else(size: int) -> None:
    torch.manual_seed(0)
    steep = BoundedConv2d(4, 5, size, bound=0.9)
    steep.weight *= 20
    for _ in range(60):
        steep.hold()
    assert 0.87 < steep.norm(6) < 0.93
    steep.weight *= 0.5
    kept = steep.weight.clone()
    steep.hold()
    assert torch.equal(steep.weight, kept)


def test_a_branch_is_a_contraction(settled: InvertibleResNet) -> None:
    blocks = [step for step in settled.steps() if isinstance(step, InvertibleBlock)]
    assert len(blocks) == 3
    assert all(0.7 < block.norm(4) < 1.05 * CONTRACTION for block in blocks)


@torch.no_grad()
def test_a_branch_that_is_none_is_an_error_instead_of_a_wrong_image() -> None:
    torch.manual_seed(0)
    block = InvertibleBlock(12, 6)
    for module in block.branch:
        if isinstance(module, BoundedConv2d):
            module.weight *= 4
    assert block.norm(4) > 1
    with pytest.raises(
        ArtifactError, match="no contraction; train it with the method 'invertible'"
    ):
        block.inverse(torch.randn(2, 12, 4, 4))


@torch.no_grad()
def test_the_bound_of_an_inverse_is_infinite_where_there_may_be_none() -> None:
    network = small_network().eval()
    for module in network.modules():
        if isinstance(module, BoundedConv2d):
            module.weight *= 4
    assert network.stretch(8)[1] == float("inf")


def test_unfolding_is_a_rotation_whose_first_channel_is_the_average() -> None:
    images = pictures(2)
    unfolded = Unfold()(images)
    assert unfolded.shape == (2, 12, 4, 4)
    assert torch.allclose(unfolded[:, 0], 2 * nn.functional.avg_pool2d(images, 2)[:, 0], atol=1e-6)
    assert torch.allclose(unfolded.norm(), images.norm())
    assert torch.allclose(Unfold().inverse(unfolded), images, atol=1e-6)
    assert torch.allclose(mixed(mixed(unfolded)), unfolded, atol=1e-6)


def test_a_batch_norm_never_comes_near_zero() -> None:
    network = small_network()
    norm = next(step for step in network.steps() if isinstance(step, TrunkNorm))
    norm.weight.data[0] = -1
    network.hold()
    assert float(norm.weight.detach().min()) == pytest.approx(LEAST_GAIN)


@pytest.mark.parametrize(("stem", "side"), [(12, 4), (48, 2)])
def test_every_stage_but_the_first_halves_the_image(stem: int, side: int) -> None:
    network = small_network(Architecture((1, 1), (4, 4), stem=stem, classes=3)).eval()
    assert network.trunk(pictures(2, side=16)).shape == (2, 4 * stem, side, side)


def test_a_stem_that_is_no_unfolding_is_refused() -> None:
    with pytest.raises(ValueError, match="the stem of an invertible network is 12 or 48, got"):
        InvertibleResNet(replace(SMALL, stem=32))


def test_a_trained_network_knows_its_images_and_is_still_invertible(tmp_path: Path) -> None:
    images, network = coloured_images(), small_network()
    run(network, tmp_path / "checkpoint")
    assert network.stretch(12)[1] < float("inf")
    with torch.no_grad():
        x = images.normalisation(images.pixels)
        assert float((network(x).argmax(1) == images.labels).double().mean()) > 0.9
        assert float((network.invert(network.trunk(x)) - x).abs().max()) < 1e-4


def test_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, stopped, resumed = (small_network() for _ in range(3))
    run(whole, tmp_path / "whole")
    undo = interrupt_at(stopped, 8)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, tmp_path / "stopped")
    undo()
    run(resumed, tmp_path / "stopped")
    assert same_tensors(whole, resumed)


def run(network: InvertibleResNet, checkpoint: Path) -> None:
    train(
        network,
        coloured_images(),
        SETTINGS,
        checkpoint=checkpoint,
        objective=METHOD.objective,
        console=silent(),
    )


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the card of a small invertible network."""
    folder = tmp_path_factory.mktemp("invertible")
    write_folder(folder / "data", "train", coloured_images(33))
    write_folder(folder / "data", "test", coloured_images(12))
    train_backbone(
        folder / "data",
        folder / "small.safetensors",
        method=METHOD,
        architecture=SMALL,
        settings=replace(SETTINGS, epochs=1),
        checkpoint=folder / "checkpoint",
        command="pathguard train data",
    )
    return folder / "small.json"


def test_a_card_brings_an_invertible_network_back(card: Path) -> None:
    network, _ = load_network(card)
    assert isinstance(network, InvertibleResNet)
    assert network.architecture == SMALL
    assert json.loads(card.read_text())["objective"]["name"] == "InvertibleObjective"


def test_an_invertible_network_starts_afresh_and_starts_no_other(card: Path) -> None:
    images = coloured_images(33)
    with pytest.raises(ArtifactError, match="describes a InvertibleResNet, from which this method"):
        first_network(METHODS["plain"], TINY, images, card)
    with pytest.raises(ArtifactError, match="from which this method cannot go on; give the card"):
        first_network(METHOD, SMALL, images, card)
    fresh = first_network(METHOD, SMALL, images, None)
    assert all(weight.requires_grad for weight in fresh.parameters())


def test_an_invertible_network_is_not_packed(card: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"which is for attacks .* pack a network of another"):
        pack_network(card, tmp_path / "a.mar")
