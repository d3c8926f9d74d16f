"""The assigning loss: selectivity of units for their classes, and training that raises it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from defense.errors import SiteError
from defense.offline.methods.selective import SelectiveObjective, assigned_selectivity
from defense.offline.networks import CifarResNet
from defense.offline.training import CrossEntropy, train
from tests.coloured import (
    SETTINGS,
    TINY,
    coloured_images,
    interrupt_at,
    same_tensors,
    silent,
    tiny_network,
)

LABELS = torch.tensor([0, 0, 1, 2, 2])


def test_a_unit_that_answers_its_class_alone_scores_one_and_an_even_one_nothing() -> None:
    own = torch.nn.functional.one_hot(LABELS, 3).float()
    assert assigned_selectivity(own, LABELS, 3).tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    even = assigned_selectivity(torch.full((5, 3), 0.7), LABELS, 3)
    assert even.tolist() == pytest.approx([0, 0, 0], abs=1e-4)
    others = assigned_selectivity(1 - own, LABELS, 3)
    assert others.tolist() == pytest.approx([-1, -1, -1], abs=1e-4)


def test_units_are_shared_out_over_classes_as_the_formula_says() -> None:
    pooled = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    found = assigned_selectivity(pooled, LABELS, 3)
    values, labels = pooled.double().numpy(), LABELS.numpy()
    for unit in range(8):
        means = np.array([values[labels == c, unit].mean() for c in range(3)])
        assigned = unit * 3 // 8
        rest = np.delete(means, assigned).mean()
        expected = (means[assigned] - rest) / (means[assigned] + rest)
        assert found[unit].item() == pytest.approx(expected, abs=1e-4)


def test_classes_that_the_batch_lacks_count_for_nothing() -> None:
    pooled = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    found = assigned_selectivity(pooled, LABELS, 4)
    torch.testing.assert_close(found[:3], assigned_selectivity(pooled[:, :3], LABELS, 3))
    assert found[3] == 0
    alone = assigned_selectivity(pooled, torch.zeros(5, dtype=torch.long), 4)
    assert torch.equal(alone, torch.zeros(4))


def test_silent_units_score_nothing_and_their_gradient_is_finite() -> None:
    pooled = torch.zeros(5, 3, requires_grad=True)
    found = assigned_selectivity(pooled, LABELS, 3)
    (gradient,) = torch.autograd.grad(found.sum(), pooled)
    assert torch.equal(found, torch.zeros(3))
    assert bool(gradient.isfinite().all())


def test_the_loss_is_cross_entropy_less_the_weighted_selectivity_of_all_modules() -> None:
    network, x = tiny_network().eval(), torch.rand(5, 3, 8, 8)
    plain = CrossEntropy().loss(network, x, LABELS, 0)
    assert torch.equal(SelectiveObjective(weight=0.0).loss(network, x, LABELS, 0), plain)
    seen: list[Tensor] = []
    for module in (network.stem, network.stages):
        module.register_forward_hook(lambda _m, _a, out: seen.append(out.float().mean((2, 3))))
    both = SelectiveObjective(modules=("stem", "stages")).loss(network, x, LABELS, 0)
    parts = [assigned_selectivity(pooled, LABELS, 3).mean() for pooled in seen]
    torch.testing.assert_close(both, plain - 0.1 * sum(parts))


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(
        SiteError, match="no module 'stage' in this backbone; did you mean 'stages'"
    ):
        SelectiveObjective(modules=("stage",)).loss(
            tiny_network(), torch.rand(5, 3, 8, 8), LABELS, 0
        )


def test_training_makes_units_selective_for_their_classes(tmp_path: Path) -> None:
    images = coloured_images(96)
    settings = replace(SETTINGS, epochs=3, average_decay=0.5, small_epochs=0, learning_rate=0.1)

    def trained(weight: float) -> float:
        network = tiny_network()
        train(
            network,
            images,
            settings,
            checkpoint=tmp_path / str(weight),
            objective=SelectiveObjective(weight=weight),
            console=silent(),
        )
        features = network.stages(network.stem(images.normalisation(images.pixels)))
        pooled = features.abs().mean((2, 3))
        return assigned_selectivity(pooled, images.labels, 3).mean().item()

    assert trained(0.1) > trained(0.0) + 0.05


@pytest.mark.parametrize("call", [2, 8])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    tmp_path: Path, call: int
) -> None:
    images, objective = coloured_images(), SelectiveObjective()
    whole, resumed = tiny_network(), tiny_network()
    first = {"objective": objective, "console": silent(), "checkpoint": tmp_path / "a"}
    second = first | {"checkpoint": tmp_path / "b"}
    train(whole, images, SETTINGS, **first)  # type: ignore[arg-type]
    undo = interrupt_at(resumed, call)
    with pytest.raises(KeyboardInterrupt):
        train(resumed, images, SETTINGS, **second)  # type: ignore[arg-type]
    undo()
    restarted = CifarResNet(TINY) if (tmp_path / "b").exists() else tiny_network()
    train(restarted, images, SETTINGS, **second)  # type: ignore[arg-type]
    assert same_tensors(whole, restarted)
