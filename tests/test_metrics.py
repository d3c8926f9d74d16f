"""Every series exists at zero from the start, and every request is counted once."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
from prometheus_client import CollectorRegistry

from defense.metrics import (
    FAILURES,
    MODES,
    P_BUCKETS,
    SECOND_LOOKS,
    STAGES,
    ModelMetrics,
    make_instruments,
)
from defense.payload import InvalidReason
from defense.types import Verdict
from tests.conftest import Counts


@dataclass(frozen=True)
class One:
    """A request as far as metrics look at it."""

    verdict: Verdict | None = None
    invalid: InvalidReason | None = None
    failure: Exception | None = None
    p_value: float | None = None
    probing: bool = False


def test_every_verdict_reason_stage_and_result_exists_at_zero(counts: Counts) -> None:
    for verdict in Verdict:
        assert counts.value("requests_total", version="1.0", verdict=verdict.value) == 0
    for reason in InvalidReason:
        assert counts.value("invalid_inputs_total", reason=reason.value) == 0
    for stage in FAILURES:
        assert counts.value("errors_total", stage=stage) == 0
    for stage in STAGES:
        assert counts.value("guard_seconds_count", stage=stage) == 0
    for result in SECOND_LOOKS:
        assert counts.value("second_looks_total", result=result) == 0
    assert counts.value("p_value_count") == 0
    assert counts.value("last_scored_timestamp_seconds") == 0
    for result in ("applied", "invalid"):
        name = "pathguard_config_reloads_total"
        assert counts.registry.get_sample_value(name, {"result": result}) == 0


def test_a_batch_is_counted_by_what_became_of_each_request(counts: Counts) -> None:
    counts.metrics.count(
        [
            One(Verdict.ACCEPT, p_value=0.4),
            One(Verdict.ACCEPT, p_value=0.6),
            One(Verdict.REJECT, p_value=0.0005),
            One(Verdict.ERROR),
            One(invalid=InvalidReason.EMPTY),
            One(failure=ValueError()),
        ]
    )
    assert counts.verdicts() == {"accept": 2, "reject": 1, "error": 1}
    assert counts.value("invalid_inputs_total", reason="empty") == 1
    assert counts.value("errors_total", stage="handler") == 1
    assert counts.value("p_value_count") == 3


def test_p_values_fall_into_logarithmic_buckets(counts: Counts) -> None:
    counts.metrics.count([One(Verdict.ACCEPT, p_value=p) for p in (1e-5, 2e-4, 0.15, 1.0)])
    assert P_BUCKETS[0] == 1e-5
    assert P_BUCKETS[-1] == 1.0
    found = {le: counts.value("p_value_bucket", le=le) for le in ("1e-05", "0.0003", "0.2", "1.0")}
    assert found == {"1e-05": 1, "0.0003": 2, "0.2": 3, "1.0": 4}


def test_the_last_scored_time_moves_with_scored_requests_alone(counts: Counts) -> None:
    counts.metrics.count([One(invalid=InvalidReason.EMPTY)])
    assert counts.value("last_scored_timestamp_seconds") == 0
    before = time.time()
    counts.metrics.count([One(Verdict.ACCEPT)])
    assert before <= counts.value("last_scored_timestamp_seconds") <= time.time()


def test_a_stage_is_timed_also_where_it_fails(counts: Counts) -> None:
    with pytest.raises(KeyError), counts.metrics.timed("score"):
        raise KeyError
    assert counts.value("guard_seconds_count", stage="score") == 1
    assert counts.value("guard_seconds_count", stage="decide") == 0


def test_a_failure_of_the_guard_is_counted_once_per_request(counts: Counts) -> None:
    counts.metrics.error("capture", 3)
    counts.metrics.error("exporter")
    assert counts.value("errors_total", stage="capture") == 3
    assert counts.value("errors_total", stage="exporter") == 1


def test_second_looks_are_counted_by_what_became_of_them(counts: Counts) -> None:
    counts.metrics.second_looks("taken", 3)
    counts.metrics.second_looks("failed", 1)
    found = [counts.value("second_looks_total", result=result) for result in SECOND_LOOKS]
    assert found == [3, 0, 1]


def test_exactly_one_mode_is_in_force(counts: Counts) -> None:
    for mode in MODES:
        counts.metrics.mode(mode)
        assert [name for name in MODES if counts.value("mode", mode=name)] == [mode]


def test_targets_and_the_guard_at_work_are_published(counts: Counts) -> None:
    counts.metrics.target_fpr("flag", 0.01)
    counts.metrics.describe(
        router="activation", detector="density", fingerprint="0123456789abcdef99"
    )
    assert counts.value("target_fpr", tier="flag") == 0.01
    labels = {"router": "activation", "detector": "density", "fingerprint": "0123456789abcdef"}
    assert counts.value("guard_info", **labels) == 1


def test_two_models_in_one_process_are_counted_apart() -> None:
    registry = CollectorRegistry()
    instruments = make_instruments(registry)
    first, second = (ModelMetrics(instruments, model=m, version="1") for m in ("a", "b"))
    first.count([One(Verdict.FLAG)])
    second.count([One(Verdict.FLAG), One(Verdict.FLAG)])
    for model, count in (("a", 1), ("b", 2)):
        labels = {"model": model, "version": "1", "verdict": "flag"}
        assert registry.get_sample_value("pathguard_requests_total", labels) == count


def test_no_series_is_named_by_a_request(counts: Counts) -> None:
    names = {label for f in counts.registry.collect() for s in f.samples for label in s.labels}
    allowed = {
        "model",
        "version",
        "verdict",
        "stage",
        "reason",
        "tier",
        "router",
        "detector",
        "kind",
    }
    assert names <= allowed | {"fingerprint", "result", "mode", "le"}


def test_whether_the_configuration_file_is_in_force_is_a_state(counts: Counts) -> None:
    counts.metrics.config_valid(True)
    counts.metrics.config_reload("invalid")
    assert counts.value("config_valid") == 0
    counts.metrics.config_reload("applied")
    assert counts.value("config_valid") == 1
    name = "pathguard_config_reloads_total"
    found = [counts.registry.get_sample_value(name, {"result": r}) for r in ("applied", "invalid")]
    assert found == [1, 1]
