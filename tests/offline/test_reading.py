"""What is read from paths, against loops over images, and on a network that reads digits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from defense.errors import DataError
from defense.offline.attacks import make_attack
from defense.offline.reading import (
    EXAMPLES,
    UNITS,
    Reading,
    class_means,
    follow,
    read_paths,
    separability,
    similarity,
    sparsity,
    top_units,
)
from defense.routers.activation import ActivationRecipe, ActivationRouter
from defense.types import PathLayout, Routed, Site
from tests.conftest import TRAINED_ON, Digits
from tests.served import SmallNet, hook_count
from tests.synthetic import CLASSES, LAYOUT, clean_runs

NAMES = [str(digit) for digit in range(10)]


def cosine(x: Tensor, y: Tensor) -> float:
    return float((x @ y) / (x.norm() * y.norm()))


def naive_means(path: Tensor, labels: Tensor) -> list[Tensor]:
    return [path[labels == c].double().mean(0) for c in range(CLASSES)]


def quartiles(values: list[float]) -> list[float]:
    return [float(torch.tensor(values).double().quantile(q)) for q in (0.25, 0.5, 0.75)]


def activation(model: SmallNet, inputs: Tensor) -> ActivationRouter:
    recipe = ActivationRecipe()
    sites = recipe.sites(model, inputs[:2], None)
    return recipe.fit(model, sites, inputs, seed=0, progress=lambda share: None)


def same(first: object, second: object) -> bool:
    """Compare values whose fields may be tensors."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        fields = dataclasses.fields(first)
        return all(same(getattr(first, f.name), getattr(second, f.name)) for f in fields)
    return first == second


def test_similarity_is_the_cosine_of_class_means_around_their_mean() -> None:
    runs, labels = clean_runs(80, seed=1)
    found = similarity(runs.path, labels, LAYOUT)
    means = naive_means(runs.path, labels)
    centre = sum(means) / CLASSES
    assert found.shape == (3, CLASSES, CLASSES)
    for site, columns in enumerate(LAYOUT.columns):
        for a in range(CLASSES):
            for b in range(CLASSES):
                expected = cosine((means[a] - centre)[columns], (means[b] - centre)[columns])
                assert float(found[site, a, b]) == pytest.approx(expected)


def test_a_site_that_never_varies_is_like_nothing() -> None:
    runs, labels = clean_runs(40, seed=1)
    path = runs.path.clone()
    path[:, LAYOUT.columns[1]] = 0.1
    assert float(similarity(path, labels, LAYOUT)[1].abs().max()) < 1e-3


def attacked_runs() -> tuple[Routed, Tensor, Routed, Tensor]:
    """Return clean runs and labels, and attacked runs of five of them, one of which kept its answer."""
    clean, labels = clean_runs(60, seed=2)
    rows = torch.tensor([3, 7, 20, 41, 55])
    wrong = (labels[rows] + 1) % CLASSES
    wrong[2] = labels[rows][2]
    logits = torch.nn.functional.one_hot(wrong, CLASSES).float()
    noise = torch.randn(5, LAYOUT.length, generator=torch.Generator().manual_seed(9))
    return clean, labels, Routed(logits, clean.path[rows] + noise), rows


def test_the_course_is_what_loops_over_pairs_find() -> None:
    clean, labels, attacked, rows = attacked_runs()
    found = follow(clean, attacked, labels, rows, LAYOUT)
    assert found is not None
    assert found.pairs == 4
    means = naive_means(clean.path, labels)
    centre = sum(means) / CLASSES
    for site, columns in enumerate(LAYOUT.columns):
        curves: dict[str, list[float]] = {
            name: [] for name in ("to_clean", "to_target", "before", "control")
        }
        for i in (0, 1, 3, 4):
            row, wrong = int(rows[i]), int(attacked.predicted[i])
            others = labels == labels[row]
            others[row] = False
            own = (clean.path[others].double().mean(0) - centre)[columns]
            target = (means[wrong] - centre)[columns]
            before = (clean.path[row] - centre)[columns]
            after = (attacked.path[i] - centre)[columns]
            curves["to_clean"].append(cosine(after, before))
            curves["to_target"].append(cosine(after, target))
            curves["before"].append(cosine(before, target))
            curves["control"].append(cosine(before, own))
        for name, values in curves.items():
            assert getattr(found, name)[:, site].tolist() == pytest.approx(quartiles(values)), name


