"""Attacks that know the guard: inside the ball, on 8 bits, less suspicious, and as published."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from defense.backbone import GatedBackbone
from defense.errors import ArtifactError, ConfigError, DataError, SiteError
from defense.guard import Guard
from defense.looks import Echo, Extras, Perturbation
from defense.offline.attacks.adaptive import (
    ADAPTIVE,
    BARE,
    AdaptiveAttack,
    Attacked,
    Bank,
    Glance,
    OpenGuard,
    WhiteBox,
    make_bank,
    open_guard,
    worst_case,
)
from defense.offline.attacks.adaptive.joint import Joint
from defense.offline.attacks.adaptive.matching import Mimic, PathMatching
from defense.offline.attacks.adaptive.projected import Bare, Orthogonal, Selective, across
from defense.offline.attacks.adaptive.search import ANY, gradient, margin
from defense.offline.attacks.adaptive.straight import straight_through
from defense.offline.fit import FitOptions, fit_module
from defense.offline.pixels import PixelSpace
from defense.types import Routed
from tests.conftest import TRAINED_ON, Digits
from tests.decoupled_net import decoupled_net
from tests.looks import small_witness
from tests.served import SmallNet, hook_count, images_like_noise, seeded_net

GREY = PixelSpace(torch.ones(1, 1, 1), torch.zeros(1, 1, 1), "L")
DENSITY = FitOptions(detector="density")
EPS = 48 / 255
COUNT = 24
ATTACKS: dict[str, AdaptiveAttack] = {
    "joint": Joint(steps=8, rounds=3),
    "selective": Selective(steps=12, restarts=2),
    "orthogonal": Orthogonal(steps=12, restarts=2),
    "matching": PathMatching(steps=12, restarts=2),
    "mimic": Mimic(steps=12, restarts=2),
    "bare": Bare(steps=12),
}
NAMES = tuple(ATTACKS)


@dataclass(frozen=True)
class Lab:
    """A guard opened to attackers, images it has not seen, and what attacks made of them."""

    whitebox: OpenGuard
    pixels: Tensor
    labels: Tensor
    threshold: float
    bank: Bank
    found: dict[str, Attacked]

    def run(
        self,
        attack: AdaptiveAttack,
        *,
        eps: float = EPS,
        seed: int = 0,
        whitebox: WhiteBox | None = None,
    ) -> Attacked:
        return attack.run(
            whitebox or self.whitebox,
            self.pixels,
            self.labels,
            eps=eps,
            threshold=self.threshold,
            bank=self.bank,
            seed=seed,
        )


@pytest.fixture(scope="module")
def lab(trained: SmallNet, digits: Digits) -> Lab:
    own = copy.deepcopy(trained)
    rest = (digits.images[TRAINED_ON:-200], digits.labels[TRAINED_ON:-200])
    whitebox = open_guard(fit_module(own, [rest], options=DENSITY), own, GREY)
    held, labels = digits.images[-200:], digits.labels[-200:]
    right = (own(held).argmax(1) == labels).nonzero().flatten()[:COUNT]
    threshold = float(whitebox.guard.calibration.score.quantile(0.95))
    bank = make_bank(whitebox, digits.images[:200], digits.labels[:200])
    made = Lab(whitebox, held[right], labels[right], threshold, bank, {})
    return dataclasses.replace(made, found={name: made.run(ATTACKS[name]) for name in NAMES})


def test_an_open_guard_shows_what_the_guard_itself_sees(lab: Lab) -> None:
    glance = lab.whitebox(lab.pixels)
    with (
        GatedBackbone(lab.whitebox.model, lab.whitebox.guard.router) as gated,
        torch.inference_mode(),
    ):
        routed = gated.run(lab.pixels)
    assert torch.equal(glance.logits, routed.logits)
    assert torch.equal(glance.path, routed.path)
    assert torch.equal(glance.score, lab.whitebox.guard.detector.score(routed))
    assert len(glance.activations) == len(lab.whitebox.guard.router.layout.sites)
    assert hook_count(lab.whitebox.model) == 0


@pytest.mark.parametrize("detector", ["density", "trajectory", "overlap", "supervised", "fused"])
def test_every_score_has_a_slope_on_every_image(
    lab: Lab, digits: Digits, detector: str, net: SmallNet
) -> None:
    data = (digits.images[:300], digits.labels[:300])
    statistics = ("mean", "max", "deviation")
    options = FitOptions(detector=detector, statistics=statistics)
    guard = fit_module(net, [data], options=options, attack=lambda x, _: 1 - x)
    assert sloped(open_guard(guard, net, GREY), lab.pixels) > 0.9


def sloped(whitebox: WhiteBox, pixels: Tensor) -> float:
    """Return the share of images whose score has a slope, of those with any score but the lowest.

    Density and overlap count nothing below what is usual, and are flat at 0 there.
    """
    rated = whitebox(pixels).score != 0
    assert int(rated.sum()) >= 5
    found = slopes(whitebox, pixels)
    assert bool(found.isfinite().all())
    return float((found[rated] > 0).double().mean())


def slopes(whitebox: WhiteBox, pixels: Tensor) -> Tensor:
    """Return (N,) the largest slope of every image's score."""
    sent = pixels.clone().requires_grad_()
    return gradient(whitebox(sent).score, sent).flatten(1).abs().amax(1)


