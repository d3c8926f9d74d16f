"""Class gates: projected, learnt or taken from the network, and what they make of a path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from defense.errors import ConfigError, SiteError
from defense.offline.collect import route
from defense.offline.fit import fit_router
from defense.offline.networks import Architecture, ClassGatedResNet
from defense.routers.class_gates import (
    ClassGatesRecipe,
    ClassGatesRouter,
    excess,
    last_map,
    project,
)
from defense.routers.gating import gated
from defense.types import PathLayout, Site
from tests.conftest import Digits
from tests.served import SmallNet, hook_count, images_like_noise, seeded_net

SITE = Site("block", 0, 12, 1)


def fitted(model: nn.Module, inputs: Tensor, recipe: ClassGatesRecipe | None = None) -> Tensor:
    """Return the gates of a router fitted to a model."""
    router = fit_router(model, recipe or ClassGatesRecipe(), inputs)
    assert isinstance(router, ClassGatesRouter)
    return router.gates


@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(-3, 3))
def test_a_projected_rows_largest_gate_is_one_and_all_lie_in_range(
    seed: int, classes: int, shift: float
) -> None:
    gates = torch.randn(5, classes, generator=torch.Generator().manual_seed(seed)) + shift
    projected = project(gates)
    assert torch.equal(projected.amax(1), torch.ones(5))
    assert 0 <= float(projected.min()) <= float(projected.max()) <= 1
    assert torch.equal(project(projected), projected)
    assert torch.equal(projected.argmax(1), gates.argmax(1))


def test_rows_are_divided_by_their_maximum_and_clamped() -> None:
    gates = torch.tensor([[0.5, 0.25, -1.0], [-2.0, -1.0, -3.0], [0.0, 0.0, 0.0]])
    expected = [[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    assert project(gates).tolist() == expected


def test_density_costs_nothing_up_to_a_fifth_and_grows_by_the_sum_above() -> None:
    assert float(excess(torch.full((4, 5), 0.2))) == pytest.approx(0, abs=1e-5)
    assert float(excess(torch.full((4, 5), 0.1))) == 0
    assert float(excess(torch.full((4, 5), 0.5))) == pytest.approx(0.3 * 20)
    assert float(excess(torch.ones(4, 5), density=0.6)) == pytest.approx(0.4 * 20)


def test_the_path_is_the_pooled_map_times_the_gates_of_the_answer(
    trained: SmallNet, digits: Digits
) -> None:
    gates = torch.rand(12, 10, generator=torch.Generator().manual_seed(0))
    router = ClassGatesRouter(PathLayout((SITE,), ("gated_mean",)), gates)
    run = route(trained, router, digits.images[:20])
    features = trained.block(trained.act(trained.stem(digits.images[:20])))
    for row, answer, found in zip(features, run.predicted, run.path, strict=True):
        torch.testing.assert_close(found, row.mean((1, 2)) * gates[:, answer])


def test_learnt_gates_keep_the_answers_that_those_of_other_classes_change(
    trained: SmallNet, digits: Digits
) -> None:
    gates, rest = fitted(trained, digits.images[:400]), digits.images[400:]
    answers = trained(rest).argmax(1)

    def kept(columns: Tensor) -> float:
        with gated(trained, (SITE,), (gates.T[columns],)):
            return float((trained(rest).argmax(1) == answers).float().mean())

    assert kept(answers) > 0.95
    assert kept((answers + 1) % 10) < 0.8
    costly = fitted(trained, digits.images[:400], ClassGatesRecipe(density_weight=0.1))
    assert costly.mean() < gates.mean() - 0.1
    assert torch.equal(gates.amax(1), torch.ones(12))
    assert gates.min() >= 0


def test_gates_of_classes_that_no_input_is_answered_with_stay_open(
    trained: SmallNet, digits: Digits
) -> None:
    inputs = digits.images[:300]
    answers = trained(inputs).argmax(1)
    gates = fitted(trained, inputs[(answers == 3) | (answers == 7)])
    absent = [0, 1, 2, 4, 5, 6, 8, 9]
    assert torch.equal(gates[:, absent], torch.ones(12, 8))
    assert torch.equal(gates[:, [3, 7]].amax(1), torch.ones(12))
    assert gates[:, [3, 7]].min() < 0.5


def test_the_same_seed_learns_the_same_gates_whatever_the_global_one(
    trained: SmallNet, digits: Digits
) -> None:
    first = fitted(trained, digits.images[:40])
    torch.manual_seed(99)
    assert torch.equal(fitted(trained, digits.images[:40]), first)
    assert hook_count(trained) == 0


def test_gates_are_learnt_in_inference_mode_too_and_told_of(trained: SmallNet) -> None:
    told: list[float] = []
    with torch.inference_mode():
        inputs = images_like_noise(10, 0) * 1
        fit_router(trained, ClassGatesRecipe(steps=4), inputs, progress=told.append)
    assert told == [0.25, 0.5, 0.75, 1.0, 1.0]


class Wrapped(nn.Module):
    """A network in an archive's own class."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def test_a_network_that_was_trained_with_gates_brings_them() -> None:
    torch.manual_seed(0)
    network = ClassGatedResNet(Architecture((1,), (6,), stem=4, classes=3)).eval()
    with torch.no_grad():
        network.class_gates.uniform_(0, 0.5)
    inputs = torch.rand(4, 3, 8, 8)
    for model in (network, Wrapped(network)):
        router = fit_router(model, ClassGatesRecipe(), inputs)
        assert isinstance(router, ClassGatesRouter)
        assert torch.equal(router.gates, project(network.class_gates.detach()))
        assert router.layout.sites[0].name.endswith("stages.0.0#0")