def test_an_attacked_image_on_the_mean_path_of_its_target_is_one_with_it() -> None:
    clean, labels, attacked, rows = attacked_runs()
    mean = class_means(clean.path, labels)[attacked.predicted]
    found = follow(clean, Routed(attacked.logits, mean), labels, rows, LAYOUT)
    assert found is not None
    torch.testing.assert_close(found.to_target, torch.ones_like(found.to_target))
    assert found.crossing == 0


def test_an_attacked_image_that_keeps_its_path_is_one_with_itself() -> None:
    clean, labels, attacked, rows = attacked_runs()
    found = follow(clean, Routed(attacked.logits, clean.path[rows]), labels, rows, LAYOUT)
    assert found is not None
    torch.testing.assert_close(found.to_clean, torch.ones_like(found.to_clean))
    assert torch.equal(found.to_target, found.before)
    assert found.crossing is None


def test_curves_cross_where_the_target_stays_ahead() -> None:
    clean, labels, attacked, rows = attacked_runs()
    path, mean = clean.path[rows].double(), class_means(clean.path, labels)[attacked.predicted]
    last = LAYOUT.columns[2]
    path[:, last] = mean[:, last]
    path[:, LAYOUT.columns[0]] = mean[:, LAYOUT.columns[0]]
    found = follow(clean, Routed(attacked.logits, path), labels, rows, LAYOUT)
    assert found is not None
    assert found.crossing == 2


def test_attacks_that_changed_no_answer_have_no_course() -> None:
    clean, _labels, _attacked, rows = attacked_runs()
    assert follow(clean, clean.take(rows), clean.predicted, rows, LAYOUT) is None


def test_sparsity_counts_columns_by_hand() -> None:
    layout = PathLayout((Site("a", 0, 4, 1), Site("b", 0, 2, 1), Site("dead", 0, 3, 1)), ("mean",))
    path = torch.tensor([[2.0, -2, 2, 0, 1, 1, 0, 0, 0]] * 5)
    found = sparsity(path, layout)
    assert found.near_zero.tolist() == [[0.25, 0.0, 1.0]] * 3
    assert found.effective.tolist() == [[3.0, 2.0, 0.0]] * 3


def test_sparsity_is_what_loops_over_images_find() -> None:
    path = clean_runs(30, seed=3)[0].path.relu()
    found = sparsity(path, LAYOUT)
    for site, columns in enumerate(LAYOUT.columns):
        part = path[:, columns].double()
        least = 0.01 * math.sqrt(float((part**2).mean()))
        zero = [sum(float(v) <= least for v in row) / len(row) for row in part]
        ratio = [float(row.sum()) ** 2 / float((row**2).sum()) if row.any() else 0 for row in part]
        assert found.near_zero[:, site].tolist() == pytest.approx(quartiles(zero))
        assert found.effective[:, site].tolist() == pytest.approx(quartiles(ratio))


def naive_separability(path: Tensor, labels: Tensor) -> float:
    """Classify every image by the nearest class mean of the others, class by class."""
    x = path.double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    hits = []
    for i in range(len(x)):
        rest = torch.arange(len(x)) != i
        classes = labels[rest].unique()
        distances = [(x[i] - x[rest & (labels == c)].mean(0)).norm() for c in classes]
        if labels[i] in classes:
            hits.append(classes[int(torch.stack(distances).argmin())] == labels[i])
    return sum(map(bool, hits)) / len(hits)


