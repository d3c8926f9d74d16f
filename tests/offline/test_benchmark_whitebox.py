"""Attackers who know everything, against the guard of a study."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from defense.offline.attacks.adaptive import ADAPTIVE, AdaptiveAttack
from defense.offline.benchmark import whitebox
from defense.offline.benchmark.trials import Material
from defense.offline.benchmark.whitebox import Outcome, attack_knowing_all, make_guard
from defense.types import LOOKS
from tests.offline.studied import rows_run

RADII = (2, 8)
COUNT = 12
SHARES = ("fooled", "through", "through_1")


@pytest.fixture(autouse=True, scope="module")
def small_effort() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whitebox, "RADII", RADII)
        patch.setattr(whitebox, "IMAGES", COUNT)
        patch.setattr(whitebox, "BANK_IMAGES", 30)
        effort = {name: {"steps": 4, "restarts": 1} for name in (*ADAPTIVE, "bare")}
        effort["joint"]["rounds"] = 2
        patch.setattr(whitebox, "EFFORT", effort)
        yield


@pytest.fixture(scope="module")
def found(material: Material, small_effort: None) -> dict[str, Any]:
    return attack_knowing_all(material, 0)


def test_what_got_through_is_told_as_shares(found: dict[str, Any]) -> None:
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["eps_255"], found["n"], found["fpr"]) == ([2, 8], COUNT, 0.05)
    assert found["rows"].keys() == ADAPTIVE.keys()
    for row in (*found["rows"].values(), found["worst"], found["bare"], found["knowing"]):
        assert row.keys() == {"2", "8"}
        for cell in row.values():
            assert 0 <= cell["through"] <= cell["through_1"] <= cell["fooled"] <= 1
            assert (cell["mean_l2"] is None) == (cell["through"] == 0)


def test_the_attacks_do_something(found: dict[str, Any]) -> None:
    assert found["bare"]["8"]["fooled"] > 0.5
    assert found["worst"]["8"]["fooled"] > found["worst"]["2"]["fooled"]
    bound = (3 * 12 * 12) ** 0.5 * 8 / 255
    assert 0 < found["bare"]["8"]["mean_l2_fooled"] <= bound + 1e-6


@pytest.mark.parametrize("radius", ["2", "8"])
def test_the_worst_case_is_never_below_any_attack(found: dict[str, Any], radius: str) -> None:
    worst, knowing = found["worst"][radius], found["knowing"][radius]
    for share in SHARES:
        rows = [row[radius][share] for row in found["rows"].values()]
        assert knowing[share] >= max(rows)
        assert worst[share] >= max(knowing[share], found["bare"][radius][share])


def test_what_attackers_found_is_read_again(
    material: Material, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_args: object, **_how: object) -> None:
        raise AssertionError

    monkeypatch.setattr(AdaptiveAttack, "run", forbidden)
    assert attack_knowing_all(material, 0) == found
    with rows_run(material.subject.served.backbone) as sizes:
        attack_knowing_all(material, 0)
    assert sum(sizes) == 3 * whitebox.BANK_IMAGES  # the bank alone, with its two echoes


def test_the_worst_case_takes_the_least_change_that_got_furthest() -> None:
    def outcome(fooled: list[int], through: list[int], size: list[float]) -> Outcome:
        passed = torch.tensor(through).bool()
        return Outcome(torch.tensor(fooled).bool(), passed, passed, torch.tensor(size))

    first = outcome([1, 1, 0, 1], [1, 0, 0, 0], [3.0, 2.0, 0.1, 5.0])
    second = outcome([1, 0, 0, 1], [1, 0, 0, 1], [2.0, 1.0, 0.1, 7.0])
    worst = whitebox._any([first, second])
    assert worst.fooled.tolist() == [True, True, False, True]
    assert worst.through.tolist() == [True, False, False, True]
    assert worst.size.tolist() == [2.0, 2.0, torch.inf, 7.0]
    told = worst.figures()
    assert told["mean_l2"] == pytest.approx((2 + 7) / 2)
    assert told["mean_l2_fooled"] == pytest.approx((2 + 2 + 7) / 3)


def test_the_guard_of_a_study_is_the_one_that_is_judged(material: Material) -> None:
    guard = make_guard(material, 0)
    assert guard.fingerprint == material.subject.fingerprint
    assert set(guard.calibrations) == set(LOOKS)
    assert guard.class_names == ("blue", "green", "red")
    assert guard.inputs.shape == (3, 12, 12)
