"""Gates learnt for one image at a time, against the optimiser's own arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from torch import Tensor, nn
from torch.optim import SGD

from defense.errors import ConfigError
from defense.routers.distillation import DistillationRecipe, Distilled, distil
from defense.routers.gating import gated
from defense.sites import discover_sites
from defense.types import Site
from tests.served import SmallNet, images_like_noise, seeded_net

IMAGES = images_like_noise(16, 4)
VECTORS = torch.rand(5, 4, generator=torch.Generator().manual_seed(2))
RECIPE = DistillationRecipe()
FORGOTTEN = 1


def net_that_forgets_a_channel() -> nn.Sequential:
    """Return a network whose channel `FORGOTTEN` tells nothing and whose answer is always 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, last = nn.Linear(4, 3), nn.Linear(3, 2)
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.weight[:, FORGOTTEN] = 0
        last.bias.copy_(torch.tensor([4.0, 0.0]))
    return nn.Sequential(first, nn.ReLU(), last).eval()


def varied_net() -> SmallNet:
    """Return a network whose answers differ: it cannot do without its channels."""
    net = seeded_net()
    with torch.no_grad():
        net.head.bias.sub_(net(IMAGES).mean(0))
        net.head.weight.mul_(50)
        net.head.bias.mul_(50)
    return net


def distilled(
    net: nn.Module, images: Tensor = IMAGES, recipe: DistillationRecipe = RECIPE
) -> Distilled:
    return distil(net, discover_sites(net, images), images, recipe)


def answer(net: nn.Module, sites: tuple[Site, ...], gates: Tensor, images: Tensor) -> Tensor:
    with torch.no_grad(), gated(net, sites, gates.split([s.channels for s in sites], dim=1)):
        out: Tensor = net(images)
    return out


@pytest.mark.parametrize(
    ("steps", "value"), [(0, 1), (26, 0.1209), (27, 0.0738), (28, 0.0264), (29, 0)]
)
def test_a_gate_that_nothing_depends_on_falls_as_momentum_has_it(steps: int, value: float) -> None:
    recipe = DistillationRecipe(iterations=steps + 1)
    found = distilled(net_that_forgets_a_channel(), VECTORS, recipe)
    assert found.iteration.tolist() == [steps] * 5
    np.testing.assert_allclose(found.gates[:, FORGOTTEN], value, atol=5e-5)
    assert (found.gates[:, FORGOTTEN] == 0).all() == (steps >= 29)


def test_gates_of_one_change_no_answer() -> None:
    net = varied_net()
    sites = discover_sites(net, IMAGES)
    found = distilled(net, recipe=DistillationRecipe(iterations=1))
    assert (found.gates == 1).all()
    assert (found.iteration == 0).all()
    torch.testing.assert_close(
        answer(net, sites, found.gates, IMAGES), net(IMAGES), rtol=0, atol=1e-5
    )


def test_the_predicted_class_is_kept_though_gates_are_closed() -> None:
    net = varied_net()
    found = distilled(net)
    logits = answer(net, discover_sites(net, IMAGES), found.gates, IMAGES)
    assert torch.equal(logits.argmax(1), net(IMAGES).argmax(1))
    assert (found.gates[found.iteration == 29] == 0).any(dim=1).all()


def test_where_the_last_gates_lose_the_class_earlier_ones_are_chosen() -> None:
    iteration = distilled(varied_net()).iteration
    assert (iteration < 29).any()
    assert (iteration == 29).any()


def test_the_record_is_that_of_the_chosen_gates() -> None:
    net = varied_net()
    found = distilled(net)
    logits = answer(net, discover_sites(net, IMAGES), found.gates, IMAGES)
    expected = nn.functional.cross_entropy(logits, net(IMAGES).softmax(1), reduction="none")
    torch.testing.assert_close(found.cross_entropy, expected)
    torch.testing.assert_close(found.total, found.gates.abs().sum(1))
    torch.testing.assert_close(found.loss, expected + 0.05 * found.total)


def test_no_gates_on_the_way_that_keep_the_class_have_a_lower_loss() -> None:
    net = varied_net()
    shorter = [distilled(net, recipe=DistillationRecipe(iterations=n)).loss for n in (1, 10, 20)]
    losses = torch.stack([*shorter, distilled(net).loss])
    assert (losses.diff(dim=0) <= 0).all()
    assert (losses[-1] < losses[0]).all()


def test_gates_of_a_batch_are_those_of_each_image_alone() -> None:
    net = varied_net()
    alone = torch.cat([distilled(net, image).gates for image in IMAGES.split(1)])
    torch.testing.assert_close(distilled(net).gates, alone, rtol=0, atol=1e-5)


def test_gates_before_and_after_a_rectifier_answer_alike() -> None:
    net = seeded_net()
    gates = torch.rand(len(IMAGES), 12, generator=torch.Generator().manual_seed(0)) * 3
    before = answer(net, (Site("stem", 0, 12, 1),), gates, IMAGES)
    after = answer(net, (Site("act", 0, 12, 1),), gates, IMAGES)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-5)


