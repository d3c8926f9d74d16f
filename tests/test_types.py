"""The values that flow: layouts place sites in columns, runs can be cut and stacked."""

from __future__ import annotations

import pytest
import torch

from defense.errors import GuardFailure
from defense.types import LOOKS, PathLayout, Routed, Scored, Site


def test_a_layout_gives_every_site_its_own_columns_one_per_channel_and_statistic() -> None:
    layout = PathLayout((Site("a", 0, 3, 1), Site("b", 1, 5, -1)), ("mean", "max"))
    assert layout.columns == (slice(0, 6), slice(6, 16))
    assert layout.length == 16


def test_an_empty_layout_has_no_columns() -> None:
    assert PathLayout((), ("mean",)).length == 0


def test_a_site_is_named_by_its_module_and_its_call() -> None:
    assert Site("layer1.relu", 1, 3, 1).name == "layer1.relu#1"


def test_stacking_the_rows_of_a_run_gives_the_run_back() -> None:
    run = Routed(torch.randn(5, 3), torch.randn(5, 7))
    parts = [run.take(torch.tensor([row])) for row in range(5)]
    again = Routed.concat(parts)
    assert torch.equal(again.logits, run.logits)
    assert torch.equal(again.path, run.path)
    assert torch.equal(again.predicted, run.logits.argmax(1))
    assert len(again) == 5


def test_rows_are_taken_by_mask() -> None:
    run = Routed(torch.eye(3), torch.arange(3.0)[:, None])
    kept = run.take(torch.tensor([True, False, True])).cpu()
    assert kept.path.flatten().tolist() == [0, 2]


def seen(count: int = 4) -> Routed:
    draw = torch.Generator().manual_seed(0)
    return Routed(*(torch.randn(count, *s, generator=draw) for s in ((3,), (7,), (3,), (2, 3))))


def test_rows_are_taken_and_stacked_with_all_that_is_known_of_them() -> None:
    run = seen()
    again = Routed.concat([run.take(torch.tensor([row])) for row in range(4)]).cpu()
    for name in ("logits", "path", "witness", "echoes"):
        assert torch.equal(getattr(again, name), getattr(run, name))


@pytest.mark.parametrize("look", LOOKS)
def test_a_run_at_a_look_carries_what_that_look_shows_and_no_more(look: str) -> None:
    found = seen().at(look)
    assert found.look == look
    assert (found.witness is not None) == ("witness" in look)
    assert (found.echoes is not None) == ("echoes" in look)
    assert [other for other in LOOKS if found.shows(other)] == [
        other for other in LOOKS if set(other.split("+")) <= set(look.split("+"))
    ]


def test_a_run_that_lacks_what_a_look_shows_is_an_error() -> None:
    with pytest.raises(GuardFailure, match=r"carry 'path\+echoes' and not 'path\+witness'; coll"):
        seen().at("path+echoes").at("path+witness")


def test_runs_of_different_looks_are_not_stacked() -> None:
    with pytest.raises(GuardFailure, match="some runs carry a witness or echoes and others do not"):
        Routed.concat([seen(), seen().at("path")])


def test_opinions_are_taken_and_stacked_by_row() -> None:
    scored = Scored(*(torch.arange(3.0) + i for i in range(4)))
    again = Scored.concat([scored.take(torch.tensor([0, 2])), scored.take(torch.tensor([1]))])
    assert again.score.tolist() == [0, 2, 1]
    assert again.predicted.tolist() == [3, 5, 4]
