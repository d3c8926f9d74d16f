"""A cell holds what the figures say, and seeds and attacks merge as announced."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from defense.errors import DataError
from defense.offline.benchmark.cells import judge, judge_clean, spread_cells, summary
from defense.offline.benchmark.metrics import (
    Spread,
    aupr,
    auroc,
    flagged,
    fpr_at_tpr,
    per_class,
    wilson,
)

DRAW = torch.Generator().manual_seed(1)
CLEAN, ATTACKED = (mean + torch.randn(400, generator=DRAW) for mean in (0, 2))
CALIBRATION = torch.randn(1000, generator=DRAW)
WON = torch.arange(400) % 4 > 0


def test_a_cell_holds_what_the_figures_say() -> None:
    cell = judge(CLEAN, ATTACKED, WON, CALIBRATION, accuracy=0.9, seed=5)
    assert json.loads(json.dumps(cell)) == cell
    positive = ATTACKED[WON]
    tenth = float(CALIBRATION.sort().values[-10])  # above it, at most 1 + 9 of 1001
    through = WON & (tenth >= ATTACKED)
    served = (tenth >= CLEAN) & ~through
    assert cell["n"] == 300
    assert cell["auroc"]["mean"] == auroc(CLEAN, positive)
    assert cell["auroc"]["low"] < cell["auroc"]["mean"] < cell["auroc"]["high"]
    assert cell["aupr"] == aupr(CLEAN, positive)
    assert cell["aupr_1"] == aupr(CLEAN, positive, prevalence=0.01)
    assert set(cell["tpr"]) == {"0.05", "0.01", "0.001"}
    hits = float((positive > tenth).double().mean())
    assert cell["tpr"]["0.01"]["mean"] == pytest.approx(hits)
    assert cell["fpr95"] == fpr_at_tpr(CLEAN, positive)
    assert cell["guarded_success"] == pytest.approx(float(through.double().mean()))
    assert cell["robust_accuracy"] == pytest.approx(0.9 * float(served.double().mean()))
    assert judge(CLEAN, ATTACKED, WON, CALIBRATION, accuracy=0.9, seed=5) == cell


def test_a_cell_without_a_success_or_with_few_calibration_scores_has_gaps() -> None:
    cell = judge(CLEAN, ATTACKED, torch.zeros(400, dtype=torch.bool), CALIBRATION)
    assert (cell["n"], cell["auroc"], cell["aupr"], cell["fpr95"]) == (0, None, None, None)
    assert cell["tpr"] == {"0.05": None, "0.01": None, "0.001": None}
    assert cell["guarded_success"] == 0
    few = judge(CLEAN, ATTACKED, WON, CALIBRATION[:50])
    assert few["tpr"]["0.05"] is not None
    assert few["tpr"]["0.01"] is few["guarded_success"] is few["robust_accuracy"] is None


def test_the_clean_part_has_realised_rates_and_those_of_every_class() -> None:
    labels = torch.arange(400) % 2
    found = judge_clean(CLEAN, labels, CALIBRATION, ("even", "odd"))
    rejected = flagged(CALIBRATION, CLEAN, 0.01)
    assert rejected is not None
    realised = found["realised_fpr"]["0.01"]
    assert realised["mean"] == float(rejected.double().mean())
    assert (realised["low"], realised["high"]) == wilson(int(rejected.sum()), 400)
    assert found["per_class_fpr"] == per_class(rejected, labels, ("even", "odd"))
    few = judge_clean(CLEAN, labels, CALIBRATION[:50], ("even", "odd"))
    assert few["per_class_fpr"] == {"even": None, "odd": None}


def cell_of(area: float, hits: float | None = 0.5) -> dict[str, Any]:
    tpr = None if hits is None else {"mean": hits, "sd": 0.0, "low": hits, "high": hits}
    spread = {"mean": area, "sd": 0.0, "low": area - 0.1, "high": area + 0.1}
    return {"n": 10, "auroc": spread, "tpr": {"0.01": tpr}, "aupr": area}


def test_seeds_merge_to_mean_deviation_and_mean_limits() -> None:
    merged = spread_cells([cell_of(0.6, 0.2), cell_of(0.8, None), None])
    assert merged is not None
    assert merged["n"] == 10
    assert isinstance(merged["n"], int)
    assert merged["aupr"] == pytest.approx(0.7)
    assert merged["auroc"] == {
        "mean": pytest.approx(0.7),
        "sd": pytest.approx(0.02**0.5),
        "low": pytest.approx(0.6),
        "high": pytest.approx(0.8),
    }
    assert merged["tpr"]["0.01"] == {"mean": 0.2, "sd": 0.0, "low": 0.2, "high": 0.2}
    assert spread_cells([None, None]) is None
    assert Spread.over([Spread(0.5, 0, 0.4, 0.6)]) == Spread(0.5, 0, 0.4, 0.6)


def test_a_summary_averages_over_attacks_and_names_the_worst_one() -> None:
    first = {"easy": cell_of(0.9, 1.0), "hard": cell_of(0.5, 0.0), "impossible": None}
    second = {"easy": cell_of(0.9, 0.8), "hard": cell_of(0.7, 0.2), "impossible": None}
    found = summary([first, second])
    assert found["worst_attack"] == "hard"
    assert found["worst"]["mean"] == pytest.approx(0.6)
    assert found["worst"]["sd"] == pytest.approx(0.02**0.5)
    assert found["mean"]["mean"] == pytest.approx(0.75)  # .7 and .8
    assert found["mean"]["sd"] == pytest.approx(0.005**0.5)
    assert found["mean"]["low"] == pytest.approx(0.65)
    assert found["tpr_1"]["mean"] == pytest.approx(0.5)
    assert summary([{"impossible": None}]) == {
        "mean": None,
        "worst": None,
        "worst_attack": None,
        "tpr_1": None,
    }


def test_scores_that_are_no_twins_are_an_error() -> None:
    with pytest.raises(DataError, match=r"shapes \(400,\) .clean., \(399,\) .*twins in the same"):
        judge(CLEAN, ATTACKED[1:], WON, CALIBRATION)
    with pytest.raises(DataError, match=r"of torch.int64 .won.; expected one number and one bool"):
        judge(CLEAN, ATTACKED, WON.long(), CALIBRATION)


def test_no_calibration_is_an_error() -> None:
    with pytest.raises(DataError, match="no calibration scores to fix a threshold with; keep"):
        judge(CLEAN, ATTACKED, WON, CALIBRATION[:0])


def test_a_score_that_is_no_number_is_an_error() -> None:
    broken = ATTACKED.clone()
    broken[7] = float("nan")
    with pytest.raises(DataError, match="the attacked score in row 7 is nan; expected finite"):
        judge(CLEAN, broken, WON, CALIBRATION)
