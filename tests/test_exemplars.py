"""Clean images by name: which are chosen, which are nearest, and what a guard says that has none."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from defense.artifact import load_guard, save_guard
from defense.errors import ArtifactError
from defense.exemplars import Exemplars, follow_pathway
from defense.guard import Guard
from defense.memory import Nearness
from defense.offline.exemplars import PER_CLASS, choose_exemplars
from defense.routers.activation import ActivationRouter
from defense.routers.generative import GenerativeRouter
from defense.types import Routed
from tests.conftest import Digits
from tests.served import SmallNet
from tests.synthetic import CLASSES, LAYOUT, clean_runs

SKETCHES = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
SMALL = Exemplars(SKETCHES, torch.tensor([0, 1, 0, 1]), ("a.png", "b.png", "c.png", "d.png"))
PLAIN = Nearness(torch.eye(LAYOUT.length), 0.0)


def test_the_nearest_comes_first_with_its_distance_and_class() -> None:
    [found] = SMALL.nearest(torch.tensor([[1.0, 0.9]]), most=3)
    assert [(n.image, n.label) for n in found] == [("b.png", 1), ("a.png", 0), ("c.png", 0)]
    assert [n.distance for n in found] == pytest.approx([0.9, 1.81**0.5, 2.21**0.5])


def test_the_nearest_of_one_class_are_asked_for_row_by_row() -> None:
    both = SMALL.nearest(torch.zeros(2, 2), most=2, labels=torch.tensor([1, 0]))
    assert [[n.image for n in row] for row in both] == [["b.png", "d.png"], ["a.png", "c.png"]]


def test_there_are_no_more_than_there_are_and_none_of_an_empty_class() -> None:
    assert len(SMALL.nearest(torch.zeros(1, 2), most=9)[0]) == 4
    assert SMALL.nearest(torch.zeros(1, 2), most=9, labels=torch.tensor([2])) == [()]


def test_a_path_that_is_no_number_is_near_nothing() -> None:
    assert SMALL.nearest(torch.full((1, 2), torch.nan), most=2) == [()]


@pytest.mark.parametrize("images", [("a.png",), ()])
def test_names_and_paths_that_do_not_match_are_refused(images: tuple[str, ...]) -> None:
    with pytest.raises(ArtifactError, match=r"holds 4 paths of them and 4 classes; fit it again"):
        replace(SMALL, images=images)


@pytest.mark.parametrize(
    ("classes", "width"), [(1, 2), (2, 3), (2, 0)], ids=["classes", "width", "no nearness"]
)
def test_exemplars_of_other_classes_or_other_sketches_are_refused(classes: int, width: int) -> None:
    SMALL.check(2, 2)
    with pytest.raises(ArtifactError, match="not compared as it compares requests; fit it again"):
        SMALL.check(classes, width)


def test_pathways_of_other_classes_are_refused() -> None:
    with pytest.raises(ArtifactError, match="are not of its 2 classes"):
        replace(SMALL, pathways=torch.ones(3, 4)).check(2, 2)


def test_a_few_images_of_every_class_are_chosen_of_those_classified_right() -> None:
    run, labels = clean_runs(200, seed=3)
    wrong = labels.clone()
    wrong[:50] = (
        labels[:50] + 1
    ) % CLASSES  # these are classified otherwise than they are labelled
    names = [f"{row}.png" for row in range(200)]
    found = choose_exemplars(run, wrong, names, PLAIN, ActivationRouter(LAYOUT))
    assert found.labels.bincount(minlength=CLASSES).tolist() == [PER_CLASS] * CLASSES
    for image, label, sketch in zip(found.images, found.labels, found.sketches, strict=True):
        row = int(image.removesuffix(".png"))
        assert row >= 50
        assert int(run.predicted[row]) == int(label)
        assert torch.equal(sketch, run.path[row])
    assert found.pathways is None


def masks(count: int) -> tuple[Routed, Tensor]:
    """Return runs whose path opens the first channels for class 0 and the last ones for class 1."""
    labels = torch.arange(count) % 2
    path = torch.zeros(count, LAYOUT.length)
    path[labels == 0, :8] = 1.0
    path[labels == 1, -4:] = 1.0
    path[0, 10] = 1.0  # an opinion of one image, which is not its class's
    return Routed(torch.nn.functional.one_hot(labels, 2).float(), path), labels


def generative() -> GenerativeRouter:
    empty = torch.zeros(LAYOUT.length)
    return GenerativeRouter(LAYOUT, empty, empty, None)  # type: ignore[arg-type]


def test_the_pathway_of_a_class_is_what_most_of_its_masks_open() -> None:
    run, labels = masks(20)
    found = choose_exemplars(run, labels, ["x"] * 20, PLAIN, generative())
    assert found.pathways is not None
    assert found.pathways[0].nonzero().flatten().tolist() == list(range(8))
    assert found.pathways[1].nonzero().flatten().tolist() == [16, 17, 18, 19]


def test_a_class_without_a_mask_leaves_the_guard_without_pathways() -> None:
    run, labels = masks(20)
    three = replace(run, logits=torch.nn.functional.pad(run.logits, (0, 1), value=-1.0))
    assert choose_exemplars(three, labels, ["x"] * 20, PLAIN, generative()).pathways is None


def test_a_mask_is_held_against_every_pathway_and_its_strays_are_named() -> None:
    run, labels = masks(20)
    pathways = choose_exemplars(run, labels, ["x"] * 20, PLAIN, generative()).pathways
    assert pathways is not None
    mask = torch.zeros(LAYOUT.length)
    mask[[0, 1, 16, 17, 18, 19]] = 1.0  # predicted 0, and opens the pathway of 1
    found = follow_pathway(mask, 0, pathways, LAYOUT, most=5).as_json(("zero", "one"))
    assert found == {
        "open": 0.3,
        "own": round(2 / 12, 4),
        "best": {"class": "one", "share": round(4 / 6, 4)},
        "strays": [{"site": "c", "channels": [0, 1, 2, 3]}],
    }


def test_a_fitted_guard_keeps_them_through_its_folder(guard: Guard, tmp_path: Path) -> None:
    save_guard(guard, tmp_path / "guard")
    again = load_guard(tmp_path / "guard").exemplars
    assert guard.exemplars is not None
    assert again is not None
    assert again.images == guard.exemplars.images
    assert torch.equal(again.sketches, guard.exemplars.sketches)
    assert torch.equal(again.labels, guard.exemplars.labels)
    assert again.pathways is None


def test_a_guard_of_before_has_none(guard: Guard, tmp_path: Path) -> None:
    import json

    save_guard(replace(guard, exemplars=None), tmp_path / "guard")
    document = json.loads((tmp_path / "guard" / "guard.json").read_text())
    del document["exemplars"]
    (tmp_path / "guard" / "guard.json").write_text(json.dumps(document | {"schema": 3}))
    assert load_guard(tmp_path / "guard").exemplars is None


def test_the_shipped_guard_names_clean_images_of_every_class() -> None:
    shipped = load_guard(Path(__file__).parents[1] / "model_store" / "cifar10-guard")
    assert shipped.exemplars is not None
    assert shipped.exemplars.labels.bincount().tolist() == [PER_CLASS] * len(shipped.class_names)
    for image, label in zip(shipped.exemplars.images, shipped.exemplars.labels, strict=True):
        assert image.startswith(f"test/{shipped.class_names[int(label)]}/")


def test_an_exemplar_is_nearest_to_itself(guard: Guard, trained: SmallNet, digits: Digits) -> None:
    assert guard.exemplars is not None
    assert guard.nearness is not None
    images = digits.images[400:]  # the images of the fit, whose rows are the names
    chosen = [int(name) for name in guard.exemplars.images[:10]]
    with guard.attach(trained) as attached, torch.inference_mode():
        path = attached.backbone.run(images[chosen]).path
    found = guard.exemplars.nearest(guard.nearness.sketch(path), most=1)
    assert [row[0].image for row in found] == [str(row) for row in chosen]
    assert max(row[0].distance for row in found) < 1e-3


def test_a_guard_whose_exemplars_do_not_fit_is_refused(guard: Guard) -> None:
    with pytest.raises(ArtifactError, match=re.escape("are not of its 10 classes")):
        replace(guard, nearness=None)