def test_a_score_falls_along_its_slope(lab: Lab) -> None:
    sent = lab.pixels.clone().requires_grad_()
    before = lab.whitebox(sent).score
    ahead = lab.pixels - 1e-4 * gradient(before, sent).sign()
    rated = before > 0
    assert float((lab.whitebox(ahead).score < before)[rated].double().mean()) > 0.9


def test_a_channel_that_never_moves_gives_its_deviation_no_slope(
    net: SmallNet, digits: Digits
) -> None:
    with torch.no_grad():
        net.stem.weight[:1].zero_()
    data = (digits.images[:300], digits.labels[:300])
    guard = fit_module(net, [data], options=dataclasses.replace(DENSITY, statistics=("deviation",)))
    assert bool(slopes(open_guard(guard, net, GREY), digits.images[:5]).isfinite().all())


def test_the_fullest_look_is_attacked_and_any_other_can_be_asked_for(
    lab: Lab, digits: Digits
) -> None:
    guard = with_echoes(lab.whitebox.guard)
    full = open_guard(guard, lab.whitebox.model, GREY)
    assert full.look == "path+echoes"
    assert open_guard(guard, lab.whitebox.model, GREY, look="path").look == "path"
    assert bool((slopes(full, lab.pixels) > 0).any())
    with pytest.raises(ConfigError, match="no look 'path\\+witness'"):
        open_guard(guard, lab.whitebox.model, GREY, look="path+witness")


@dataclass(frozen=True)
class Unsteady:
    """A detector that counts how far the answer moves under an echo."""

    name: ClassVar[str] = "unsteady"

    def score(self, routed: Routed) -> Tensor:
        assert routed.echoes is not None
        return (routed.echoes - routed.logits[:, None]).square().mean((1, 2)).double()


def with_echoes(guard: Guard) -> Guard:
    echo = Echo((Perturbation("mirror"), Perturbation("noise", 0.1)))
    looks = {"path": guard.calibration, "path+echoes": guard.calibration}
    return dataclasses.replace(guard, detector=Unsteady(), calibrations=looks, echo=echo)


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_fools_within_its_ball_with_images_that_a_client_can_send(
    lab: Lab, name: str
) -> None:
    found = lab.found[name]
    steps = found.pixels * 255
    assert found.pixels.shape == lab.pixels.shape
    assert float((steps - steps.round()).abs().max()) < 1e-3
    assert bool(((found.pixels >= 0) & (found.pixels <= 1)).all())
    assert float((found.pixels - lab.pixels).abs().max()) <= EPS + 1e-6
    assert float(found.fooled.double().mean()) > (0.3 if name == "mimic" else 0.9)
    assert not found.pixels.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_what_is_reported_is_what_the_images_do(lab: Lab, name: str) -> None:
    found = lab.found[name]
    glance = lab.whitebox(found.pixels)
    assert torch.equal(found.fooled, glance.logits.argmax(1) != lab.labels)
    torch.testing.assert_close(found.score, glance.score.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["joint", "selective", "orthogonal", "matching"])
def test_who_knows_the_guard_is_less_suspicious_than_who_does_not(lab: Lab, name: str) -> None:
    aware, unaware = lab.found[name], lab.found["bare"]
    both = aware.fooled & unaware.fooled
    assert int(both.sum()) > COUNT / 2
    assert float((aware.score < unaware.score)[both].double().mean()) > 0.8


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_images(lab: Lab, name: str) -> None:
    again = lab.run(ATTACKS[name])
    assert torch.equal(again.pixels, lab.found[name].pixels)
    assert torch.equal(again.score, lab.found[name].score)


