"""The gate: one forward pass per batch, one outcome and one count per request, whatever is in it."""

from __future__ import annotations

import base64
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from defense.backbone import GatedBackbone
from defense.config import ModelSettings
from defense.detectors import Detector
from defense.errors import ArtifactError, CalibrationError, ConfigError
from defense.gate import Gate, Outcome
from defense.guard import Guard
from defense.payload import InvalidReason
from defense.types import Routed, Verdict
from tests.conftest import Counts
from tests.served import (
    PngHandler,
    SmallNet,
    counted_forwards,
    hook_count,
    images_like_noise,
    nan_image,
    png,
)

ACCEPT, FLAG, REJECT, ERROR = Verdict.ACCEPT, Verdict.FLAG, Verdict.REJECT, Verdict.ERROR
Clean = Callable[[int], Tensor]


@dataclass(frozen=True)
class Service:
    """A handler behind its gate."""

    handler: PngHandler
    gate: Gate
    counts: Counts

    def pass_batch(self, payloads: Sequence[object]) -> list[Outcome]:
        return self.gate.pass_batch(
            payloads, lambda rows: self.handler.answer([payloads[row] for row in rows])
        )

    def invalid_counts(self) -> dict[str, float]:
        found = {
            r.value: self.counts.value("invalid_inputs_total", reason=r.value)
            for r in InvalidReason
        }
        return {reason: count for reason, count in found.items() if count}


@pytest.fixture
def serve(guard: Guard, net: SmallNet, counts: Counts) -> Callable[..., Service]:
    """Return a function that puts a handler (by its class) behind a gate with some settings."""

    def build(
        kind: type[PngHandler] = PngHandler, *, detector: Detector | None = None, **settings: Any
    ) -> Service:
        limits = {"formats": ["PNG", "TIFF"]} | settings.get("limits", {})  # a NaN needs a TIFF
        own = ModelSettings.model_validate(settings | {"limits": limits})
        used = guard if detector is None else dataclasses.replace(guard, detector=detector)
        return Service(kind(net), Gate(used.attach(net, own), own, counts.metrics), counts)

    return build


@pytest.fixture
def noise() -> bytes:
    """A request that is nothing like a digit."""
    return png(images_like_noise(1, 5)[0])


def verdicts(outcomes: Sequence[Outcome]) -> list[Verdict | None]:
    return [outcome.verdict for outcome in outcomes]


def test_clean_requests_get_the_handlers_own_answers_from_one_forward_pass(
    serve: Callable[..., Service], net: SmallNet, clean: Clean
) -> None:
    payloads = [png(image) for image in clean(4)]
    expected = PngHandler(net).answer(payloads)
    service = serve()
    with counted_forwards(net) as forwards:
        outcomes = service.pass_batch(payloads)
    assert [outcome.answer for outcome in outcomes] == expected
    assert verdicts(outcomes) == [ACCEPT] * 4
    assert forwards == [4]
    assert service.counts.verdicts() == {"accept": 4}


def test_a_mixed_batch_gets_the_right_outcomes_from_exactly_one_forward_pass(
    serve: Callable[..., Service], net: SmallNet, clean: Clean, noise: bytes
) -> None:
    first, second = (png(image) for image in clean(2))
    payloads = [
        first,
        b"garbage",
        nan_image(),
        png(torch.zeros(1, 40, 40)),
        first[:50],
        noise,
        second,
        b"",
    ]
    service = serve(limits={"max_pixels": 400})
    with counted_forwards(net) as forwards:
        outcomes = service.pass_batch(payloads)
    assert [outcome.verdict or outcome.invalid for outcome in outcomes] == [
        ACCEPT,
        InvalidReason.NOT_AN_IMAGE,
        InvalidReason.NOT_FINITE,
        InvalidReason.TOO_MANY_PIXELS,
        InvalidReason.TRUNCATED_IMAGE,
        REJECT,
        ACCEPT,
        InvalidReason.EMPTY,
    ]
    assert forwards == [3]
    assert [o.answer for o in outcomes if o.invalid] == [None] * 5
    assert [o.answer for o in outcomes if o.verdict] == service.handler.answer(
        [first, noise, second]
    )


