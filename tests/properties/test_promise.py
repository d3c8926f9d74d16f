"""The promise P(p <= a) <= a, and verdicts that follow suspicion and thresholds one way only."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from defense.calibration import Calibration
from defense.config import ModelSettings
from defense.errors import CalibrationError
from defense.policy import make_policy
from defense.types import Scored, Verdict

# Few distinct values, so that ties are common; they are what a careless rank gets wrong.
scores = st.one_of(
    st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=30),
    st.lists(st.floats(-1e300, 1e300), min_size=2, max_size=30),
)
rates = st.floats(0.001, 0.999)
SEVERITY = {Verdict.ACCEPT: 0, Verdict.FLAG: 1, Verdict.REJECT: 2}
CALIBRATION = Calibration(torch.arange(1000.0, dtype=torch.float64), torch.arange(1000) % 2)


def left_out(values: list[float], labels: list[int]) -> list[Scored]:
    """Take every value in turn for the request and all others for calibration.

    That each is the request with the same chance is what exchangeable means, so a share of these is
    a probability.
    """
    score, label = torch.tensor(values, dtype=torch.float64), torch.tensor(labels)
    found = []
    for index in range(len(values)):
        others = torch.arange(len(values)) != index
        calibration = Calibration(score[others], label[others])
        found.append(calibration.rank(score[index : index + 1], label[index : index + 1]))
    return found


@given(scores, rates)
def test_a_clean_request_falls_to_a_rate_with_at_most_that_probability(
    values: list[float], rate: float
) -> None:
    hits = sum(bool(s.p_value <= rate) for s in left_out(values, [0] * len(values)))
    assert hits <= math.floor(rate * len(values) + 1e-9)


@given(scores, rates, st.randoms(use_true_random=False))
def test_the_promise_holds_within_every_class(values: list[float], rate: float, draw: Any) -> None:
    labels = [draw.randrange(3) for _ in values]
    found = left_out(values, labels)
    for kind in set(labels):
        own = [s for s, label in zip(found, labels, strict=True) if label == kind]
        hits = sum(bool(s.class_p_value <= rate) for s in own)
        assert hits <= math.floor(rate * len(own) + 1e-9)


@given(st.sets(st.integers(-10_000, 10_000), min_size=2, max_size=40), rates)
def test_without_ties_the_promise_is_used_to_the_full(values: set[int], rate: float) -> None:
    hits = sum(
        bool(s.p_value <= rate) for s in left_out([float(v) for v in values], [0] * len(values))
    )
    assert hits >= math.floor(rate * len(values) - 1e-9)


@given(scores, st.integers(1, 60))
def test_a_threshold_hits_no_more_of_its_own_calibration_data_than_its_target(
    values: list[float], percent: int
) -> None:
    score = torch.tensor(values, dtype=torch.float64)
    calibration = Calibration(score, torch.zeros(len(values)).long())
    rate = percent / 100
    assume(len(values) >= 1 / rate)
    scored = calibration.rank(score, calibration.predicted)
    assert int((scored.p_value <= rate).sum()) <= rate * len(values) + 1e-9


@given(scores, scores)
def test_a_p_value_lies_between_one_in_n_plus_one_and_one_and_falls_with_the_score(
    values: list[float], requests: list[float]
) -> None:
    calibration = Calibration(
        torch.tensor(values, dtype=torch.float64), torch.zeros(len(values)).long()
    )
    ordered = torch.tensor(sorted(requests), dtype=torch.float64)
    scored = calibration.rank(ordered, torch.zeros(len(requests)).long())
    assert float(scored.p_value.amin()) >= 1 / (len(values) + 1)
    assert float(scored.p_value.amax()) <= 1
    assert bool((scored.p_value.diff() <= 0).all())
    assert torch.equal(scored.p_value, scored.class_p_value)


def both_looks(
    first: list[float], second: list[float], labels: list[int], below_p: float
) -> list[Scored]:
    """As `left_out`, with a second look at every request whose first p-value is at most `below_p`."""
    scores = torch.tensor([first, second], dtype=torch.float64)
    label, found = torch.tensor(labels), left_out(first, labels)
    for index, scored in enumerate(found):
        if float(scored.p_value) <= below_p:
            others = torch.arange(len(first)) != index
            looks = [Calibration(score[others], label[others]) for score in scores]
            again = looks[0].again(looks[1], below_p)
            request = slice(index, index + 1)
            found[index] = again.rank(scores[1, request], label[request])
    return found


few = st.integers(-3, 3).map(float)
pairs = st.lists(st.tuples(few, few, st.integers(0, 2)), min_size=2, max_size=30)


@given(pairs, rates, rates)
def test_the_promise_holds_for_both_looks_together(
    values: list[tuple[float, float, int]], rate: float, below_p: float
) -> None:
    first, second, labels = (list(column) for column in zip(*values, strict=True))
    found = both_looks(first, second, labels, below_p)
    hits = sum(bool(s.p_value <= rate) for s in found)
    assert hits <= math.floor(rate * len(values) + 1e-9)
    for kind in set(labels):
        own = [s for s, label in zip(found, labels, strict=True) if label == kind]
        hits = sum(bool(s.class_p_value <= rate) for s in own)
        assert hits <= math.floor(rate * len(own) + 1e-9)


@given(pairs, rates)
def test_a_second_look_never_takes_a_doubtful_request_above_what_made_it_doubtful(
    values: list[tuple[float, float, int]], below_p: float
) -> None:
    first, second, labels = (list(column) for column in zip(*values, strict=True))
    once = left_out(first, labels)
    for one, both in zip(once, both_looks(first, second, labels, below_p), strict=True):
        doubtful = float(one.p_value) <= below_p
        assert (float(both.p_value) <= below_p) == doubtful
        assert doubtful or torch.equal(one.p_value, both.p_value)


rules = st.one_of(
    st.floats(0.005, 0.9).map(lambda rate: {"target_fpr": rate}),
    st.floats(-10, 1010).map(lambda score: {"score": score}),
)


def decided(
    values: list[float], flag: Any, reject: Any, label: int = 0, mode: str = "enforce"
) -> list[int]:
    """Return how severe the verdicts on scores are."""
    settings = ModelSettings.model_validate({"mode": mode, "flag": flag, "reject": reject})
    policy = make_policy(settings, CALIBRATION, ("cat", "dog"))
    score = torch.tensor(values, dtype=torch.float64)
    labels = torch.full((len(values),), label)
    return [SEVERITY[v] for v in policy.decide(CALIBRATION.rank(score, labels))]


requests = st.lists(st.floats(-10, 1010), min_size=2, max_size=20)


@given(requests, rules, rules, rules, st.sampled_from(["enforce", "flag", "shadow"]))
def test_a_more_suspicious_request_never_fares_better(
    values: list[float],
    flag: dict[str, Any],
    reject: dict[str, Any],
    own: dict[str, Any],
    mode: str,
) -> None:
    special = reject | {"per_class": {"dog": own}}
    for label in (0, 1):
        severity = decided(sorted(values), flag, special, label, mode)
        assert severity == sorted(severity)


@given(requests, st.floats(0.005, 0.9), st.floats(0.005, 0.9), rules)
def test_a_higher_target_rate_never_lets_more_through(
    values: list[float], first: float, second: float, other: dict[str, Any]
) -> None:
    low, high = sorted((first, second))
    more, less = {"target_fpr": high}, {"target_fpr": low}
    for strict, loose in (
        (decided(values, more, other), decided(values, less, other)),
        (decided(values, other, more), decided(values, other, less)),
    ):
        assert all(a >= b for a, b in zip(strict, loose, strict=True))


@given(requests, st.floats(-10, 1010), st.floats(-10, 1010), rules)
def test_a_lower_score_threshold_never_lets_more_through(
    values: list[float], first: float, second: float, flag: dict[str, Any]
) -> None:
    low, high = sorted((first, second))
    strict, loose = (decided(values, flag, {"score": bound}) for bound in (low, high))
    assert all(a >= b for a, b in zip(strict, loose, strict=True))


@given(requests, rules, rules)
def test_only_enforcing_and_its_shadow_reject(
    values: list[float], flag: dict[str, Any], reject: dict[str, Any]
) -> None:
    enforced, shadow, flagged = (
        decided(values, flag, reject, mode=m) for m in ("enforce", "shadow", "flag")
    )
    assert shadow == enforced
    assert flagged == [min(severity, 1) for severity in enforced]


@given(st.integers(1, 3000), rates)
def test_an_accepted_target_can_be_met_and_a_refused_one_cannot(count: int, rate: float) -> None:
    """The smallest p-value is 1 / (n + 1); the check may ask for one image more than that takes."""
    score: Tensor = torch.arange(float(count))
    calibration = Calibration(score, torch.zeros(count).long())
    smallest = calibration.implied_fpr(float(count))
    try:
        calibration.check_target(rate)
    except CalibrationError:
        assert count < 1 / rate
    else:
        assert smallest <= rate
