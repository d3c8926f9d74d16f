"""A study of few contestants: what it says is what a by-hand count of the same scores says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from defense.errors import SiteError
from defense.offline.benchmark import study
from defense.offline.benchmark.contestants import Trial, contestants
from defense.offline.benchmark.discipline import digests
from defense.offline.benchmark.metrics import p_values
from defense.offline.benchmark.peers import Sample, Score
from defense.offline.benchmark.splits import make_split
from defense.offline.benchmark.study import run_study
from defense.offline.benchmark.trials import Material
from tests.offline.studied import bright, entrant

SEEDS = (0, 1)
ATTACKS = {"fgsm_8", "pgd_2", "pgd_4"}
SPREAD = {"mean", "sd", "low", "high"}
CELL = {
    *("n", "auroc", "aupr", "aupr_1", "tpr", "fpr95"),
    *("guarded_success", "robust_accuracy"),
}
ROW = {
    *("kind", "fit", "about", "seen", "unseen", "clean", "shifts", "noise", "failed", "strict"),
    "summary",
}


def unbuildable(_trial: Trial) -> Score:
    raise SiteError("no layer of this network suits it")


def memory(trial: Trial) -> Score:
    """Learn attacked images by heart: finds those and no other."""
    assert trial.attacked is not None
    known = set(digests(trial.attacked.pixels))
    return lambda sample: torch.tensor([float(name in known) for name in digests(sample.pixels)])


@pytest.fixture(scope="module")
def results(material: Material) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "FEW", 30)
        every = [
            next(contestants()),
            entrant(kind="ours"),
            entrant("memory", "ours", fit="attacks", learn=memory),
            entrant("peer"),
            entrant("slow", slow=True),
            entrant("unbuildable", learn=unbuildable),
        ]
        return run_study(material, every, SEEDS)


def test_results_have_the_parts_that_the_report_reads(results: dict[str, Any]) -> None:
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert results.keys() == {"attacks", "contestants", "sealed", "roc", "absent"}
    assert results["attacks"].keys() == ATTACKS
    ours = results["contestants"]["pathguard"]
    assert ours.keys() == ROW
    assert (ours["kind"], ours["fit"]) == ("ours", "attacks")
    for kind in ("seen", "unseen"):
        assert ours[kind].keys() == ATTACKS
        for cell in ours[kind].values():
            assert cell.keys() == CELL
            assert cell["auroc"].keys() == cell["tpr"]["0.01"].keys() == SPREAD
        assert ours["summary"][kind].keys() == {"mean", "worst", "worst_attack", "tpr_1"}
    assert ours["clean"].keys() == {"realised_fpr", "per_class_fpr"}
    assert set(ours["clean"]["per_class_fpr"]) == {"blue", "green", "red"}
    assert set(ours["shifts"]) == {"noise", "blur", "jpeg", "brightness", "contrast"}
    assert set(ours["shifts"]["blur"]) == {"1", "2"}
    assert set(ours["noise"]) >= {"uniform noise of fgsm_8", "gaussian noise of pgd_2"}
    assert 0 < ours["summary"]["extra_passes"] < 2
    assert [point[0] for point in results["roc"]["pathguard"]["all"]][::60] == [0.001, 1.0]


def test_who_cannot_be_built_is_listed_with_the_reason(results: dict[str, Any]) -> None:
    assert results["absent"] == {"unbuildable": "no layer of this network suits it"}
    assert "unbuildable" not in results["contestants"]


def test_the_sealed_images_judge_ours(results: dict[str, Any]) -> None:
    assert results["sealed"].keys() == {"pathguard", "bright", "memory"}
    sealed = results["sealed"]["pathguard"]
    assert sealed.keys() == ROW
    assert set(sealed["shifts"]["blur"]) == {"1"}
    assert sealed["unseen"] is None


def test_controls_of_others_are_counted_with_one_seed_alone(
    material: Material, results: dict[str, Any]
) -> None:
    ours, peer = (results["contestants"][name] for name in ("bright", "peer"))
    assert peer["seen"] == ours["seen"]
    assert peer["noise"].keys() == ours["noise"].keys()
    alone = run_study(material, [entrant()], SEEDS[:1])["contestants"]["bright"]
    assert (peer["shifts"], peer["noise"]) == (alone["shifts"], alone["noise"])
    assert peer["shifts"] != ours["shifts"]


def test_slow_contestants_are_judged_once_on_few_images(results: dict[str, Any]) -> None:
    slow = results["contestants"]["slow"]
    assert slow["seen"].keys() == {"fgsm_8", "pgd_2"}  # pgd_4 is none of those it is judged against
    assert (
        slow["seen"]["fgsm_8"]["n"] <= 30 < results["contestants"]["bright"]["seen"]["fgsm_8"]["n"]
    )
    assert slow["seen"]["fgsm_8"]["auroc"]["sd"] == 0
    assert (slow["unseen"], slow["shifts"], slow["noise"]) == (None, {}, {})


def by_hand(material: Material, seed: int, rows: Tensor) -> tuple[float, float, float]:
    """Return AUROC and hit rate at 5 % of fgsm_8, and the realised rate, of brightness."""
    sealed = rows is material.pools.sealed
    attacked = (material.sealed if sealed else material.open).assaults["fgsm_8"].of(rows)
    twins = bright(material.clean.take(attacked.rows))
    hits = bright(attacked.successes())
    truth = [0] * len(twins) + [1] * len(hits)
    known = bright(material.clean.take(make_split(material.pools, seed).calibration))
    clean = bright(material.clean.take(rows))
    rates = [(p_values(known, score) <= 0.05).double().mean() for score in (hits, clean)]
    return roc_auc_score(truth, torch.cat([twins, hits])), float(rates[0]), float(rates[1])


@pytest.mark.parametrize("part", ["contestants", "sealed"])
def test_figures_are_those_of_a_count_by_hand_over_seeds(
    material: Material, results: dict[str, Any], part: str
) -> None:
    pool = material.pools.sealed if part == "sealed" else None
    found = torch.tensor(
        [
            by_hand(material, seed, make_split(material.pools, seed).test if pool is None else pool)
            for seed in SEEDS
        ],
        dtype=torch.float64,
    )
    row = results[part]["bright"]
    cell = row["seen"]["fgsm_8"]
    told = [cell["auroc"], cell["tpr"]["0.05"], row["clean"]["realised_fpr"]["0.05"]]
    for spread, hand in zip(told, found.T, strict=True):
        assert spread["mean"] == pytest.approx(float(hand.mean()), abs=1e-5)
        assert spread["sd"] == pytest.approx(float(hand.std()), abs=1e-5)
        assert spread["low"] <= spread["mean"] <= spread["high"]
    if pool is None:
        assert cell["auroc"]["sd"] > 0


def test_learning_attacked_images_by_heart_finds_no_other(results: dict[str, Any]) -> None:
    for row in (results["contestants"]["memory"], results["sealed"]["memory"]):
        for cell in (row["seen"] | (row["unseen"] or {})).values():
            assert cell["auroc"]["mean"] == 0.5
            assert cell["tpr"]["0.05"]["mean"] == 0


def test_attacks_are_described_over_all_that_they_were_made_of(
    material: Material, results: dict[str, Any]
) -> None:
    told = results["attacks"]["pgd_2"]
    won = torch.cat([field.assaults["pgd_2"].won for field in (material.open, material.sealed)])
    assert (told["family"], told["norm"], told["n"]) == ("pgd", "linf", len(won))
    assert told["success_rate"] == pytest.approx(float(won.double().mean()))
    assert told["mean_linf"] == pytest.approx(2 / 255, rel=1e-4)
    assert 0 < told["mean_l2"] <= (3 * 12 * 12) ** 0.5 * 2 / 255 + 1e-6


def recorder(seen: list[set[str]]) -> Callable[[Trial], Score]:
    def learn(trial: Trial) -> Score:
        assert trial.attacked is not None
        seen.append(set(digests(trial.attacked.pixels)))
        return bright

    return learn


@pytest.mark.parametrize(("kind", "fits"), [("ours", 2 * 3), ("peer", 2 + 2), ("control", 2)])
def test_every_family_is_left_out_with_each_seed_of_ours_and_with_one_of_peers(
    material: Material, kind: str, fits: int
) -> None:
    seen: list[set[str]] = []
    run_study(material, [entrant("x", kind, fit="attacks", learn=recorder(seen))], SEEDS)
    assert len(seen) == fits
    if kind == "control":
        return
    whole, without_fgsm, without_pgd = seen[0], seen[2], seen[3]
    assert without_fgsm | without_pgd == whole
    assert not without_fgsm & without_pgd


def test_with_one_family_there_is_none_to_leave_out(material: Material) -> None:
    few = {name: a for name, a in material.open.assaults.items() if a.attack.family == "pgd"}
    alone = replace(material, open=replace(material.open, assaults=few))
    found = run_study(alone, [entrant(fit="attacks")], [0])
    assert found["contestants"]["bright"]["unseen"] is None
    assert found["contestants"]["bright"]["seen"].keys() == few.keys()


def test_without_a_witness_those_who_need_one_are_absent(material: Material) -> None:
    blind = replace(material, clean=Sample(material.clean.pixels, material.clean.routed.at("path")))
    wanting = [each for each in contestants() if each.needs == "path+witness"]
    assert {each.name for each in wanting} == {
        *("witness alone", "without echoes", "without echoes clean")
    }
    found = run_study(blind, wanting, [0])
    assert found["contestants"] == found["sealed"] == found["roc"] == {}
    says = "it looks at 'path+witness' and there is 'path' alone"
    assert found["absent"] == {each.name: says for each in wanting}