def test_every_request_of_a_mixed_batch_is_counted_once(
    serve: Callable[..., Service], clean: Clean, noise: bytes
) -> None:
    service = serve(limits={"max_bytes": 1000})
    service.pass_batch([png(clean(1)[0]), b"garbage", nan_image(), b"x" * 1001, noise, b"garbage"])
    assert service.counts.verdicts() == {"accept": 1, "reject": 1}
    assert service.invalid_counts() == {"not_an_image": 2, "not_finite": 1, "too_many_bytes": 1}
    assert service.counts.value("p_value_count") == 2
    assert service.counts.value("errors_total", stage="handler") == 0


def test_a_nan_among_readable_requests_fails_alone(
    serve: Callable[..., Service], net: SmallNet, clean: Clean
) -> None:
    first, second = (png(image) for image in clean(2))
    payloads = [first, nan_image(), second]
    service = serve()
    with counted_forwards(net) as forwards:
        outcomes = service.pass_batch(payloads)
    assert verdicts(outcomes) == [ACCEPT, None, ACCEPT]
    assert (outcomes[1].invalid, outcomes[1].answer) == (InvalidReason.NOT_FINITE, None)
    assert forwards == [3]
    assert [outcomes[0].answer, outcomes[2].answer] == service.handler.answer(payloads)[::2]


def test_a_batch_of_nothing_but_bad_requests_runs_no_forward_pass(
    serve: Callable[..., Service], net: SmallNet
) -> None:
    service = serve()
    with counted_forwards(net) as forwards:
        outcomes = service.pass_batch([b"garbage", b"", b"\x89PNG\r\n\x1a\n"])
    assert {outcome.verdict for outcome in outcomes} == {None}
    assert None not in {outcome.invalid for outcome in outcomes}
    assert forwards == []


@pytest.mark.parametrize("neighbours", [0, 2])
def test_a_wrong_shape_is_invalid_alone_and_among_others(
    serve: Callable[..., Service], clean: Clean, neighbours: int
) -> None:
    payloads = [png(torch.zeros(1, 9, 8)), *(png(image) for image in clean(neighbours))]
    outcomes = serve().pass_batch(payloads)
    assert outcomes[0].invalid is InvalidReason.WRONG_SHAPE
    assert verdicts(outcomes[1:]) == [ACCEPT] * neighbours


def test_an_empty_batch_has_no_outcomes(serve: Callable[..., Service]) -> None:
    class Empty(PngHandler):
        def answer(self, payloads: Sequence[object]) -> list[object]:
            raise AssertionError("nothing to answer")

    assert serve(Empty).pass_batch([]) == []


def test_flag_mode_answers_suspicious_requests_and_says_so(
    serve: Callable[..., Service], clean: Clean, noise: bytes
) -> None:
    service = serve(mode="flag")
    payloads = [noise, png(clean(1)[0])]
    outcomes = service.pass_batch(payloads)
    assert verdicts(outcomes) == [FLAG, ACCEPT]
    assert [outcome.answer for outcome in outcomes] == service.handler.answer(payloads)
    assert service.counts.verdicts() == {"flag": 1, "accept": 1}


def test_an_outcome_carries_its_score_and_p_value(
    serve: Callable[..., Service], noise: bytes
) -> None:
    service = serve()
    (outcome,) = service.pass_batch([noise])
    assert outcome.p_value == 1 / 1049
    assert outcome.score is not None
    assert outcome.score > 0


def test_off_hands_everything_through_and_counts_nothing(
    serve: Callable[..., Service], net: SmallNet, noise: bytes
) -> None:
    service = serve(mode="off")
    assert service.pass_batch([noise]) == [Outcome(answer=service.handler.answer([noise])[0])]
    assert service.counts.verdicts() == {}
    assert service.counts.value("guard_seconds_count", stage="score") == 0