def test_another_seed_gives_other_images(lab: Lab) -> None:
    assert not torch.equal(
        lab.run(ATTACKS["selective"], seed=1).pixels, lab.found["selective"].pixels
    )


@pytest.mark.parametrize("name", ["selective", "orthogonal", "matching"])
def test_more_restarts_are_never_worse(lab: Lab, name: str) -> None:
    fewer = lab.run(dataclasses.replace(ATTACKS[name], restarts=1))
    more = lab.found[name]
    assert bool((more.fooled | ~fewer.fooled).all())
    better = more.score <= fewer.score + 1e-4 * fewer.score.abs()
    assert bool(better[fewer.fooled].all())


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_of_no_size_changes_nothing(lab: Lab, name: str) -> None:
    found = lab.run(dataclasses.replace(ATTACKS[name], steps=2, restarts=1), eps=0.0)
    assert torch.equal((found.pixels * 255).round(), (lab.pixels * 255).round())
    assert not bool(found.fooled.any())


class Counted:
    """A white box that counts the images it is shown, with and without gradient."""

    def __init__(self, inner: WhiteBox) -> None:
        self.inner, self.looks, self.with_graph = inner, 0, 0

    def __call__(self, pixels: Tensor) -> Glance:
        self.looks += len(pixels)
        self.with_graph += len(pixels) * pixels.requires_grad
        return self.inner(pixels)


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_takes_the_passes_that_it_says(lab: Lab, name: str) -> None:
    counted = Counted(lab.whitebox)
    attack = dataclasses.replace(ATTACKS[name], steps=3, restarts=2)
    lab.run(attack, whitebox=counted)
    forward, backward = attack.passes
    assert counted.looks == COUNT * (forward + 2)
    per_look = {"orthogonal": 2}.get(name, 1)
    extra = attack.restarts if name == "joint" else 0
    assert counted.with_graph * per_look + COUNT * extra == COUNT * backward


def test_images_that_get_through_with_room_to_spare_are_left_alone(lab: Lab) -> None:
    counted = Counted(lab.whitebox)
    attack = Selective(steps=12, restarts=2, spare=0.0)
    found = dataclasses.replace(lab, threshold=1e9).run(attack, whitebox=counted)
    assert bool(found.fooled.all())
    assert counted.looks < 0.7 * COUNT * (attack.passes[0] + 2)


def test_a_joint_attack_without_room_to_hide_still_fools(lab: Lab) -> None:
    found = dataclasses.replace(lab, threshold=-1e9).run(Joint(steps=8, rounds=2))
    assert float(found.fooled.double().mean()) > 0.9


def test_the_worst_case_is_never_worse_for_the_attacker_than_any_attack(lab: Lab) -> None:
    worst = worst_case(list(lab.found.values()))
    glance = lab.whitebox(worst.pixels)
    assert torch.equal(worst.fooled, glance.logits.argmax(1) != lab.labels)
    for found in lab.found.values():
        assert bool((worst.fooled | ~found.fooled).all())
        assert bool((worst.score <= found.score)[found.fooled].all())


def test_fooling_beats_not_fooling_whatever_the_score() -> None:
    first = Attacked(torch.zeros(2, 1, 1, 1), torch.tensor([False, True]), torch.tensor([0.0, 2.0]))
    second = Attacked(torch.ones(2, 1, 1, 1), torch.tensor([True, True]), torch.tensor([9.0, 1.0]))
    worst = worst_case([first, second])
    assert worst.score.tolist() == [9.0, 1.0]
    assert worst.pixels.flatten().tolist() == [1.0, 1.0]
    assert worst.fooled.tolist() == [True, True]


