"""What has to hold before a study is believed, each with what breaks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from defense.errors import DataError
from defense.offline.benchmark import checks
from defense.offline.benchmark.checks import (
    as_results,
    check_attacks,
    check_claims,
    check_guard,
    require_discipline,
)
from defense.offline.benchmark.peers import Sample
from defense.offline.benchmark.sanity import Check
from defense.offline.benchmark.splits import Pools, Split, make_split
from defense.offline.benchmark.trials import Assault, Material
from defense.offline.benchmark.whitebox import make_guard

SEEDS = (0, 1)


def test_a_sound_study_is_let_pass(material: Material) -> None:
    found = require_discipline(material, SEEDS)
    assert [check.name for check in found] == ["splits apart", "twins together"]
    assert all(check.passed for check in found)


def leaking(part: str, into: str) -> Callable[[Pools, int], Split]:
    """Return a split of the second seed whose part `into` holds some images of another part."""

    def split(pools: Pools, seed: int) -> Split:
        good = make_split(pools, seed)
        if seed == 0:
            return good
        parts = good.parts() | {"sealed": pools.sealed}
        return replace(good, **{into: torch.cat([parts[into], parts[part][:3]])})

    return split


@pytest.mark.parametrize(
    ("part", "into"),
    [("test", "calibration"), ("test", "fit"), ("sealed", "views"), ("fit", "calibration")],
)
def test_an_image_that_serves_two_ends_is_caught(
    material: Material, monkeypatch: pytest.MonkeyPatch, part: str, into: str
) -> None:
    monkeypatch.setattr(checks, "make_split", leaking(part, into))
    said = rf"images in both '({part}|{into})' and '({part}|{into})': 3 "
    with pytest.raises(DataError, match=said):
        require_discipline(material, SEEDS)


def test_a_near_copy_of_a_fitted_image_in_the_test_is_caught(material: Material) -> None:
    split = make_split(material.pools, 0)
    pixels = material.clean.pixels.clone()
    twin = pixels[split.views[4]] + 1 / 255
    pixels[split.test[2]] = twin
    leaky = replace(material, clean=Sample(pixels, material.clean.routed))
    said = r"images of the test within 8.0/255 of one of the fit: 1 \(row 2 of the test and row 4"
    with pytest.raises(DataError, match=said):
        require_discipline(leaky, SEEDS)


def attacks_of(material: Material) -> list[Check]:
    return list(check_attacks(material))


def with_assault(material: Material, assault: Assault) -> Material:
    """Return material with another outcome of one attack."""
    assaults = dict(material.open.assaults) | {assault.attack.name: assault}
    return replace(material, open=replace(material.open, assaults=assaults))


def test_attacks_that_work_pass(material: Material) -> None:
    found = attacks_of(material)
    assert all(check.passed for check in found), [c.says for c in found if not c.passed]
    assert len(found) == 5
    assert found[-2].name == "success grows with eps"
    assert found[-1].name == "a large change succeeds"
    assert "noise of its norm" in found[0].says


def test_an_attack_that_does_nothing_is_caught(material: Material) -> None:
    idle = material.open.assaults["fgsm_8"]
    clean = material.clean.take(idle.rows)
    idle = replace(idle, sample=clean, won=torch.zeros_like(idle.won))
    first, *others = attacks_of(with_assault(material, idle))
    assert not first.passed
    assert "fgsm_8 changes 0.0% of the images and fools the network on 0.0%" in first.says
    assert all(check.passed for check in others)


def test_an_attack_that_ignores_its_size_is_caught(material: Material) -> None:
    small = material.open.assaults["pgd_2"]
    lucky = replace(small, won=torch.ones_like(small.won))
    found = {check.name: check for check in attacks_of(with_assault(material, lucky))}
    assert not found["success grows with eps"].passed


def test_the_guard_of_a_study_is_looked_at_from_all_sides(material: Material) -> None:
    found = {check.name: check for check in check_guard(material, make_guard(material, 0), 0)}
    assert list(found) == [
        "null test",
        "JPEG grids",
        "harmless changes",
        "different images are no questions",
        "the score has a gradient",
    ]
    assert found["null test"].passed, found["null test"].says
    assert found["the score has a gradient"].passed, found["the score has a gradient"].says


def claims(knowing: float, bare: float) -> dict[str, Any]:
    """Return results of attackers at 4/255 by what gets through."""
    shares = {"worst": max(knowing, bare), "knowing": knowing, "bare": bare}
    told = {who: {"4": {"through": share}} for who, share in shares.items()}
    return {"adaptive": {"eps_255": [4], "n": 100, **told}}


@pytest.mark.parametrize(
    ("knowing", "bare", "passed"),
    [
        (0.3, 0.2, [True, True]),
        (0.2, 0.3, [False, True]),  # who knows the guard must not do worse than who does not
        (0.0, 0.0, [True, False]),  # nobody defends this well: the attack was weak
    ],
)
def test_what_is_claimed_against_attackers_has_to_be_plausible(
    knowing: float, bare: float, passed: list[bool]
) -> None:
    found = list(check_claims(claims(knowing, bare), accuracy=0.99))
    assert [check.passed for check in found] == passed


def test_without_attackers_nothing_is_claimed() -> None:
    assert list(check_claims({}, accuracy=0.95)) == []


def test_checks_of_one_name_are_numbered() -> None:
    named = ("twins", "apart", "twins", "twins")
    found = as_results([Check(name, i < 3, f"check {i}") for i, name in enumerate(named)])
    assert list(found) == ["twins", "apart", "twins #2", "twins #3"]
    assert found["twins #3"] == {"passed": False, "says": "check 3"}
