"""Every check passes on an attack that is one, and fails on one that is broken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from defense.errors import DataError
from defense.offline.attacks import make_attack
from defense.offline.benchmark.sanity import (
    Check,
    claim_is_plausible,
    does_something,
    gradient_reaches,
    grows,
    knowing_wins,
    known_best,
    large_change_succeeds,
    restarts_never_worse,
    settles,
    white_box_wins,
)
from tests.conftest import Digits
from tests.served import SmallNet

Right = tuple[Tensor, Tensor]


@pytest.fixture
def right(digits: Digits, trained: SmallNet) -> Right:
    """Forty images that the network gets right, and their labels."""
    rows = (trained(digits.images).argmax(1) == digits.labels).nonzero().flatten()[:40]
    return digits.images[rows], digits.labels[rows]


def won(count: int, of: int = 100) -> Tensor:
    return torch.arange(of) < count


def falls(net: SmallNet, right: Right, eps: float) -> Tensor:
    images, labels = right
    attacked = make_attack("bim", eps=eps).run(net, images, labels, seed=0)
    turned: Tensor = net(attacked).argmax(1) != labels
    return turned


def test_a_real_attack_passes_what_an_attack_that_ignores_eps_fails(
    trained: SmallNet, right: Right
) -> None:
    sizes = (0.02, 0.1, 0.5)
    real = [falls(trained, right, eps) for eps in sizes]
    assert grows("eps", sizes, real).passed
    assert large_change_succeeds(real[-1]).passed
    deaf = [falls(trained, right, 0.02)] * 3
    assert not grows("eps", sizes, deaf).passed
    assert not large_change_succeeds(deaf[-1]).passed


def test_success_may_not_fall_with_size_but_may_begin_at_its_ceiling() -> None:
    assert not grows("steps", (1, 5, 20), [won(20), won(80), won(60)]).passed
    assert grows("steps", (1, 5), [won(100), won(100)]).passed
    assert grows("steps", (1, 5, 20), [won(20), won(80), won(79)]).passed
    assert "1: 20.0%, 5: 80.0%" in grows("steps", (1, 5), [won(20), won(80)]).says


def test_restarts_are_compared_image_by_image() -> None:
    assert restarts_never_worse(won(40), won(50)).passed
    assert not restarts_never_worse(won(40), ~won(50)).passed


def test_a_black_box_that_beats_the_white_box_fails() -> None:
    assert white_box_wins(won(90), won(60)).passed
    assert not white_box_wins(won(10), won(60)).passed


def test_adaptive_attacks_are_judged_together_by_their_worst_case() -> None:
    assert knowing_wins([won(30), ~won(70)], won(50)).passed
    assert not knowing_wins([won(30)], won(50)).passed


def test_an_attack_that_does_nothing_fails_and_so_does_one_that_only_makes_noise(
    trained: SmallNet, right: Right
) -> None:
    images, labels = right
    attacked = make_attack("fgsm", eps=0.3).run(trained, images, labels, seed=0)
    turned = trained(attacked).argmax(1) != labels
    assert does_something(images, attacked, turned, clean_errors=0.0).passed
    assert not does_something(images, images, turned, clean_errors=0.0).passed
    assert not does_something(images, attacked, won(4, 40), clean_errors=0.1).passed


def test_a_score_without_a_gradient_fails(trained: SmallNet, right: Right) -> None:
    images = right[0]

    def score(x: Tensor) -> Tensor:
        found: Tensor = trained(x).logsumexp(1)
        return found

    assert gradient_reaches(score, images).passed
    for masked in (
        lambda x: score(x).detach(),
        lambda x: score((x * 255).round() / 255),
        lambda x: score(x) * (x.flatten(1).sum(1) > x.sum() / len(x)),
        lambda x: score(x) / 0,
        lambda x: torch.zeros(len(x), requires_grad=True),
    ):
        assert not gradient_reaches(masked, images).passed
    assert not images.requires_grad


def test_a_loss_settles_where_it_rises_and_then_hardly() -> None:
    steps = torch.arange(20.0)
    assert settles(1 - torch.exp(-steps / 3)).passed
    assert settles((1 - torch.exp(-steps / 3))[:, None].expand(20, 4)).passed
    assert not settles(steps).passed
    assert not settles(torch.ones(20)).passed


def test_a_claim_of_detection_beyond_what_classifiers_reach_at_half_the_radius_fails() -> None:
    assert claim_is_plausible(0.70, 16 / 255).passed
    assert not claim_is_plausible(0.95, 16 / 255).passed
    found = claim_is_plausible(0.99, 8 / 255)
    assert not found.passed
    assert "99.0% is claimed at 8/255; the best known at 4/255 is about 86." in found.says


def test_the_best_known_falls_with_the_radius_and_is_published_at_the_ends() -> None:
    found = [known_best(radius / 255)[0] for radius in (-1, 0, 2, 4, 6, 8, 16)]
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (0.995, 0.74)
    assert known_best(4 / 255)[1] > known_best(8 / 255)[1]


def test_a_check_says_its_numbers() -> None:
    assert large_change_succeeds(won(97)) == Check(
        "a large change succeeds", False, "97.0% of 100 images are turned; expected at least 99%"
    )


def test_no_images_different_images_and_no_attacks_are_errors() -> None:
    with pytest.raises(DataError, match="no attacked images to check"):
        large_change_succeeds(won(0, 0))
    with pytest.raises(DataError, match=r"different numbers of images, \[100, 50\]"):
        white_box_wins(won(1), won(1, 50))
    with pytest.raises(DataError, match="no adaptive attacks to compare"):
        knowing_wins([], won(1))
    with pytest.raises(DataError, match="at least two sizes in rising order, not 2 rows for"):
        grows("eps", (2, 1), [won(1), won(2)])