@pytest.mark.parametrize("seed", [4, 5])
def test_separability_is_leave_one_out_in_closed_form(seed: int) -> None:
    runs, labels = clean_runs(50, seed=seed)
    path = runs.path + 4 * torch.randn(
        runs.path.shape, generator=torch.Generator().manual_seed(seed)
    )
    found = separability(path, labels, LAYOUT)
    expected = tuple(naive_separability(path[:, c], labels) for c in LAYOUT.columns)
    assert found == pytest.approx(expected)
    assert min(found) < 0.95


def test_an_image_alone_in_its_class_is_left_out_of_separability() -> None:
    runs, labels = clean_runs(50, seed=4)
    labels = labels.clone()
    labels[0] = 99
    expected = tuple(naive_separability(runs.path[:, c], labels) for c in LAYOUT.columns)
    assert separability(runs.path, labels, LAYOUT) == pytest.approx(expected)


def test_classes_that_share_no_column_are_told_apart_and_noise_is_not() -> None:
    labels = torch.arange(4).repeat(25)
    layout = PathLayout((Site("told", 0, 4, 1), Site("noise", 0, 4, 1)), ("mean",))
    noise = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    path = torch.cat([torch.nn.functional.one_hot(labels).float(), noise], dim=1)
    told, guessed = separability(path, labels, layout)
    assert told == 1.0
    assert guessed < 0.45


def test_separability_needs_two_classes_with_two_images() -> None:
    with pytest.raises(DataError, match="only 1 classes have 2 images or more, too few to tell"):
        separability(torch.rand(5, LAYOUT.length), torch.tensor([0, 0, 0, 0, 1]), LAYOUT)


def test_top_units_are_what_loops_over_channels_find() -> None:
    layout = PathLayout((Site("a", 0, 4, 1), Site("b", 0, 6, 1)), ("mean", "max"))
    runs, labels = clean_runs(70, seed=6)
    path = runs.path.double()
    assert layout.length == path.shape[1]
    for c, units in enumerate(top_units(runs.path, labels, layout)):
        best: dict[tuple[int, int], tuple[float, str, int]] = {}
        for site, columns in enumerate(layout.columns):
            channels = layout.sites[site].channels
            for at in range(columns.start, columns.stop):
                statistic, channel = divmod(at - columns.start, channels)
                x = path[:, at]
                gap = x[labels == c].mean() - x[labels != c].mean()
                effect = float(gap / x.std(correction=0))
                old = best.get((site, channel), (-math.inf, "", 0))
                best[site, channel] = max(old, (effect, layout.statistics[statistic], at))
        ordered = sorted(best.items(), key=lambda item: -item[1][0])[:UNITS]
        ordered = [item for item in ordered if item[1][0] > 0]
        assert [(unit.site, unit.channel) for unit in units] == [place for place, _ in ordered]
        for unit, (_, (effect, statistic, at)) in zip(units, ordered, strict=True):
            assert unit.effect == pytest.approx(effect)
            assert unit.statistic == statistic
            assert list(unit.examples) == path[:, at].argsort(descending=True)[:EXAMPLES].tolist()


def test_a_gate_that_never_varies_within_its_class_has_a_finite_effect() -> None:
    labels = torch.arange(2).repeat(10)
    path = torch.nn.functional.one_hot(labels).float()
    layout = PathLayout((Site("gates", 0, 2, 1),), ("gate",))
    first, second = top_units(path, labels, layout)
    assert [(u.channel, u.effect) for u in (*first, *second)] == [(0, 2.0), (1, 2.0)]
    assert set(labels[list(second[0].examples)].tolist()) == {1}


def test_paths_that_are_all_alike_name_no_unit() -> None:
    labels = torch.arange(2).repeat(5)
    assert top_units(torch.ones(10, LAYOUT.length), labels, LAYOUT) == ((), ())


def digits_reading(net: SmallNet, digits: Digits, *, seed: int = 0) -> Reading:
    images, labels = digits.images[TRAINED_ON : TRAINED_ON + 150], digits.labels[TRAINED_ON:][:150]
    changed = make_attack("fgsm", eps=0.2).run(net, images, labels, seed=0)
    return read_paths(
        net, activation(net, images), images, images, labels, NAMES, changed, seed=seed
    )


