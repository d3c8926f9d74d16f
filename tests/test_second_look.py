"""The witness and the second look at the gate: for doubtful requests, in time, and never in the way."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from defense.backbone import GatedBackbone
from defense.config import ModelSettings
from defense.errors import ArtifactError, GuardFailure
from defense.gate import Gate, Outcome
from defense.guard import AttachedGuard, Guard
from defense.looks import Extras
from defense.offline.collect import collect_inputs
from defense.types import Routed, Verdict
from tests.conftest import Counts, Digits
from tests.looks import ECHO, Disagreement, small_witness, with_extras
from tests.served import PngHandler, SmallNet, counted_forwards, hook_count, nan_image, png

BASE = {
    "mode": "flag",
    "flag": {"target_fpr": 0.05},
    "reject": {"target_fpr": 0.02},
    "second_look": {"below_p": 0.5, "budget_ms": 10_000},
}
CALIBRATED_ON, ROWS = 300, slice(400, 412)


@pytest.fixture(scope="module")
def seeing(guard: Guard, trained: SmallNet, digits: Digits) -> Guard:
    """A guard with a witness and an echo, calibrated for every look."""
    extras = Extras(small_witness(), ECHO)
    with GatedBackbone(trained, guard.router) as gated:
        runs = collect_inputs(trained, gated, digits.images[:CALIBRATED_ON], extras)
    return with_extras(guard, extras, runs)


@pytest.fixture
def payloads(digits: Digits) -> list[bytes]:
    return [png(image) for image in digits.images[ROWS]]


@dataclasses.dataclass(frozen=True)
class Service:
    """A handler behind the gate of an attached guard."""

    attached: AttachedGuard
    counts: Counts
    gate: Gate

    def pass_batch(self, payloads: list[bytes]) -> list[Outcome]:
        handler = PngHandler(self.attached.backbone.model)
        return self.gate.pass_batch(
            payloads, lambda rows: handler.answer([payloads[r] for r in rows])
        )

    def second_looks(self) -> tuple[float, ...]:
        """Return how many rows were taken, out of time and failed."""
        results = ("taken", "out_of_time", "failed")
        return tuple(self.counts.value("second_looks_total", result=r) for r in results)


Serve = Callable[..., Service]


@pytest.fixture
def serve(seeing: Guard, net: SmallNet, counts: Counts) -> Serve:
    def build(guard: Guard = seeing, **settings: object) -> Service:
        own = ModelSettings.model_validate(BASE | settings)
        attached = guard.attach(net, own)
        return Service(attached, counts, Gate(attached, own, counts.metrics))

    return build


def p_values(outcomes: list[Outcome]) -> list[float | None]:
    return [outcome.p_value for outcome in outcomes]


def by_hand(seeing: Guard, net: SmallNet, images: Tensor, first: str, second: str) -> list[float]:
    """Work the combined p-values out row by row, as they are defined."""
    with GatedBackbone(net, seeing.router) as gated:
        runs = collect_inputs(net, gated, images, seeing.extras)
    scores = {look: seeing.detector.score(runs.at(look)).tolist() for look in (first, second)}
    known = {look: seeing.calibrations[look].score.tolist() for look in (first, second)}
    n, found = CALIBRATED_ON, []

    def first_p(score: float) -> float:
        return float(1 + sum(c >= score for c in known[first])) / (n + 1)

    for one, two in zip(scores[first], scores[second], strict=True):
        p = first_p(one)
        if p <= 0.5:
            pairs = zip(known[first], known[second], strict=True)
            p = (1 + sum(first_p(a) <= 0.5 and b >= two for a, b in pairs)) / (n + 1)
        found.append(p)
    return found


@pytest.mark.parametrize(
    ("witness", "first", "second"),
    [
        ("always", "path+witness", "path+witness+echoes"),
        ("second_look", "path", "path+witness+echoes"),
        ("off", "path", "path+echoes"),
    ],
)
def test_doubtful_requests_are_ranked_by_both_looks_and_the_others_by_the_first(
    serve: Serve,
    seeing: Guard,
    net: SmallNet,
    digits: Digits,
    witness: str,
    first: str,
    second: str,
) -> None:
    images = digits.images[ROWS]
    expected = by_hand(seeing, net, images, first, second)
    service = serve(witness=witness)
    with GatedBackbone(net, seeing.router) as gated:
        complete = collect_inputs(net, gated, images, seeing.extras)
    judged = seeing.judge(complete, ModelSettings.model_validate(BASE | {"witness": witness}))
    assert judged.scored.p_value.tolist() == pytest.approx(expected)
    outcomes = service.pass_batch([png(image) for image in images])
    doubtful = sum(p <= 0.5 for p in expected)
    assert 0 < doubtful < len(images)
    assert p_values(outcomes) == pytest.approx(expected, abs=1.5 / (CALIBRATED_ON + 1))
    assert service.second_looks() == (doubtful, 0, 0)
    assert (judged.taken, judged.out_of_time, judged.failed) == (doubtful, 0, 0)
    with torch.inference_mode():
        guarded = service.attached(images)
    assert guarded.scored.p_value.tolist() == pytest.approx(expected, abs=1.5 / 301)


def test_the_score_of_an_outcome_stays_that_of_the_first_look(
    serve: Serve, payloads: list[bytes]
) -> None:
    with_budget = serve().pass_batch(payloads)
    without = serve(second_look={"below_p": 0.5, "budget_ms": 0}).pass_batch(payloads)
    assert [o.score for o in with_budget] == [o.score for o in without]
    assert p_values(with_budget) != p_values(without)


def test_a_batch_takes_one_forward_pass_and_one_more_for_its_doubtful_rows_alone(
    serve: Serve, net: SmallNet, payloads: list[bytes]
) -> None:
    service = serve()
    with counted_forwards(net) as forwards:
        outcomes = service.pass_batch(payloads)
    taken = int(service.second_looks()[0])
    assert forwards == [len(payloads), 3 * taken]
    assert [o.answer for o in outcomes] == PngHandler(net).answer(payloads)
    for stage in ("witness", "score", "second_look", "decide"):
        assert service.counts.value("guard_seconds_count", stage=stage) == 1


def test_a_batch_without_a_doubtful_row_takes_one_forward_pass(
    serve: Serve, net: SmallNet, payloads: list[bytes]
) -> None:
    service = serve(second_look={"below_p": 1e-6, "budget_ms": 10_000}, witness="off")
    with counted_forwards(net) as forwards:
        service.pass_batch(payloads)
    assert forwards == [len(payloads)]
    assert service.second_looks() == (0, 0, 0)
    for stage in ("witness", "second_look"):
        assert service.counts.value("guard_seconds_count", stage=stage) == 0


def test_where_time_is_short_the_most_doubtful_rows_are_looked_at_again(
    serve: Serve, payloads: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = serve(second_look={"below_p": 0.5, "budget_ms": 0})
    once = p_values(first.pass_batch(payloads))
    doubtful = sorted(p for p in once if p is not None and p <= 0.5)
    assert first.second_looks() == (0, len(doubtful), 0)
    service = serve()
    monkeypatch.setattr(service.attached.pace, "fitting", lambda _budget: 2)
    twice = p_values(service.pass_batch(payloads))
    changed = [a for a, b in zip(once, twice, strict=True) if a != b]
    assert set(changed) <= set(doubtful[:2])
    assert changed
    assert service.second_looks() == (2, 2 * len(doubtful) - 2, 0)


def test_a_guard_whose_detector_ignores_both_never_takes_a_second_look(
    serve: Serve, guard: Guard, net: SmallNet, payloads: list[bytes]
) -> None:
    plain = dataclasses.replace(guard, witness=small_witness(), echo=ECHO)
    service = serve(plain)
    with counted_forwards(net) as forwards:
        service.pass_batch(payloads)
    assert forwards == [len(payloads)]
    assert service.second_looks() == (0, 0, 0)
    assert service.counts.value("guard_seconds_count", stage="witness") == 0


@dataclasses.dataclass(frozen=True)
class Fragile(Disagreement):
    """Fails on echoes of bright images: by an exception, or by no number."""

    raises: bool = True
    above: float = 1e9

    def score(self, routed: Routed) -> Tensor:
        score = super().score(routed)
        bad = routed.path.double().square().mean(1) > self.above
        if routed.echoes is None or not bool(bad.any()):
            return score
        if self.raises:
            raise RuntimeError("no kernel image for secret")
        return score.masked_fill(bad, torch.nan)


@pytest.mark.parametrize("raises", [True, False])
def test_a_second_look_that_fails_keeps_the_first_p_value_of_that_row_alone(
    serve: Serve,
    seeing: Guard,
    net: SmallNet,
    digits: Digits,
    caplog: pytest.LogCaptureFixture,
    raises: bool,
) -> None:
    images = digits.images[ROWS]
    payloads = [png(image) for image in images]
    with GatedBackbone(net, seeing.router) as gated:
        energy = collect_inputs(net, gated, images).path.double().square().mean(1)
    once = p_values(serve(second_look={"below_p": 0.5, "budget_ms": 0}).pass_batch(payloads))
    whole = p_values(serve().pass_batch(payloads))
    doubtful = [row for row, p in enumerate(once) if p is not None and p <= 0.5]
    worst = max(doubtful, key=lambda row: float(energy[row]))
    above = float(energy[worst]) * (1 - 1e-6)
    service = serve(dataclasses.replace(seeing, detector=Fragile(raises=raises, above=above)))
    before = service.second_looks()
    with caplog.at_level(logging.WARNING):
        found = p_values(service.pass_batch(payloads))
    expected = [once[row] if row == worst else p for row, p in enumerate(whole)]
    assert found == pytest.approx(expected, abs=1.5 / 301)
    taken, _, failed = (b - a for a, b in zip(before, service.second_looks(), strict=True))
    assert (taken, failed) == (len(doubtful) - 1, 1)
    assert "secret" not in caplog.text
    assert "1 second looks failed" in caplog.text


def test_a_witness_that_fails_is_an_error_verdict_and_not_a_lost_batch(
    serve: Serve, payloads: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve()

    def fail(_self: object, _inputs: Tensor) -> Tensor:
        raise GuardFailure("witness", "no answer was had: OutOfMemoryError")

    monkeypatch.setattr(Extras, "ask_witness", fail)
    outcomes = service.pass_batch(payloads)
    assert {outcome.verdict for outcome in outcomes} == {Verdict.ERROR}
    assert [o.answer for o in outcomes] == PngHandler(service.attached.backbone.model).answer(
        payloads
    )
    assert service.counts.value("errors_total", stage="witness") == len(payloads)


def test_a_bad_request_beside_doubtful_ones_fails_alone(
    serve: Serve, payloads: list[bytes]
) -> None:
    service = serve()
    alone = service.pass_batch(payloads)
    mixed = service.pass_batch([b"garbage", *payloads[:5], nan_image(), *payloads[5:]])
    assert [o.invalid is None for o in mixed] == [False, *[True] * 5, False, *[True] * 7]
    again = [p for o, p in zip(mixed, p_values(mixed), strict=True) if o.invalid is None]
    assert again == pytest.approx(p_values(alone), abs=1.5 / 301)


def test_an_edit_of_the_settings_changes_the_looks_between_two_batches(
    serve: Serve, net: SmallNet, payloads: list[bytes]
) -> None:
    service = serve(witness="off")
    service.pass_batch(payloads)
    assert service.counts.value("guard_seconds_count", stage="witness") == 0
    service.gate.apply(ModelSettings.model_validate(BASE))
    service.pass_batch(payloads)
    assert service.counts.value("guard_seconds_count", stage="witness") == 1


def test_a_witness_that_does_not_suit_the_backbone_is_found_before_the_first_request(
    seeing: Guard, net: SmallNet
) -> None:
    odd = dataclasses.replace(small_witness(), scale=torch.ones(5, 1, 1))
    with pytest.raises(
        ArtifactError, match=r"does not fit .*: no answer was had: RuntimeError; fit"
    ):
        dataclasses.replace(seeing, witness=odd).attach(net, ModelSettings.model_validate(BASE))
    assert hook_count(net) == 0


def test_runs_that_carry_more_than_the_guard_ranks_are_scored_by_what_it_ranks(
    seeing: Guard, net: SmallNet, digits: Digits
) -> None:
    with GatedBackbone(net, seeing.router) as gated:
        runs = collect_inputs(net, gated, digits.images[ROWS], seeing.extras)
    path = dataclasses.replace(seeing, calibrations={"path": seeing.calibrations["path"]})
    assert torch.equal(path.score(runs).p_value, seeing.score(runs.at("path")).p_value)
    whole = dataclasses.replace(seeing, calibrations={runs.look: seeing.calibrations[runs.look]})
    with pytest.raises(GuardFailure, match="carry 'path' and the guard is not calibrated for that"):
        whole.score(runs.at("path"))
