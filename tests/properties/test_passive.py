"""Invariant 1: the guard observes. Logits stay bit-identical and no hook stays, whatever happens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.vision_transformer import VisionTransformer

from defense.backbone import GatedBackbone
from defense.guard import Guard
from defense.routers.activation import STATISTICS, ActivationRouter
from defense.sites import discover_sites
from defense.types import PathLayout
from tests.served import SmallNet, hook_count, images_like_noise, seeded_net


class Plain(nn.Module):
    """In-place functional activations, batch norm, no activation module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.conv2, self.head = nn.Conv2d(6, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(x)), inplace=True)
        logits: Tensor = self.head(F.relu(self.conv2(x), inplace=True).mean((2, 3)))
        return logits


class Encoder(nn.Module):
    """Rows of the image are tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(x[:, 0]).mean(1))
        return logits


def vision_transformer() -> nn.Module:
    vit = VisionTransformer(8, 4, 2, 2, 8, 12, num_classes=5)
    return nn.Sequential(nn.Conv2d(1, 3, 1), vit)


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 1), models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], 5)
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "residual": SmallNet,
    "plain": Plain,
    "encoder": Encoder,
    "vision transformer": vision_transformer,
    "resnet": resnet,
}


def network(family: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAMILIES[family]().eval()


@pytest.mark.parametrize("family", FAMILIES)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 5),
    statistics=st.lists(st.sampled_from(STATISTICS), min_size=1, max_size=3, unique=True),
    inference=st.booleans(),
)
def test_a_network_of_any_family_answers_bit_for_bit_as_without_hooks(
    family: str, seed: int, rows: int, statistics: list[str], inference: bool
) -> None:
    model, batch = network(family, seed), images_like_noise(rows, seed)
    router = ActivationRouter(PathLayout(discover_sites(model, batch), tuple(statistics)))
    with torch.inference_mode(inference):
        bare = model(batch)
        with GatedBackbone(model, router) as gated:
            observed = gated.run(batch)
            carried = model(batch)
    assert torch.equal(observed.logits, bare)
    assert torch.equal(carried, bare)
    assert observed.path.shape == (rows, router.layout.length)
    assert hook_count(model) == 0


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 6))
def test_a_guard_at_work_changes_no_bit_of_the_logits(
    guard: Guard, trained: SmallNet, seed: int, rows: int
) -> None:
    batch = images_like_noise(rows, seed)
    with torch.inference_mode():
        bare = trained(batch)
        with guard.attach(trained) as attached:
            guarded = attached(batch)
    assert torch.equal(guarded.logits, bare)
    assert hook_count(trained) == 0


class Stop(Exception):
    """What somebody's code raises."""


@given(where=st.sampled_from(["", "stem", "act", "block", "block.relu", "block.conv2", "head"]))
def test_an_exception_anywhere_in_the_forward_pass_leaves_no_hook_and_no_recording(
    where: str,
) -> None:
    model, batch = seeded_net(), images_like_noise(2, 0)
    router = ActivationRouter(PathLayout(discover_sites(model, batch), ("mean",)))
    expected = model(batch)

    def raising(_module: nn.Module, _args: object) -> None:
        raise Stop

    trap = model.get_submodule(where).register_forward_pre_hook(raising)
    with GatedBackbone(model, router) as gated:
        with pytest.raises(Stop), gated.record() as recording:
            model(batch)
        assert all(run.logits is None for run in recording.runs)
        trap.remove()
        assert torch.equal(gated.run(batch).logits, expected)
    assert hook_count(model) == 0
