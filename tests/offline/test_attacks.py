"""Attacks change what the network says, stay in their ball, and end in what a client can send."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from defense.errors import ConfigError
from defense.offline import attacks
from defense.offline.attacks import make_attack, uniform_noise
from defense.offline.attacks.targeted import STEP, STEPS, TargetedSteps, targets
from tests.conftest import Digits
from tests.served import SmallNet, hook_count

NAMES = ("fgsm", "bim", "pgd", "cw", "deepfool", "cdrp")
BOUNDED = NAMES[:3]


@pytest.fixture
def right(digits: Digits, net: SmallNet) -> tuple[Tensor, Tensor]:
    """Twelve images that the network gets right, and their labels."""
    rows = (net(digits.images).argmax(1) == digits.labels).nonzero().flatten()[:12]
    return digits.images[rows], digits.labels[rows]


def in_eight_bits(images: Tensor) -> bool:
    steps = images * 255
    return bool((steps - steps.round()).abs().max() < 1e-3) and bool(
        ((images >= 0) & (images <= 1)).all()
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cdrp"])
def test_an_attack_changes_answers_with_images_that_a_client_can_send(
    name: str, net: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    images, labels = right
    attack = make_attack(name, eps=0.2)
    changed = attack.run(net, images, labels, seed=0)
    assert changed.shape == images.shape
    assert in_eight_bits(changed)
    # Attacks that minimise their size give up on images that would take much.
    least = 0.2 if attack.eps is None else 0.5
    assert float((net(changed).argmax(1) != labels).double().mean()) > least
    assert not changed.requires_grad
    if attack.eps is not None:
        assert float((changed - images).abs().amax()) <= 0.2 + 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_attack(
    name: str, net: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    first, again = (make_attack(name, eps=0.1).run(net, *right, seed=4) for _ in range(2))
    assert torch.equal(first, again)


def test_another_seed_gives_another_random_start(
    net: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    first, other = (make_attack("pgd", eps=0.1).run(net, *right, seed=s) for s in (1, 2))
    assert not torch.equal(first, other)


def test_an_attack_leaves_the_network_its_images_and_the_random_state_alone(
    net: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    images, labels = right
    before, state = images.clone(), torch.get_rng_state()
    make_attack("pgd", eps=0.1).run(net, images, labels, seed=0)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not net.training
    assert hook_count(net) == 0


def test_images_are_attacked_in_batches_and_stay_in_order(
    net: SmallNet, right: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_attack("fgsm", eps=0.1).run(net, *right, seed=0)
    monkeypatch.setattr(attacks, "BATCH", 5)
    assert torch.equal(make_attack("fgsm", eps=0.1).run(net, *right, seed=0), whole)


def test_a_step_against_the_gradient_is_what_fgsm_takes(
    net: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    images, labels = right
    x = images.clone().requires_grad_()
    torch.nn.functional.cross_entropy(net(x), labels).backward()
    assert x.grad is not None
    expected = ((images + 51 / 255 * x.grad.sign()).clamp(0, 1) * 255).round() / 255
    assert torch.equal(make_attack("fgsm", eps=51 / 255).run(net, images, labels, seed=0), expected)


def test_an_unknown_attack_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no attack 'pgdd'; did you mean 'pgd'"):
        make_attack("pgdd", eps=0.1)


def test_a_missing_extra_is_an_error_that_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(
        ConfigError, match=r"need the extra 'attacks'; pip install 'pathguard.attacks.'"
    ):
        make_attack("fgsm", eps=0.1)


def test_noise_of_a_size_stays_within_it_and_reaches_its_edges(
    right: tuple[Tensor, Tensor],
) -> None:
    images = 0.5 + 0 * right[0]
    images = (images * 255).round() / 255
    noisy = uniform_noise(images, eps=10 / 255, seed=0)
    steps = ((noisy - images) * 255).round()
    assert in_eight_bits(noisy)
    assert (float(steps.amin()), float(steps.amax())) == (-10, 10)
    assert abs(float(steps.mean())) < 1
    assert torch.equal(noisy, uniform_noise(images, eps=10 / 255, seed=0))
    assert not torch.equal(noisy, uniform_noise(images, eps=10 / 255, seed=1))


@pytest.mark.parametrize(
    "make",
    [lambda x, e: uniform_noise(x, eps=e, seed=0), lambda x, e: attacks._eight_bit(x + 1, x, e)],
)
def test_nothing_leaves_the_pixels_range(
    make: Callable[[Tensor, float], Tensor], right: tuple[Tensor, Tensor]
) -> None:
    assert in_eight_bits(make(right[0], 0.7))


def test_the_cdrp_attack_goes_to_the_next_class_in_small_steps(
    net: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    images, labels = right
    changed = TargetedSteps(net)(images, labels)
    assert targets(3).tolist() == [1, 2, 0]
    assert float((changed - images).abs().max()) <= STEPS * STEP + 1e-6
    wanted = targets(10)[labels][:, None]
    before, after = (net(x).log_softmax(1).gather(1, wanted) for x in (images, changed))
    assert bool((after > before).all())
