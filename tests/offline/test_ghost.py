"""Ghosts differ from their network at its shortcuts alone, and what turns them turns other networks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from defense.errors import ConfigError
from defense.offline.attacks.ghost import Erosion, Ghost, ghost_attack, worn
from tests.coloured import TINY, same_tensors, tiny_network
from tests.conftest import Digits
from tests.served import SmallNet, hook_count
from tests.surrogates import known, similar


class Inline(nn.Module):
    """A torchvision-like block: its shortcut is a variable, and the sum is made in place or not."""

    def __init__(self, *, downsample: bool, onto: str) -> None:
        super().__init__()
        self.onto = onto
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.downsample = nn.Conv2d(4, 4, 1) if downsample else None

    def branch(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu(self.conv1(x)))  # type: ignore[no-any-return]

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def forward(self, x: Tensor) -> Tensor:
        identity, out = self.shortcut(x), self.branch(x)
        if self.onto == "neither":
            return identity + out
        if self.onto == "branch":
            identity, out = out, identity
        identity += out
        return identity


class Plain(nn.Module):
    """Two parallel branches of the same depth: their sum is no shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.left(x) + self.right(x)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def right(digits: Digits, net: SmallNet) -> tuple[Tensor, Tensor]:
    """Thirty images that the network gets right, and their labels."""
    return known(net, digits, 30)


def met(network: nn.Module, x: Tensor) -> tuple[int, int]:
    with torch.no_grad(), Ghost(x) as ghost:
        network(x)
    return ghost.shortcuts, ghost.maps


@pytest.mark.parametrize("downsample", [False, True])
@pytest.mark.parametrize("onto", ["branch", "shortcut", "neither"])
@torch.no_grad()
def test_the_shortcut_is_scaled_per_channel_and_the_branch_is_not(
    downsample: bool, onto: str
) -> None:
    torch.manual_seed(0)
    block, x = Inline(downsample=downsample, onto=onto), torch.randn(2, 4, 5, 5)
    given = x.clone()
    with Ghost(given, skip=0.3) as ghost:
        eroded = block(given)
    assert (ghost.shortcuts, ghost.maps) == (1, 2 + downsample)
    factors = (eroded - block.branch(x)) / block.shortcut(x)
    per_channel = factors.transpose(0, 1).flatten(1).median(1).values
    assert torch.allclose(factors, per_channel[None, :, None, None].expand_as(factors), atol=1e-2)
    assert bool(((per_channel > 0.7) & (per_channel < 1.3)).all())
    assert float(per_channel.std()) > 0.01


def test_shortcuts_are_found_whatever_the_network(net: SmallNet) -> None:
    assert met(tiny_network().eval(), torch.randn(1, 3, 12, 12))[0] == sum(TINY.depths)
    assert met(net, torch.randn(1, 1, 8, 8)) == (1, 3)
    assert met(Plain(), torch.randn(1, 3, 4, 4)) == (0, 2)


@torch.no_grad()
def test_every_ghost_is_another_network(net: SmallNet) -> None:
    x = torch.rand(4, 1, 8, 8)
    answers = []
    for _ in range(2):
        with Ghost(x, skip=0.2):
            answers.append(net(x))
    assert not torch.allclose(answers[0], answers[1])
    assert not torch.allclose(answers[0], net(x))


@torch.no_grad()
def test_a_ghost_without_erosion_is_its_network(net: SmallNet) -> None:
    x = torch.rand(4, 1, 8, 8)
    with Ghost(x):
        answers = net(x)
    assert torch.equal(answers, net(x))


def test_networks_without_shortcuts_are_worn_by_dropout() -> None:
    plain, x = Plain(), torch.rand(1, 3, 4, 4)
    wear = worn(plain, x, Erosion(dropout=0.5))
    assert wear == {"dropout": 0.5}
    torch.manual_seed(0)
    taps: list[Tensor] = []
    with torch.no_grad(), Ghost(x, **wear):
        plain.head.register_forward_pre_hook(lambda _module, args: taps.append(args[0]))
        plain(x)
    assert not torch.allclose(taps[0], (plain.left(x) + plain.right(x)).mean((2, 3)))
    assert worn(tiny_network().eval(), torch.rand(1, 3, 12, 12), Erosion(skip=0.1)) == {"skip": 0.1}


def test_images_end_in_the_ball_and_turn_networks_that_were_not_looked_at(
    trained: SmallNet, net: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    images, labels = right
    attack = ghost_attack([similar(trained, 1), similar(trained, 2)], eps=51 / 255)
    assert (attack.name, attack.family, attack.eps) == ("ghost_51", "ghost", 51 / 255)
    changed = attack.run(net, images, labels, seed=0)
    assert float((changed - images).abs().max()) <= 51 / 255 + 1e-6
    assert float((net(changed).argmax(1) != labels).double().mean()) > 0.5
    assert torch.equal(changed, attack.run(net, images, labels, seed=0))
    assert not torch.equal(changed, attack.run(net, images, labels, seed=1))
    assert torch.equal(changed, attack.run(similar(trained, 3), images, labels, seed=0))


def test_an_attack_leaves_its_surrogates_bit_for_bit_as_they_were(
    trained: SmallNet, net: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    surrogate, images = similar(trained, 1).train(), right[0]
    before, answers = similar(trained, 1), similar(trained, 1)(images)
    ghost_attack([surrogate]).run(net, *right, seed=0)
    assert same_tensors(surrogate, before)
    assert torch.equal(surrogate(images), answers)
    assert surrogate.training
    assert hook_count(surrogate) == 0
    assert all(w.requires_grad and w.grad is None for w in surrogate.parameters())


def test_momentum_remembers_earlier_steps(
    trained: SmallNet, net: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    first, other = (
        ghost_attack([similar(trained, 1)], erosion=Erosion(0, 0), momentum=m).run(
            net, *right, seed=0
        )
        for m in (0.0, 1.0)
    )
    assert not torch.equal(first, other)


def test_one_step_without_erosion_is_a_step_against_the_gradient(
    net: SmallNet, right: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("defense.offline.attacks.ghost.STEPS", 1)
    images, labels = right
    x = images.clone().requires_grad_()
    nn.functional.cross_entropy(net(x), labels).backward()
    assert x.grad is not None
    expected = ((images + 2 / 255 * x.grad.sign()).clamp(0, 1) * 255).round() / 255
    attack = ghost_attack([net], eps=16 / 255, erosion=Erosion(0, 0))
    assert torch.equal(attack.run(net, images, labels, seed=0), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ghost_attack([]), "needs at least one surrogate, got none; train one"),
        (lambda: Erosion(skip=1.0), r"erosion's skip must lie in \[0, 1\), got 1.0"),
        (lambda: Erosion(dropout=-0.1), r"erosion's dropout must lie in \[0, 1\), got -0.1"),
        (
            lambda: worn(nn.Flatten(), torch.rand(1, 1, 2, 2), Erosion()),
            "nothing to erode in Flatten: .* give the ghost attack another surrogate",
        ),
    ],
)
def test_what_cannot_be_eroded_is_an_error(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