def test_shadow_counts_what_enforcing_would_do_and_answers_all_the_same(
    serve: Callable[..., Service], clean: Clean, noise: bytes
) -> None:
    payloads = [noise, png(clean(1)[0]), nan_image()]
    service = serve(mode="shadow", limits={"max_bytes": 10})
    outcomes = service.pass_batch(payloads)
    assert repr([o.answer for o in outcomes]) == repr(service.handler.answer(payloads))
    assert [outcome.invalid for outcome in outcomes] == [None] * 3
    assert service.counts.verdicts() == {"reject": 1, "accept": 1}
    assert service.invalid_counts() == {"not_finite": 1}


@pytest.mark.parametrize("mode", ["off", "shadow"])
def test_off_and_shadow_let_the_handlers_own_error_through(
    serve: Callable[..., Service], clean: Clean, mode: str
) -> None:
    service = serve(mode=mode)
    with pytest.raises(OSError, match="cannot identify image file"):
        service.pass_batch([png(clean(1)[0]), b"garbage"])
    assert service.counts.verdicts() == {}
    assert service.invalid_counts() == {}


@dataclass(frozen=True)
class Moody:
    """A detector that knows black images alone, which `attach` tries it with.

    Of every other row it gives a bad number, or it raises where that is None. black: (1, D).
    """

    name: ClassVar[str] = "moody"

    black: Tensor
    value: float | None

    def score(self, routed: Routed) -> Tensor:
        other = ~torch.isclose(routed.path, self.black).all(dim=1)
        if self.value is None and bool(other.any()):
            raise RuntimeError("CUDA error")
        return torch.zeros(len(routed)).masked_fill(other, self.value or 0.0).double()


@pytest.fixture
def black(guard: Guard, trained: SmallNet) -> Tensor:
    """The path of a black image."""
    with GatedBackbone(trained, guard.router) as gated:
        return gated.run(torch.zeros(1, 1, 8, 8)).path


@pytest.mark.parametrize("value", [torch.nan, torch.inf, None])
def test_a_detector_that_fails_is_an_error_verdict_with_the_answer_and_is_counted(
    serve: Callable[..., Service],
    net: SmallNet,
    clean: Clean,
    black: Tensor,
    value: float | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    payloads = [png(image) for image in clean(3)]
    service = serve(detector=Moody(black, value))
    with counted_forwards(net) as forwards, caplog.at_level(logging.ERROR, logger="defense.gate"):
        outcomes = service.pass_batch(payloads)
    assert forwards == [3]
    assert verdicts(outcomes) == [ERROR] * 3
    assert [outcome.answer for outcome in outcomes] == service.handler.answer(payloads)
    assert service.counts.verdicts() == {"error": 3}
    assert service.counts.value("errors_total", stage="score") == 3
    assert "guard failed at stage score" in caplog.text


@pytest.mark.parametrize("value", [torch.nan, None])
def test_a_request_on_which_the_detector_fails_does_not_take_its_neighbours_along(
    serve: Callable[..., Service], black: Tensor, value: float | None
) -> None:
    bright, dark = png(torch.ones(1, 8, 8)), png(torch.zeros(1, 8, 8))
    service = serve(detector=Moody(black, value))
    assert verdicts(service.pass_batch([dark, bright, dark])) == [ACCEPT, ERROR, ACCEPT]
    assert service.counts.verdicts() == {"accept": 2, "error": 1}
    assert service.counts.value("errors_total", stage="score") == 1


@dataclass(frozen=True)
class Hanging:
    """A detector that hangs on a batch of two until it is released."""

    name: ClassVar[str] = "hanging"

    released: threading.Event

    def score(self, routed: Routed) -> Tensor:
        if len(routed) == 2:
            self.released.wait(60)
        return torch.zeros(len(routed)).double()


def test_a_detector_that_hangs_is_an_error_verdict_in_time_and_holds_nothing_up(
    serve: Callable[..., Service], clean: Clean
) -> None:
    payloads = [png(image) for image in clean(3)]
    released = threading.Event()
    service = serve(detector=Hanging(released), score_budget_ms=50)
    try:
        hung, after = service.pass_batch(payloads[:2]), service.pass_batch(payloads)
        assert not released.is_set()
    finally:
        released.set()
    assert verdicts(hung) == [ERROR] * 2
    assert [outcome.answer for outcome in hung] == service.handler.answer(payloads[:2])
    assert ERROR not in verdicts(after)
    assert service.counts.value("errors_total", stage="timeout") == 2
    assert service.counts.value("errors_total", stage="score") == 0


class Twice(PngHandler):
    """Runs its backbone again on the same batch."""

    def infer(self, batch: Tensor) -> Tensor:
        super().infer(batch)
        return super().infer(batch)


class Remembering(PngHandler):
    """Answers from memory."""

    def infer(self, batch: Tensor) -> Tensor:
        return torch.zeros(len(batch), 10)


class Elsewhere(PngHandler):
    """Runs its backbone in another thread, where no recording sees it."""

    def infer(self, batch: Tensor) -> Tensor:
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(PngHandler.infer(self, batch)))
        thread.start()
        thread.join()
        return found[0]