def test_gates_of_another_shape_are_not_the_sites(trained: SmallNet, digits: Digits) -> None:
    model = Wrapped(trained)
    model.register_buffer("class_gates", torch.zeros(12, 9))
    expected = fitted(trained, digits.images[:40])
    assert torch.equal(fitted(model, digits.images[:40]), expected)


def test_the_last_map_is_observed_and_not_the_hidden_vector_behind_it() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 5, 3),
        nn.ReLU(),
        nn.Conv2d(5, 7, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(112, 9),
        nn.ReLU(),
        nn.Linear(9, 4),
    ).eval()
    batch = images_like_noise(2, 0)
    assert last_map(model, batch) == Site("3", 0, 7, 1)
    assert last_map(model, batch, names=["1"]) == Site("1", 0, 5, 1)
    assert last_map(model, batch, names=["6"]) == Site("6", 0, 9, -1)
    assert fitted(model, images_like_noise(40, 0)).shape == (7, 4)


def test_gates_that_do_not_fit_the_sites_are_refused() -> None:
    layout = PathLayout((SITE,), ("gated_mean",))
    with pytest.raises(ConfigError, match=r"gates of shape \(11, 10\) do not fit .* \(12,\) chan"):
        ClassGatesRouter(layout, torch.ones(11, 10))
    with pytest.raises(ConfigError, match="need one site and a row for each of its channels"):
        ClassGatesRouter(PathLayout((SITE, SITE), ("gated_mean",)), torch.ones(12, 10))


def test_a_backbone_of_other_classes_is_refused() -> None:
    router = ClassGatesRouter(PathLayout((SITE,), ("gated_mean",)), torch.ones(12, 9))
    message = "gates for 9 classes and the backbone answers 10; fit a router to this backbone"
    with pytest.raises(ConfigError, match=message):
        router.finish(torch.zeros(2, 12), torch.zeros(2, 10))


def test_a_model_that_does_not_answer_with_logits_is_refused() -> None:
    net = seeded_net()
    model = nn.Sequential(net.stem, net.act)
    with pytest.raises(SiteError, match="Sequential does not answer with logits"):
        fitted(model, images_like_noise(4, 0))
