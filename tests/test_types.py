"""The values that flow: layouts place sites in columns, runs can be cut and stacked."""

from __future__ import annotations

import torch

from defense.types import PathLayout, Routed, Site


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
