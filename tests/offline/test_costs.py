"""What a path costs: memory at the peak, and times that are positive and paired."""

from __future__ import annotations

import pytest
import torch

from defense.offline import costs
from defense.offline.costs import measure_cost, peak_mib
from defense.offline.fit import fit_router, make_recipe
from tests.served import hook_count, images_like_noise, seeded_net


def test_the_peak_is_what_was_held_at_once() -> None:
    def one_after_the_other() -> None:
        torch.zeros(1024, 1024)
        torch.zeros(1024, 1024)

    assert peak_mib(one_after_the_other) == pytest.approx(4, abs=0.01)
    assert peak_mib(lambda: [torch.zeros(1024, 1024) for _ in range(3)]) == pytest.approx(
        12, abs=0.01
    )


@pytest.mark.parametrize("name", ["activation", "contribution"])
def test_a_cost_has_both_times_and_leaves_no_hook(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "ROUNDS", 2)
    net, x = seeded_net(), images_like_noise(40, 1)
    found = measure_cost(net, fit_router(net, make_recipe(name), x), x)
    assert [cost.batch for cost in found] == [1, 32]
    assert all(min(cost.bare_ms, cost.path_ms, cost.ratio) > 0 for cost in found)
    assert all(cost.rounds == 2 for cost in found)
    assert hook_count(net) == 0


def test_a_slow_router_is_not_measured_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "SECONDS", 0.0)
    net, x = seeded_net(), images_like_noise(2, 1)
    found = measure_cost(net, fit_router(net, make_recipe("activation"), x), x)
    assert [cost.rounds for cost in found] == [1, 1]