def test_a_network_that_reads_digits_is_read(net: SmallNet, digits: Digits) -> None:
    found = digits_reading(net, digits)
    assert hook_count(net) == 0
    assert found.router == "activation"
    assert found.similarity.shape == (3, 10, 10)
    torch.testing.assert_close(found.whole.diagonal(), torch.ones(10).double())
    assert found.whole.sum() - 10 < 0, "around their own mean, classes are on average unlike"
    assert all(s > c + 0.1 for s, c in zip(found.separability, found.shuffled, strict=True))
    assert found.attacked == round(found.accuracy * 150)
    assert found.course is not None
    assert 0 < found.course.pairs <= found.attacked
    assert bool((found.course.control[1] > found.course.before[1]).all())
    assert found.pictures.shape == (150, 8, 8, 3)
    assert found.pictures.dtype == torch.uint8
    assert [len(units) for units in found.units] == [UNITS] * 10


def test_the_same_inputs_give_the_same_reading(net: SmallNet, digits: Digits) -> None:
    first, again = digits_reading(net, digits), digits_reading(net, digits)
    assert same(first, again)
    other = digits_reading(net, digits, seed=1)
    assert other.shuffled != first.shuffled
    assert other.separability == first.separability


def test_without_attacks_there_is_no_course(net: SmallNet, digits: Digits) -> None:
    images, labels = digits.images[:60], digits.labels[:60]
    found = read_paths(net, activation(net, images), images, images, labels, NAMES)
    assert (found.attacked, found.course) == (0, None)
    unchanged = read_paths(net, activation(net, images), images, images, labels, NAMES, images)
    assert unchanged.attacked > 0
    assert unchanged.course is None


def test_a_module_that_runs_twice_is_named_with_its_call(net: SmallNet, digits: Digits) -> None:
    images, labels = digits.images[:60], digits.labels[:60]
    router = ActivationRouter(
        PathLayout(
            (Site("act", 0, 12, 1), Site("block.relu", 0, 12, 1), Site("block.relu", 1, 12, 1)),
            ("mean",),
        )
    )
    found = read_paths(net, router, images, images, labels, NAMES)
    assert found.site_names == ("act", "block.relu#0", "block.relu#1")


def given(digits: Digits, **changed: Any) -> dict[str, Any]:
    images = digits.images[:60]
    return {
        "inputs": images,
        "pictures": images,
        "labels": digits.labels[:60],
        "class_names": NAMES,
        **changed,
    }


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"class_names": ["all"]}, "compares classes and 1 was given; give images of at least two"),
        ({"labels": torch.zeros(60)}, "class '1' has 0 images and a reading needs at least 2"),
        ({"class_names": NAMES[:4]}, "labels run from 0 to 9 but only 4 classes are named"),
        ({"labels": torch.zeros(59)}, "59 labels were given for 60 inputs; give one per input"),
        ({"pictures": torch.zeros(2, 1, 8, 8)}, "2 pictures were given for 60 inputs"),
        ({"attacked": torch.zeros(3, 1, 8, 8)}, "3 attacked inputs were given for 60 inputs"),
        ({"pictures": torch.zeros(60, 8, 8)}, "shape .60, 8, 8. and type torch.float32 cannot be"),
        (
            {"labels": torch.arange(60) % 4, "class_names": NAMES[:4]},
            "the network tells 10 classes apart and 4 class names were given; give one per logit",
        ),
    ],
)
def test_what_does_not_fit_together_is_an_error(
    net: SmallNet, digits: Digits, changed: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        read_paths(net, activation(net, digits.images), **given(digits, **changed))


def test_pictures_come_as_bytes_or_as_floats(net: SmallNet, digits: Digits) -> None:
    grey = digits.images[:60]
    as_bytes = (grey * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    router = activation(net, grey)
    for pictures in (grey, grey.expand(-1, 3, -1, -1), as_bytes):
        found = read_paths(net, router, **given(digits, pictures=pictures))
        assert torch.equal(found.pictures, as_bytes)
