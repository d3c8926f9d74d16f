"""Our detectors take part as they are served, and who fits clean images sees no attack."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from defense.errors import DataError
from defense.offline.benchmark.contestants import (
    Contestant,
    TwoLooks,
    contestants,
    looks_of,
    two_looks,
)
from defense.offline.benchmark.metrics import p_values
from defense.offline.benchmark.peers import PEERS, Sample
from defense.offline.benchmark.splits import make_split
from defense.offline.benchmark.trials import Material, joined
from defense.offline.benchmark.whitebox import make_guard
from defense.types import Routed

ENTRANTS = {entrant.name: entrant for entrant in contestants()}
BLIND = ["pathguard clean", "path alone clean", "density", "overlap", "energy", "mahalanobis_sum"]


@pytest.fixture(scope="module")
def requests(material: Material) -> Sample:
    """Clean test images and attacked ones."""
    split = make_split(material.pools, 0)
    attacked = [assault.of(split.test).sample for assault in material.open.assaults.values()]
    return joined([material.clean.take(split.test), *attacked])


@pytest.fixture(scope="module")
def score(material: Material) -> TwoLooks:
    found = two_looks(material.trial(make_split(material.pools, 0), 0), "attacks")
    assert isinstance(found, TwoLooks)
    return found


def test_doubtful_requests_rank_above_all_others(score: TwoLooks, requests: Sample) -> None:
    doubtful, found = score.doubtful(requests), score(requests)
    assert 0 < int(doubtful.sum()) < len(requests)
    assert found[doubtful].min() > found[~doubtful].max()


def test_doubtful_requests_rank_by_their_second_look_and_others_by_their_first(
    score: TwoLooks, requests: Sample
) -> None:
    doubtful, found = score.doubtful(requests), score(requests)
    second, first = score.second(requests)[doubtful], score.first(requests)[~doubtful]
    assert torch.equal(found[doubtful].argsort(stable=True), second.argsort(stable=True))
    assert not torch.equal(second.argsort(), score.first(requests)[doubtful].argsort())
    assert torch.equal(found[~doubtful], first)


def test_the_order_is_that_of_the_p_values_which_a_server_gives(
    material: Material, score: TwoLooks, requests: Sample
) -> None:
    calibration = material.clean.take(make_split(material.pools, 0).calibration)
    judged = make_guard(material, 0).judge(requests.routed)
    ours = p_values(score(calibration), score(requests))
    assert torch.equal(ours, judged.scored.p_value)
    assert judged.taken == int(score.doubtful(requests).sum())


def test_names_are_unique_and_ours_come_first() -> None:
    every = list(contestants())
    assert len(ENTRANTS) == len(every) == len(PEERS) + 11
    assert every[0].name == "pathguard"
    assert {entrant.kind for entrant in every} == {"ours", "peer", "baseline", "control"}
    assert {name for name, entrant in ENTRANTS.items() if entrant.slow} >= {"cdrp"}


@pytest.mark.parametrize("entrant", [ENTRANTS[name] for name in BLIND], ids=BLIND)
def test_who_fits_clean_images_alone_sees_no_attack(
    material: Material, requests: Sample, entrant: Contestant
) -> None:
    assert entrant.fit == "clean"
    trial = material.trial(make_split(material.pools, 0), 0)
    with_attacks, without = (
        entrant.learn(given)(requests) for given in (trial, replace(trial, attacked=None))
    )
    assert torch.equal(with_attacks, without)


def test_the_default_detector_learns_from_attacks(
    material: Material, score: TwoLooks, requests: Sample
) -> None:
    trial = material.trial(make_split(material.pools, 0), 0)
    without = two_looks(replace(trial, attacked=None), "attacks")
    assert not torch.equal(score(requests), without(requests))


def test_without_an_echo_there_is_one_look(material: Material) -> None:
    trial = material.trial(make_split(material.pools, 0), 0)
    views, fit, shifted, calibration = (
        Sample(part.pixels, part.routed.at("path+witness"))
        for part in (trial.views, trial.fit, trial.shifted, trial.calibration)
    )
    plain = replace(trial, views=views, fit=fit, shifted=shifted, calibration=calibration)
    assert looks_of(plain.fit.routed) == ("path+witness", "path+witness")
    assert not isinstance(two_looks(plain, "clean"), TwoLooks)


def test_the_witness_alone_scores_by_how_little_it_believes_the_answer(material: Material) -> None:
    entrant = ENTRANTS["witness alone"]
    trial = material.trial(make_split(material.pools, 0), 0)
    logits = torch.tensor([[3.0, 0.0, 1.0], [3.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    said = torch.tensor([[0.0, 0.0, 0.0], [-5.0, 5.0, 0.0], [0.0, 1.0, 9.0]])
    sample = Sample(torch.zeros(3, 3, 2, 2), Routed(logits, torch.zeros(3, 1), said))
    believed = said.softmax(1)[torch.arange(3), torch.tensor([0, 0, 2])]
    torch.testing.assert_close(entrant.learn(trial)(sample), -believed.double().log())
    assert entrant.needs == "path+witness"
    blind = Sample(sample.pixels, sample.routed.at("path"))
    with pytest.raises(DataError, match="these runs carry no witness; name its card"):
        entrant.learn(trial)(blind)
