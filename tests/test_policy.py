"""P-values become verdicts by the operator's rules, which are checked against the guard first."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from defense.calibration import Calibration
from defense.config import ModelSettings
from defense.errors import CalibrationError, ConfigError
from defense.policy import make_policy, target_fpr
from defense.types import Verdict

ACCEPT, FLAG, REJECT = Verdict.ACCEPT, Verdict.FLAG, Verdict.REJECT
CLASSES = ("cat", "dog")
CALIBRATION = Calibration(torch.arange(100.0), torch.arange(100) % 2)


def verdicts(
    scores: list[float], predicted: list[int] | None = None, **rules: Any
) -> list[Verdict]:
    """Return the verdicts on scores against a hundred clean ones, 0 to 99."""
    rules.setdefault("flag", {"target_fpr": 0.1})
    rules.setdefault("reject", {"target_fpr": 0.02})
    policy = make_policy(ModelSettings.model_validate(rules), CALIBRATION, CLASSES)
    labels = torch.tensor(predicted or [0] * len(scores))
    return policy.decide(CALIBRATION.rank(torch.tensor(scores), labels))


def test_a_request_is_flagged_or_rejected_from_its_target_rate_on() -> None:
    # p = (1 + number of scores at or above) / 101: 0.109, 0.099, 0.0297, 0.0198.
    assert verdicts([90, 90.5, 97.5, 98.5]) == [ACCEPT, FLAG, FLAG, REJECT]


def test_a_p_value_at_the_target_rate_itself_is_hit() -> None:
    exact = 2 / 101
    assert verdicts([98.5, 97.5], reject={"target_fpr": exact}) == [REJECT, FLAG]


@pytest.mark.parametrize(
    ("mode", "verdict"), [("enforce", REJECT), ("flag", FLAG), ("shadow", REJECT)]
)
def test_a_rejection_stays_one_in_shadow_and_becomes_a_flag_in_flag_mode(
    mode: str, verdict: Verdict
) -> None:
    assert verdicts([1e6], mode=mode) == [verdict]


def test_a_raw_score_is_a_threshold_of_its_own() -> None:
    rules: dict[str, Any] = {"flag": {"score": 10}, "reject": {"score": 20.5}}
    assert verdicts([9.9, 10, 20.4, 20.5], **rules) == [ACCEPT, FLAG, FLAG, REJECT]


def test_a_class_with_a_rule_of_its_own_is_judged_by_its_own_p_values() -> None:
    """Dogs score 0 to 49 and cats 50 to 99: 60 is usual among all, and never seen of a dog."""
    calibration = Calibration(torch.arange(100.0), (torch.arange(100) < 50).long())
    own = {
        "target_fpr": 0.02,
        "per_class": {"dog": {"target_fpr": 0.05}, "cat": {"target_fpr": 0.05}},
    }
    settings = ModelSettings.model_validate({"flag": {"target_fpr": 0.02}, "reject": own})
    policy = make_policy(settings, calibration, CLASSES)
    scored = calibration.rank(torch.tensor([60.0, 60.0]), torch.tensor([0, 1]))
    assert policy.decide(scored) == [ACCEPT, REJECT]


def test_a_class_with_a_rule_of_its_own_is_exempt_from_the_general_one() -> None:
    never = {"score": 1e9}
    rules = {
        "flag": {"target_fpr": 0.1, "per_class": {"1": never}},
        "reject": {"target_fpr": 0.02, "per_class": {"1": never}},
    }
    assert verdicts([99.5, 99.5], [0, 1], **rules) == [REJECT, ACCEPT]


def test_a_class_is_named_by_its_name_before_its_number() -> None:
    settings = ModelSettings.model_validate(
        {"flag": {"score": 1, "per_class": {"1": {"score": 5}}}}
    )
    calibration = Calibration(torch.arange(1000.0), torch.zeros(1000).long())
    assert list(make_policy(settings, calibration, ("1", "0")).flag.per_class) == [0]
    assert list(make_policy(settings, calibration, CLASSES).flag.per_class) == [1]


@pytest.mark.parametrize("name", ["dogg", "2", "-1"])
def test_a_class_that_the_guard_lacks_is_an_error(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"flag\.per_class names the class '{name}', which the guard lacks; "
    ):
        verdicts([1], flag={"target_fpr": 0.1, "per_class": {name: {"score": 1}}})


@pytest.mark.parametrize("tier", ["flag", "reject"])
def test_a_rate_that_calibration_cannot_promise_is_an_error(tier: str) -> None:
    rules: dict[str, Any] = {tier: {"target_fpr": 0.001}}
    with pytest.raises(
        CalibrationError, match=r"of 0\.001 needs at least 1000 .* the guard has 100"
    ):
        verdicts([1], **rules)


def test_a_class_rate_that_calibration_cannot_promise_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="predicted as class 1; the guard has 50"):
        verdicts([1], flag={"target_fpr": 0.1, "per_class": {"dog": {"target_fpr": 0.01}}})


def test_the_published_target_of_a_raw_score_is_the_rate_that_it_stands_for() -> None:
    settings = ModelSettings.model_validate(
        {"flag": {"score": 90.5}, "reject": {"target_fpr": 0.02}}
    )
    policy = make_policy(settings, CALIBRATION, CLASSES)
    assert target_fpr(policy.flag, CALIBRATION) == 10 / 101
    assert target_fpr(policy.reject, CALIBRATION) == 0.02