class Augmenting(PngHandler):
    """Runs every image and its mirror image, and answers with their mean."""

    def infer(self, batch: Tensor) -> Tensor:
        both = super().infer(torch.cat([batch, batch.flip(-1)]))
        return (both[: len(batch)] + both[len(batch) :]) / 2


@pytest.mark.parametrize(
    ("kind", "stage", "sentence"),
    [
        (Twice, "rows", "the backbone ran 4 rows for 2 requests"),
        (Remembering, "capture", "the handler ran the backbone 0 times for one batch; expected 1"),
        (Elsewhere, "capture", "the handler ran the backbone 0 times for one batch; expected 1"),
        (Augmenting, "rows", "the backbone ran 4 rows for 2 requests"),
    ],
)
def test_a_run_that_cannot_be_scored_is_an_error_verdict_and_never_silence(
    serve: Callable[..., Service],
    clean: Clean,
    kind: type[PngHandler],
    stage: str,
    sentence: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    payloads = [png(image) for image in clean(2)]
    service = serve(kind)
    with caplog.at_level(logging.ERROR, logger="defense.gate"):
        outcomes = service.pass_batch(payloads)
    assert verdicts(outcomes) == [ERROR] * 2
    assert [outcome.answer for outcome in outcomes] == service.handler.answer(payloads)
    assert service.counts.verdicts() == {"error": 2}
    assert service.counts.value("errors_total", stage=stage) == 2
    assert sentence in caplog.text


class OneAtATime(PngHandler):
    """Fails on more than one request."""

    def answer(self, payloads: Sequence[object]) -> list[object]:
        if len(payloads) > 1:
            raise RuntimeError("batches are not supported")
        return super().answer(payloads)


def test_a_handler_that_fails_on_batches_is_asked_one_by_one(
    serve: Callable[..., Service], net: SmallNet, clean: Clean, noise: bytes
) -> None:
    service = serve(OneAtATime)
    with counted_forwards(net) as forwards:
        outcomes = service.pass_batch([png(clean(1)[0]), noise, b"garbage"])
    assert verdicts(outcomes) == [ACCEPT, REJECT, None]
    assert outcomes[2].invalid is InvalidReason.NOT_AN_IMAGE
    assert forwards == [1, 1]
    assert service.counts.verdicts() == {"accept": 1, "reject": 1}


class NoZeros(PngHandler):
    """Fails while it writes the answer to a black image."""

    def infer(self, batch: Tensor) -> Tensor:
        return torch.where(batch.flatten(1).any(1, keepdim=True), super().infer(batch), torch.nan)

    def postprocess(self, logits: Tensor) -> list[object]:
        return [{"percent": int(100 * row.max())} for row in logits]


def test_a_request_that_postprocessing_fails_on_fails_alone(
    serve: Callable[..., Service], clean: Clean
) -> None:
    first, second = (png(image) for image in clean(2))
    service = serve(NoZeros)
    outcomes = service.pass_batch([first, png(torch.zeros(1, 8, 8)), second])
    assert verdicts(outcomes) == [ACCEPT, None, ACCEPT]
    assert isinstance(outcomes[1].failure, ValueError)
    assert (outcomes[1].answer, outcomes[1].invalid) == (None, None)
    assert service.counts.verdicts() == {"accept": 2}
    assert service.counts.value("errors_total", stage="handler") == 1


class Dropping(PngHandler):
    """Leaves out what it has no answer for."""

    def postprocess(self, logits: Tensor) -> list[object]:
        return super().postprocess(logits)[:-1]


class Generating(PngHandler):
    """Returns something else than a list."""

    def answer(self, payloads: Sequence[object]) -> list[object]:
        return tuple(super().answer(payloads))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", [Dropping, Generating])
def test_a_handler_without_one_answer_per_request_fails_with_a_sentence(
    serve: Callable[..., Service], clean: Clean, kind: type[PngHandler]
) -> None:
    service = serve(kind)
    outcomes = service.pass_batch([png(image) for image in clean(2)])
    for outcome in outcomes:
        with pytest.raises(ValueError, match="did not return one answer per request"):
            raise outcome.failure or AssertionError
    assert service.counts.verdicts() == {}
    assert service.counts.value("errors_total", stage="handler") == 2


class ByKeyword(PngHandler):
    """Calls its backbone with a named argument, so that nobody sees the input."""

    def infer(self, batch: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.backbone(x=batch)
        return logits


def test_a_handler_that_calls_its_backbone_by_keyword_is_guarded_too(
    serve: Callable[..., Service], net: SmallNet, clean: Clean, noise: bytes
) -> None:
    service = serve(ByKeyword)
    with counted_forwards(net) as forwards:
        outcomes = service.pass_batch([png(clean(1)[0]), b"garbage", nan_image(), noise])
    assert verdicts(outcomes) == [ACCEPT, None, None, REJECT]
    assert [o.invalid for o in outcomes[1:3]] == [
        InvalidReason.NOT_AN_IMAGE,
        InvalidReason.NOT_FINITE,
    ]
    assert forwards == [3]


class Interrupted(PngHandler):
    def postprocess(self, logits: Tensor) -> list[object]:
        raise KeyboardInterrupt


def test_an_interrupt_comes_through_and_the_next_batch_is_scored(
    serve: Callable[..., Service], clean: Clean
) -> None:
    service = serve()
    payloads = [png(clean(1)[0])]
    with pytest.raises(KeyboardInterrupt):
        service.gate.pass_batch(
            payloads, lambda rows: Interrupted(service.handler.backbone).answer(payloads)
        )
    assert verdicts(service.pass_batch(payloads)) == [ACCEPT]


class Json(PngHandler):
    """Reads base64 texts, and lists of numbers as they are."""

    def decode(self, payload: object) -> Tensor:
        if isinstance(payload, str):
            return super().decode(base64.b64decode(payload))
        return torch.tensor(payload).reshape(1, 8, 8)


def test_payloads_that_are_no_bytes_are_left_to_the_handler(
    serve: Callable[..., Service], clean: Clean
) -> None:
    image = clean(1)[0]
    payloads = [base64.b64encode(png(image)).decode(), image.tolist(), [1, 2, 3], {"a": 1}, "???"]
    outcomes = serve(Json).pass_batch(payloads)
    assert verdicts(outcomes) == [ACCEPT, ACCEPT, None, None, None]
    unreadable = InvalidReason.UNREADABLE
    assert [o.invalid for o in outcomes[2:]] == [unreadable, unreadable, InvalidReason.EMPTY]


@contextmanager
def patched_reduce(service: Service, error: Exception) -> Iterator[None]:
    """Make the router fail at every site."""
    backbone = service.gate._attached.backbone
    router = backbone.router

    @dataclass(frozen=True)
    class Broken:
        name: ClassVar[str] = "broken"
        one_forward: ClassVar[bool] = True
        layout = router.layout

        def reduce(self, output: Tensor, site: object) -> Tensor:
            raise error

        def finish(self, path: Tensor, logits: Tensor) -> Tensor:
            return path

    backbone.router = Broken()
    try:
        yield
    finally:
        backbone.router = router


def test_a_router_that_fails_is_an_error_verdict_and_the_answer_is_the_same(
    serve: Callable[..., Service], clean: Clean
) -> None:
    payloads = [png(image) for image in clean(2)]
    service = serve()
    with patched_reduce(service, MemoryError("out of memory")):
        outcomes = service.pass_batch(payloads)
    assert verdicts(outcomes) == [ERROR] * 2
    assert [outcome.answer for outcome in outcomes] == service.handler.answer(payloads)
    assert service.counts.value("errors_total", stage="capture") == 2


def test_new_rules_hold_from_the_next_batch_on_and_are_published(
    serve: Callable[..., Service], noise: bytes
) -> None:
    service = serve()
    assert service.counts.value("target_fpr", tier="reject") == 0.001
    service.gate.apply(ModelSettings.model_validate({"mode": "flag", "flag": {"target_fpr": 0.2}}))
    assert verdicts(service.pass_batch([noise])) == [FLAG]
    assert service.gate.settings.mode == "flag"
    assert service.counts.value("target_fpr", tier="flag") == 0.2
    assert service.counts.value("mode", mode="flag") == 1
    assert service.counts.value("mode", mode="enforce") == 0


@pytest.mark.parametrize(
    ("flag", "error", "sentence"),
    [
        ({"target_fpr": 1e-5}, CalibrationError, "needs at least 100000 calibration images"),
        (
            {"score": 1, "per_class": {"cat": {"score": 1}}},
            ConfigError,
            "flag.per_class names the class",
        ),
    ],
)
def test_rules_that_cannot_be_kept_leave_the_old_ones_in_force(
    serve: Callable[..., Service],
    noise: bytes,
    flag: object,
    error: type[Exception],
    sentence: str,
) -> None:
    service = serve()
    before = service.gate.settings
    with pytest.raises(error, match=sentence):
        service.gate.apply(ModelSettings.model_validate({"mode": "off", "flag": flag}))
    assert service.gate.settings is before
    assert verdicts(service.pass_batch([noise])) == [REJECT]
    assert service.counts.value("mode", mode="enforce") == 1


def test_rules_exchanged_while_a_batch_runs_do_not_touch_it(
    serve: Callable[..., Service], noise: bytes
) -> None:
    service = serve()

    def answer(rows: Sequence[int]) -> list[object]:
        service.gate.apply(ModelSettings.model_validate({"mode": "shadow"}))
        return service.handler.answer([noise for _ in rows])

    assert verdicts(service.gate.pass_batch([noise], answer)) == [REJECT]


def test_the_guards_own_time_is_measured_by_stage(
    serve: Callable[..., Service], noise: bytes
) -> None:
    service = serve()
    service.pass_batch([noise])
    for stage in ("check", "score", "decide"):
        assert service.counts.value("guard_seconds_count", stage=stage) == 1


def test_a_guard_for_other_weights_never_gets_a_gate(
    serve: Callable[..., Service], net: SmallNet
) -> None:
    net.head.bias[0] += 1
    with pytest.raises(ArtifactError, match="was fitted for the backbone"):
        serve()
    assert hook_count(net) == 0