def test_only_behind_a_rectifier_can_a_closed_gate_open_again() -> None:
    net = seeded_net()
    slopes: list[Tensor] = []
    for name in ("stem", "act"):
        gates = torch.zeros(len(IMAGES), 12, requires_grad=True)
        with gated(net, (Site(name, 0, 12, 1),), [gates]):
            slopes += torch.autograd.grad(net(IMAGES)[:, 0].sum(), gates)
    before, behind = slopes
    assert (before == 0).all()
    assert (behind != 0).any()


def forest_auc(first: Tensor, second: Tensor) -> float:
    """Return the cross-validated AUC of a forest that tells two passes of the same images apart."""
    paths = torch.cat([first, second]).numpy()
    passes = np.repeat([0, 1], len(first))
    image = np.tile(np.arange(len(first)), 2)
    forest = RandomForestClassifier(20, random_state=0)
    scores: np.ndarray[Any, Any] = cross_val_predict(
        forest, paths, passes, groups=image, cv=GroupKFold(4), method="predict_proba"
    )
    return float(roc_auc_score(passes, scores[:, 1]))


def test_the_same_images_looked_at_twice_cannot_be_told_apart() -> None:
    net = varied_net()
    first, second = distilled(net).gates, distilled(net).gates
    assert torch.equal(first, second)
    assert forest_auc(first, second) == 0.5


def test_momentum_shared_between_passes_would_tell_them_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    previous: list[SGD] = []

    def shared(gates: list[Tensor], lr: float, momentum: float) -> SGD:
        optimiser = SGD(gates, lr=lr, momentum=momentum)
        for old in previous:
            optimiser.state[gates[0]] = next(iter(old.state.values()))
        previous.append(optimiser)
        return optimiser

    monkeypatch.setattr("defense.routers.distillation.SGD", shared)
    net = varied_net()
    first, second = distilled(net).gates, distilled(net).gates
    assert forest_auc(first, second) > 0.9


def test_the_order_of_images_and_of_passes_changes_nothing() -> None:
    net = varied_net()
    attacked = (IMAGES + 0.1 * images_like_noise(len(IMAGES), 5).sub(0.5).sign()).clamp(0, 1)
    order = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(1))
    clean_first = distilled(net).gates, distilled(net, attacked).gates
    attacked_first = distilled(net, attacked[order]).gates, distilled(net, IMAGES[order]).gates
    torch.testing.assert_close(attacked_first[1], clean_first[0][order], rtol=0, atol=1e-5)
    torch.testing.assert_close(attacked_first[0], clean_first[1][order], rtol=0, atol=1e-5)


def test_gates_stay_below_the_ceiling() -> None:
    held = distilled(varied_net(), recipe=DistillationRecipe(ceiling=1.1)).gates
    assert distilled(varied_net()).gates.max() > 1.2
    assert held.max() == torch.tensor(1.1)


def test_patience_gives_each_image_up_by_itself() -> None:
    net, hurried = varied_net(), DistillationRecipe(patience=1)
    found = distilled(net, recipe=hurried)
    alone = torch.cat([distilled(net, image, hurried).iteration for image in IMAGES.split(1)])
    assert torch.equal(found.iteration, alone)
    assert (found.iteration <= distilled(net).iteration).all()
    assert not torch.equal(found.iteration, distilled(net).iteration)


def test_patience_as_long_as_the_search_changes_nothing() -> None:
    net = varied_net()
    found = distilled(net, recipe=DistillationRecipe(patience=30))
    assert torch.equal(found.gates, distilled(net).gates)


def test_the_search_ends_when_no_image_is_searched_any_more() -> None:
    net, passes = net_that_forgets_a_channel(), 0

    def count(_module: nn.Module, _args: object) -> None:
        nonlocal passes
        passes += 1

    net.register_forward_pre_hook(count)
    still = DistillationRecipe(gamma=0, patience=2, learning_rate=1e-9)
    distil(net, (Site("1", 0, 3, -1),), VECTORS, still)
    assert passes <= 6


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"iterations": 0}, "iterations .* must be at least 1, got 0; its default is 30"),
        ({"learning_rate": 0.0}, "learning_rate .* must be above 0, got 0.0; its default is 0.1"),
        ({"momentum": 1.0}, "momentum .* must be at least 0 and below 1, got 1.0"),
        ({"gamma": -0.1}, "gamma .* must be at least 0, got -0.1; its default is 0.05"),
        ({"gamma": float("nan")}, "gamma .* must be at least 0, got nan"),
        ({"ceiling": 0.5}, "ceiling .* must be at least 1, where gates start, got 0.5"),
        ({"patience": -1}, "patience .* must be at least 0, got -1; its default is 0"),
    ],
)
def test_numbers_that_no_search_can_follow_are_refused(
    wrong: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        DistillationRecipe(**wrong)