def test_an_attack_works_inside_inference_mode_and_leaves_everything_as_it_was(lab: Lab) -> None:
    before, state = lab.pixels.clone(), torch.get_rng_state()
    with torch.inference_mode():
        found = lab.run(dataclasses.replace(ATTACKS["selective"], steps=4))
    assert bool(found.fooled.any())
    assert torch.equal(lab.pixels, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert hook_count(lab.whitebox.model) == 0
    assert all(weight.grad is None for weight in lab.whitebox.model.parameters())


def test_batches_are_told_as_they_are_done(lab: Lab) -> None:
    told: list[int] = []

    class Told:
        def advance(self, steps: int = 1) -> None:
            told.append(steps)

    attack = Bare(steps=1, batch=10)
    attack.run(
        lab.whitebox,
        lab.pixels,
        lab.labels,
        eps=EPS,
        threshold=lab.threshold,
        seed=0,
        progress=Told(),
    )
    assert told == [10, 10, 4]


@pytest.fixture(scope="module")
def decoupled() -> tuple[Guard, nn.Module]:
    net = decoupled_net()
    options = FitOptions(router="decoupled", detector="overlap")
    return fit_module(net, [images_like_noise(200, 1)], options=options), net


def test_a_hard_gate_has_a_slope_only_where_it_is_asked_for(
    decoupled: tuple[Guard, nn.Module],
) -> None:
    pixels = images_like_noise(12, 9)
    hard = open_guard(*decoupled, GREY, temperature=None)
    soft = open_guard(*decoupled, GREY, temperature=1.0)
    assert torch.equal(hard(pixels).path, soft(pixels).path)
    assert torch.equal(hard(pixels).score, soft(pixels).score)
    assert not hard(pixels.clone().requires_grad_()).path.requires_grad
    assert bool((slopes(hard, pixels) == 0).all())
    assert sloped(soft, pixels) > 0.9


@pytest.mark.parametrize("router", ["effective", "generative"])
def test_routers_with_hard_steps_of_their_own_get_a_slope_too(
    router: str, net: SmallNet, digits: Digits
) -> None:
    guard = fit_module(
        net, [digits.images[:80]], options=dataclasses.replace(DENSITY, router=router)
    )
    pixels = digits.images[200:220]
    hard, soft = (open_guard(guard, net, GREY, temperature=t) for t in (None, 1.0))
    assert torch.equal(hard(pixels).path, soft(pixels).path)
    # Generated masks are nearly, not quite, hard: rounding alone takes their slope.
    assert float(slopes(hard, pixels).abs().max()) == 0
    assert sloped(soft, pixels) > 0.9


def test_straight_steps_are_as_hard_as_before_and_slope_like_a_sigmoid() -> None:
    x = torch.tensor([[-1.0, 0.5, 2.0]], requires_grad=True)
    with straight_through(2.0):
        step, below, rounded = (x > 0).to(x.dtype), (x <= 0).float(), x.round()
        mean = (x > 0).mean((1,), dtype=torch.float32)
    assert step.tolist() == [[0.0, 1.0, 1.0]]
    assert below.tolist() == [[1.0, 0.0, 0.0]]
    assert rounded.tolist() == [[-1.0, 0.0, 2.0]]
    assert mean.item() == pytest.approx(2 / 3)
    scaled = x.detach() / (2.0 * x.detach().std(correction=0))
    slope = scaled.sigmoid() * (1 - scaled.sigmoid()) / (2.0 * x.detach().std(correction=0))
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    close(gradient(step.sum(1), x), slope)
    close(gradient(below.sum(1), x), -slope)
    close(gradient(mean, x), slope / 3)
    close(gradient(rounded.sum(1), x), torch.ones(1, 3))
    assert not (x > 0).float().requires_grad


def test_what_is_cut_off_on_both_sides_still_says_the_way_back() -> None:
    x = torch.tensor([[-3.0, 0.5, 2.0]], requires_grad=True)
    with straight_through(1.0):
        cut, rectified = x.clamp(-1, 1), x.clamp(min=0)
    assert cut.tolist() == [[-1.0, 0.5, 1.0]]
    assert gradient(cut.sum(1), x).tolist() == [[1.0, 1.0, 1.0]]
    assert gradient(rectified.sum(1), x).tolist() == [[0.0, 1.0, 1.0]]
    with straight_through(None):
        assert gradient(x.clamp(-1, 1).sum(1), x).tolist() == [[0.0, 1.0, 0.0]]


def test_margins_lead_where_the_attacker_wants_them() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [0.0, 4.0, 1.0]])
    labels, target = torch.tensor([0, 0, 0]), torch.tensor([ANY, 1, ANY])
    assert margin(logits, labels, target).tolist() == [-1.0, -2.0, 4.0]


def test_what_is_left_across_a_direction_is_orthogonal_to_it() -> None:
    way, other = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    left = across(way, other)
    assert float((left * other).sum(1).abs().max()) < 1e-4
    torch.testing.assert_close(across(way, torch.zeros_like(way)), way)


