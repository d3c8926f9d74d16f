"""Attacks change what the network says, stay in their ball, and end in what a client can send."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from defense.errors import ConfigError
from defense.offline.attacks import ATTACKS, Attack, eight_bit, make_attack, uniform_noise
from defense.offline.attacks.descent import Confident, Descent, in_turn, logits_ratio, margin
from defense.offline.attacks.targeted import STEP, STEPS, TargetedSteps, targets
from tests.conftest import Digits
from tests.served import SmallNet, hook_count, seeded_net

Right = tuple[Tensor, Tensor]

NAMES = ("fgsm", "bim", "pgd", "mifgsm", "apgd", "apgd_dlr", "square", "cw", "deepfool", "cdrp")


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
    images, labels = right[0][:4], right[1][:4]
    first, again = (make_attack(name, eps=0.1).run(net, images, labels, seed=4) for _ in range(2))
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
    net: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    attack = make_attack("fgsm", eps=0.1)
    whole = attack.run(net, *right, seed=0)
    assert torch.equal(replace(attack, batch=5).run(net, *right, seed=0), whole)


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
    [lambda x, e: uniform_noise(x, eps=e, seed=0), lambda x, e: eight_bit(x + 1, x, e)],
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


@pytest.mark.parametrize("name", ["autoattack", "pixle", "patch", "pgd_l2", "cw_10"])
def test_the_other_rows_run_and_turn_images_that_a_client_can_send(
    name: str, trained: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    images, labels = right[0][:4], right[1][:4]
    labels = trained(images).argmax(1)
    changed = make_attack(name, eps=2.0 if name == "pgd_l2" else 0.2).run(
        trained, images, labels, seed=0
    )
    assert in_eight_bits(changed)
    assert bool((trained(changed).argmax(1) != labels).any())


def test_every_row_of_the_table_can_be_made_and_is_called_by_its_name() -> None:
    made = [make_attack(name) for name in ATTACKS]
    assert [attack.name for attack in made] == list(ATTACKS)
    assert {attack.norm for attack in made} == {"linf", "l2", "l0"}
    assert {a.family for a in made if a.name.startswith(("pgd", "bim"))} == {"pgd"}


def test_a_size_in_the_name_goes_before_eps() -> None:
    assert make_attack("pgd_4").eps == make_attack("pgd_4", eps=0.5).eps == 4 / 255
    assert make_attack("apgd_dlr_2").eps == 2 / 255
    assert make_attack("pgd", eps=0.5).eps == 0.5
    assert make_attack("cw_10", eps=0.5).eps is None


def test_an_attack_in_a_ball_needs_a_size() -> None:
    with pytest.raises(ConfigError, match="attack 'pgd' needs a size; say 'pgd_8' for 8/255"):
        make_attack("pgd")


def test_an_attack_without_a_family_is_a_family_of_its_own() -> None:
    assert Attack("new", None, lambda model: lambda x, y: x).family == "new"


def test_a_patch_changes_its_square_alone(net: SmallNet, right: tuple[Tensor, Tensor]) -> None:
    images, labels = right
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        changed = Descent(net, 1.0, patch=3)(images, labels)
    moved = (changed != images).any(1)
    for dim in (1, 2):
        found = moved.any(dim).nonzero()
        for row in found[:, 0].unique():
            places = found[found[:, 0] == row, 1]
            assert int(places.max() - places.min()) < 3
    assert bool(moved.any())


def test_confidence_is_a_margin_that_is_reached(trained: SmallNet, right: Right) -> None:
    images = right[0]
    labels = trained(images).argmax(1)
    start = Descent(trained, 0.5, loss=logits_ratio)
    reached = [
        margin(trained(Confident(trained, wanted, start=start)(images, labels)), labels)
        for wanted in (0.0, 0.3)
    ]
    assert bool((reached[0] > 0).all())
    assert bool((reached[1] >= 0.3).all())
    assert float(reached[0].mean()) < float(reached[1].mean())


def test_later_attempts_are_made_on_what_is_left_and_lose_nothing(
    net: SmallNet, right: Right
) -> None:
    images, labels = right
    seen: list[int] = []

    def strong(x: Tensor, y: Tensor) -> Tensor:
        seen.append(len(x))
        return Descent(net, 0.5)(x, y)

    weak = make_attack("fgsm", eps=0.05).run(net, images, labels, seed=0)
    first = net(weak).argmax(1) != labels
    both = in_turn(net, lambda x, y: weak, strong)(images, labels)
    assert seen == [int((~first).sum())]
    assert torch.equal(both[first], weak[first])
    assert bool((net(both).argmax(1) != labels).sum() > first.sum())


def test_the_weights_keep_no_gradients_and_the_mode_comes_back(right: Right) -> None:
    net = seeded_net().train()
    net.block.eval()
    make_attack("cw").run(net, right[0][:2], right[1][:2], seed=0)
    assert net.training
    assert not net.block.training
    assert all(w.grad is None and w.requires_grad for w in net.parameters())
