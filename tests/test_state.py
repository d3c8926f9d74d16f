"""Frozen dataclasses become JSON and tensors and come back; what does not fit is an error."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from defense.errors import ArtifactError
from defense.state import join, split, to_device


@dataclass(frozen=True)
class Leaf:
    weight: Tensor
    name: str = "leaf"


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]
    pair: tuple[int, ...]
    depth: float
    deep: bool
    more: Leaf | None = None


TREE = Tree((Leaf(torch.ones(2)), Leaf(torch.zeros(1, 3), "b")), (1, 2), 0.5, True)


def test_a_value_is_told_apart_into_json_and_named_tensors_and_comes_back() -> None:
    described, tensors = split(TREE, "tree")
    assert sorted(tensors) == ["tree.leaves.0.weight", "tree.leaves.1.weight"]
    again = join(Tree, json.loads(json.dumps(described)), tensors)
    assert (again.pair, again.depth, again.deep, again.more) == ((1, 2), 0.5, True, None)
    assert [leaf.name for leaf in again.leaves] == ["leaf", "b"]
    assert torch.equal(again.leaves[1].weight, TREE.leaves[1].weight)


def test_an_optional_part_comes_back_where_there_is_one() -> None:
    described, tensors = split(Tree((), (), 1.0, False, Leaf(torch.ones(1))))
    assert join(Tree, described, tensors).more.weight.tolist() == [1.0]


def test_parts_that_share_memory_are_written_apart() -> None:
    whole = torch.arange(4.0)
    described, tensors = split((Leaf(whole), Leaf(whole[:2]), Leaf(whole)), "x")
    again = join(tuple[Leaf, ...], described, load(save(tensors)))
    assert [leaf.weight.tolist() for leaf in again] == [[0, 1, 2, 3], [0, 1], [0, 1, 2, 3]]


def test_a_whole_number_is_a_float_where_one_was_expected() -> None:
    described, tensors = split(TREE)
    found = join(Tree, {**described, "depth": 2}, tensors).depth
    assert isinstance(found, float)
    assert found == 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"leaves": 3}, "the guard holds 3 where a list was expected"),
        ({"pair": [1, "x"]}, "the guard holds 'x' where int was expected"),
        ({"depth": True}, "the guard holds True where float was expected"),
        ({"depth": "0.5"}, "the guard holds '0.5' where float was expected"),
        ({"deep": 1}, "the guard holds 1 where bool was expected"),
        (
            {"leaves": [{"weight": {"tensor": "gone"}, "name": ""}]},
            "the guard lacks the tensor that",
        ),
        ({"leaves": [{"weight": [1.0], "name": ""}]}, r"describes as \[1\.0\]"),
        (
            {"leaves": [{"name": ""}]},
            r"describes Leaf with \['name'\]; expected \['name', 'weight'\]",
        ),
        ({"leaves": ["x"]}, "describes Leaf with 'x'; expected"),
        ({"extra": 1}, r"describes Tree with \['deep', 'depth', 'extra'"),
    ],
)
def test_a_description_that_does_not_fit_is_an_error(change: dict[str, Any], sentence: str) -> None:
    described, tensors = split(TREE)
    with pytest.raises(ArtifactError, match=sentence):
        join(Tree, described | change, tensors)


def test_a_value_moves_to_a_device_with_every_tensor_in_it() -> None:
    moved = to_device(TREE, torch.device("meta"))
    assert {leaf.weight.device.type for leaf in moved.leaves} == {"meta"}
    assert moved.pair == TREE.pair
    assert TREE.leaves[0].weight.device.type == "cpu"
