"""Measures of units: against closed forms and numpy, and as one table."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from defense.errors import DataError
from defense.offline import units
from defense.offline.attacks import make_attack
from defense.offline.units import (
    INFLUENTIAL,
    class_means,
    class_selectivity,
    consistency,
    influence,
    measure_units,
    mutual_information,
    prediction_difference,
    unit_table,
)
from defense.routers.class_gates import last_map
from defense.types import Routed
from tests.conftest import Digits
from tests.served import SmallNet, hook_count, images_like_noise

LABELS = torch.tensor([0, 0, 1, 2, 2])


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_a_one_hot_unit_is_selective_and_an_even_or_silent_one_is_not() -> None:
    own = nn.functional.one_hot(LABELS, 3).float()
    assert class_selectivity(own, LABELS, 3).tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    for even in (torch.full((5, 2), 0.7), torch.zeros(5, 2)):
        assert class_selectivity(even, LABELS, 3).tolist() == pytest.approx([0, 0], abs=1e-4)


def test_selectivity_compares_the_top_class_with_the_mean_of_the_others_that_are_there() -> None:
    pooled = drawn(0, 5, 4)
    found = class_selectivity(pooled, LABELS, 7)
    values, labels = pooled.double().numpy(), LABELS.numpy()
    for unit in range(4):
        means = np.sort([values[labels == c, unit].mean() for c in range(3)])
        rest = means[:-1].mean()
        assert found[unit].item() == pytest.approx(
            (means[-1] - rest) / (means[-1] + rest), abs=1e-4
        )


def test_absent_classes_have_no_mean() -> None:
    means, present = class_means(torch.ones(5, 2), LABELS, 4)
    assert present.tolist() == [True, True, True, False]
    assert means.tolist() == [[1, 1]] * 3 + [[0, 0]]


def test_a_unit_that_knows_its_class_tells_the_entropy_and_noise_tells_nothing() -> None:
    labels = torch.arange(300) % 3
    noise = drawn(0, 300, 1)
    sure = (labels == 1).float()[:, None] + 0.01 * noise
    entropy = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
    assert mutual_information(sure, labels, seed=0)[0] == pytest.approx(entropy, abs=0.05)
    assert mutual_information(noise, labels, seed=0)[0] < 0.05
    both = mutual_information(torch.cat([sure, noise], 1), labels, seed=0)[0]
    assert both == pytest.approx(entropy / 2, abs=0.05)


def test_a_unit_that_knows_all_classes_shares_out_what_it_tells() -> None:
    labels = torch.arange(300) % 3
    every = labels.float()[:, None] + 0.01 * drawn(0, 300, 1)
    one = (labels == 1).float()[:, None] + 0.01 * drawn(1, 300, 1)
    assert mutual_information(every, labels, seed=0)[1] == pytest.approx(1 / 3, abs=0.05)
    assert mutual_information(one, labels, seed=0)[1] > 0.4


def test_many_images_and_units_are_sampled_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "INFORMATION_IMAGES", 50)
    monkeypatch.setattr(units, "INFORMATION_UNITS", 3)
    labels, pooled = torch.arange(90) % 3, drawn(0, 90, 6)
    assert mutual_information(pooled, labels, seed=1) == mutual_information(pooled, labels, seed=1)
    assert mutual_information(pooled, labels, seed=1) != mutual_information(pooled, labels, seed=2)


def as_run(path: list[list[float]], answers: list[int]) -> Routed:
    return Routed(nn.functional.one_hot(torch.tensor(answers), 3).float(), torch.tensor(path))


def test_consistency_compares_turned_images_with_both_classes() -> None:
    clean = as_run([[1, 0], [3, 0], [0, 2], [0, 2], [5, 5]], [0, 0, 1, 1, 1])
    labels = torch.tensor([0, 0, 1, 1, 0])
    # Class 0 is centred on (3, 5/3), class 1 on (0, 2).
    attacked = as_run([[0, 1], [3, 0], [0, 2], [0, 2], [5, 5]], [1, 0, 2, 1, 1])
    found = consistency(clean, attacked, labels)
    assert found is not None
    assert (
        found.images == 1
    )  # of the others none was right, turned, and answered with a known class
    assert found.true == pytest.approx((5 / 3) / math.hypot(3, 5 / 3))
    assert found.target == pytest.approx(1)
    assert found.ratio == pytest.approx(math.hypot(3, 2 / 3))
    assert consistency(clean, clean, labels) is None


@pytest.fixture
def linear() -> nn.Sequential:
    """A network whose logits are linear in the pooled channels."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 9, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(9, 4)).eval()