def test_matching_brings_paths_nearer_to_those_of_clean_images(lab: Lab) -> None:
    def away(found: Attacked) -> Tensor:
        path, owned = lab.whitebox(found.pixels).path, lab.bank.path
        return torch.cdist(path, owned).amin(1)

    assert float(away(lab.found["matching"]).median()) < float(away(lab.found["bare"]).median())


def test_a_bank_holds_what_the_backbone_gets_right(lab: Lab, digits: Digits) -> None:
    predicted = lab.whitebox.model(digits.images[:200]).argmax(1)
    assert len(lab.bank.labels) == int((predicted == digits.labels[:200]).sum())
    assert torch.equal(lab.whitebox.model(lab.bank.pixels).argmax(1), lab.bank.labels)


def test_the_table_names_each_attack_once() -> None:
    assert set(ADAPTIVE) == set(NAMES) - {"bare"}
    assert all(attack.name == name for name, attack in ADAPTIVE.items())
    assert BARE.name == "bare"


@pytest.mark.parametrize("name", ["matching", "mimic"])
def test_who_imitates_needs_something_to_imitate(lab: Lab, name: str) -> None:
    attack = ATTACKS[name]
    with pytest.raises(DataError, match=f"'{name}' imitates clean images and has none"):
        attack.run(lab.whitebox, lab.pixels, lab.labels, eps=EPS, threshold=0.0, seed=0)


def test_mimicry_needs_activations(lab: Lab) -> None:
    def shut(pixels: Tensor) -> Glance:
        return dataclasses.replace(lab.whitebox(pixels), activations=())

    with pytest.raises(ConfigError, match="this white box shows none"):
        ATTACKS["mimic"].run(
            shut, lab.pixels, lab.labels, eps=EPS, threshold=0.0, bank=lab.bank, seed=0
        )


def test_a_bank_of_one_class_is_refused(lab: Lab) -> None:
    alike = lab.labels == lab.labels[0]
    with pytest.raises(DataError, match="fewer than two classes"):
        make_bank(lab.whitebox, lab.pixels[alike], lab.labels[alike])


def test_a_worst_case_of_nothing_or_of_other_images_is_refused(lab: Lab) -> None:
    fewer = lab.run(Bare(steps=1))
    fewer = Attacked(fewer.pixels[:3], fewer.fooled[:3], fewer.score[:3])
    for bad in ([], [lab.found["bare"], fewer]):
        with pytest.raises(DataError, match="worst case"):
            worst_case(bad)


@pytest.mark.parametrize("field", ["steps", "restarts", "batch"])
def test_an_attack_that_does_nothing_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} of the attack 'bare' is 0"):
        dataclasses.replace(Bare(), **{field: 0})


def test_a_size_in_steps_of_255_is_refused(lab: Lab) -> None:
    with pytest.raises(ConfigError, match="eps of the attack 'bare' is 8"):
        lab.run(ATTACKS["bare"], eps=8)


def test_images_without_labels_are_refused(lab: Lab) -> None:
    with pytest.raises(DataError, match="a label for each"):
        dataclasses.replace(lab, labels=lab.labels[:3]).run(ATTACKS["bare"])


def test_a_guard_opens_only_with_its_own_backbone_at_rest(lab: Lab, net: SmallNet) -> None:
    guard = lab.whitebox.guard
    with pytest.raises(ArtifactError, match="was fitted for the backbone"):
        open_guard(guard, seeded_net(3), GREY)
    with pytest.raises(ConfigError, match="temperature of hard gates is 0"):
        open_guard(guard, net, GREY, temperature=0)
    net.append = nn.Dropout(0.5).train()
    with pytest.raises(SiteError, match="training mode"):
        open_guard(guard, net, GREY)


def test_a_white_box_sees_through_witness_and_echoes() -> None:
    """What is asked online without gradients must carry them for an attacker who knows all."""
    inputs = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    extras = Extras(small_witness(), Echo((Perturbation("mirror"),)))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    for asked in (extras.ask_witness(inputs), extras.ask_echo(model, inputs)):
        assert asked is not None
        slope = torch.autograd.grad(asked.square().sum(), inputs, retain_graph=True)[0]
        assert bool((slope.flatten(1).abs().sum(1) > 0).all())