def shares(linear: nn.Sequential, x: Tensor) -> Tensor:
    """Return what every channel adds to the answered class's logit, (N, 9)."""
    head = linear[4]
    assert isinstance(head, nn.Linear)
    pooled: Tensor = linear[:4](x)
    return pooled * head.weight[linear(x).argmax(1)]


def test_a_prediction_difference_is_what_the_channel_adds_to_the_logit(
    linear: nn.Sequential,
) -> None:
    x, channels = images_like_noise(6, 3), torch.tensor([0, 1, 2, 3, 4, 8])
    found = prediction_difference(linear, last_map(linear, x), x, channels)
    expected = shares(linear, x).gather(1, channels[:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_influence_is_that_of_every_images_own_top_channels(linear: nn.Sequential) -> None:
    x = images_like_noise(6, 3)
    with torch.inference_mode():
        found = influence(linear, last_map(linear, x), x)
    expected = shares(linear, x).topk(INFLUENTIAL, dim=1).values.mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert all(value.grad is None for value in linear.parameters())


def test_a_report_holds_every_layer_and_comes_out_the_same_again(
    trained: SmallNet, digits: Digits
) -> None:
    images, labels = digits.images[400:700], digits.labels[400:700]
    attacked = make_attack("fgsm", eps=0.3).run(trained, images, labels, seed=0)
    report = measure_units("small", trained, images, labels, attacked=attacked)
    assert report == measure_units("small", trained, images, labels, attacked=attacked)
    assert hook_count(trained) == 0
    layers = {layer.site: len(layer.selectivity) for layer in report.layers}
    assert layers == {"act#0": 12, "block.relu#0": 12, "block#0": 12}
    assert all(0 <= layer.mean <= 1 for layer in report.layers)
    assert report.last == "block#0"
    assert report.last_selectivity == report.layers[-1].mean
    assert report.accuracy == (trained(images).argmax(1) == labels).float().mean().item()
    assert 0 < report.information < math.log(2)
    assert 0.1 < report.information_share < 1
    assert report.influence[0] > report.influence[-1]
    assert report.consistency is not None
    assert report.consistency.target > report.consistency.true
    described = json.loads(json.dumps(report.as_dict()))
    assert described["selectivity"] == report.selectivity
    assert described["consistency"]["ratio"] == report.consistency.ratio


def test_the_table_has_a_row_per_network_and_a_dash_for_what_was_not_measured(
    trained: SmallNet, digits: Digits
) -> None:
    images, labels = digits.images[400:460], digits.labels[400:460]
    report = measure_units("small", trained, images, labels)
    lines = unit_table([report, report]).splitlines()
    assert [line.count("|") for line in lines] == [12] * 4
    assert lines[0].startswith("| network | accuracy |")
    assert lines[2].startswith(f"| small | {report.accuracy:.3f} | {report.selectivity:.3f} |")
    assert lines[2].count("| - ") == 3


def test_rows_that_do_not_match_are_refused(trained: SmallNet, digits: Digits) -> None:
    images, labels = digits.images[:20], digits.labels[:20]
    with pytest.raises(DataError, match=r"20 images came with labels of shape \(19,\); give one"):
        measure_units("small", trained, images, labels[:19])
    with pytest.raises(DataError, match=r"attacked images have shape \(19, 1, 8, 8\), clean"):
        measure_units("small", trained, images, labels, attacked=images[:19])


def test_labels_that_nothing_can_be_compared_by_are_refused(
    trained: SmallNet, digits: Digits
) -> None:
    images, labels = digits.images[:20], digits.labels[:20]
    with pytest.raises(DataError, match=r"labels run from 1 to 10 and the network knows .* 0 to 9"):
        measure_units("small", trained, images, labels + 1)
    with pytest.raises(DataError, match="all images are of one class; units are compared"):
        measure_units("small", trained, images, torch.zeros_like(labels))
