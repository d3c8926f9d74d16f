"""Handlers that show their network several rows of a request: whose they are, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from defense.backbone import GatedBackbone
from defense.config import ModelSettings
from defense.gate import Gate, Outcome
from defense.guard import Guard
from defense.looks import Extras
from defense.offline.collect import collect, input_spec
from defense.offline.fit import FitOptions, assemble
from defense.offline.progress import Silent
from defense.payload import InvalidReason
from defense.types import FitData, Verdict, Views
from tests.conftest import TRAINED_ON, Counts, Digits
from tests.looks import ECHO
from tests.served import PngHandler, SmallNet, counted_forwards, images_like_noise, png

ACCEPT, REJECT = Verdict.ACCEPT, Verdict.REJECT
NUMBER = 2


class Grouped(PngHandler):
    """One run, the views of a request side by side."""

    def infer(self, batch: Tensor) -> Tensor:
        views = torch.stack([batch, batch.flip(-1)], 1)
        return super().infer(views.flatten(0, 1)).reshape(len(batch), NUMBER, -1).mean(1)


class Apart(PngHandler):
    """One run, the mirrored batch behind the batch."""

    def infer(self, batch: Tensor) -> Tensor:
        both = super().infer(torch.cat([batch, batch.flip(-1)]))
        return both.reshape(NUMBER, len(batch), -1).mean(0)


class Called(PngHandler):
    """A run for each view."""

    def infer(self, batch: Tensor) -> Tensor:
        return (super().infer(batch) + super().infer(batch.flip(-1))) / 2


class OneByOne(PngHandler):
    """A run for each request."""

    def infer(self, batch: Tensor) -> Tensor:
        runs = [PngHandler.infer(self, torch.stack([x, x.flip(-1)])) for x in batch]
        return torch.stack([run.mean(0) for run in runs])


HANDLERS = [(Grouped, True), (Apart, False), (Called, False), (OneByOne, True)]


@pytest.fixture(scope="module")
def fitted(trained: SmallNet, guard: Guard, digits: Digits) -> Callable[[type[PngHandler]], Guard]:
    """Return a function that fits a guard through a handler of some kind."""
    guards: dict[type[PngHandler], Guard] = {}

    def fit(kind: type[PngHandler]) -> Guard:
        if kind not in guards:
            payloads = [png(image) for image in digits.images[TRAINED_ON : TRAINED_ON + 800]]
            spec = input_spec(kind(trained), payloads[:8])
            with GatedBackbone(trained, guard.router) as gated:
                runs = collect(kind(trained), gated, payloads, Silent(), views=spec.views)
            first, rest = torch.arange(len(runs)).split(400)
            clean = runs.take(first)
            data, options = FitData(clean, clean.predicted), FitOptions(detector="density")
            names = guard.class_names
            guards[kind] = assemble(
                trained, guard.router, spec, data, runs.take(rest), names, options, {}
            )
        return guards[kind]

    return fit


def passed(
    guard: Guard, handler: PngHandler, payloads: Sequence[bytes], counts: Counts
) -> list[Outcome]:
    """Return what the gate says of one batch."""
    settings = ModelSettings.model_validate({"reject": {"target_fpr": 0.005}})
    with guard.attach(handler.backbone, settings) as attached:
        return Gate(attached, settings, counts.metrics).pass_batch(
            payloads, lambda rows: handler.answer([payloads[row] for row in rows])
        )


@pytest.mark.parametrize(("kind", "grouped"), HANDLERS)
def test_whose_the_rows_are_is_found_out(
    net: SmallNet, digits: Digits, kind: type[PngHandler], grouped: bool
) -> None:
    payloads = [png(image) for image in digits.images[:8]]
    assert input_spec(kind(net), payloads).views == Views(NUMBER, grouped)


@pytest.mark.parametrize("kind", [kind for kind, _ in HANDLERS])
def test_every_request_of_a_mixed_batch_gets_its_own_outcome(
    net: SmallNet,
    digits: Digits,
    fitted: Callable[[type[PngHandler]], Guard],
    counts: Counts,
    kind: type[PngHandler],
) -> None:
    guard, handler = fitted(kind), kind(net)
    calm = [
        png(image)
        for image in digits.images[-20:]
        if passed(guard, handler, [png(image)], counts)[0].verdict is ACCEPT
    ]
    noise = png(images_like_noise(1, 5)[0])
    payloads = [calm[0], noise, b"garbage", calm[1], calm[2]]
    outcomes = passed(guard, handler, payloads, counts)

    assert [outcome.verdict or outcome.invalid for outcome in outcomes] == [
        ACCEPT,
        REJECT,
        InvalidReason.NOT_AN_IMAGE,
        ACCEPT,
        ACCEPT,
    ]
    for outcome, payload in zip(outcomes, payloads, strict=True):
        if outcome.verdict is not None:
            [alone] = passed(guard, handler, [payload], counts)
            assert outcome.score == pytest.approx(alone.score, abs=1e-3)
            assert outcome.p_value == pytest.approx(alone.p_value, abs=0.01)


@pytest.mark.parametrize("kind", [Apart, OneByOne])
def test_a_guard_keeps_its_rates_on_requests_of_several_views(
    net: SmallNet,
    digits: Digits,
    fitted: Callable[[type[PngHandler]], Guard],
    counts: Counts,
    kind: type[PngHandler],
) -> None:
    fresh = [png(image) for image in digits.images[TRAINED_ON + 800 :]]
    outcomes = passed(fitted(kind), kind(net), fresh, counts)
    p_values = [outcome.p_value or 0.0 for outcome in outcomes]
    for rate in (0.05, 0.2):
        alarms = sum(p <= rate for p in p_values) / len(p_values)
        assert alarms < rate + 4 * (rate * (1 - rate) / len(p_values)) ** 0.5 + 0.03


def test_a_wrong_size_is_invalid_alone_where_each_request_has_its_own_run(
    net: SmallNet, digits: Digits, fitted: Callable[[type[PngHandler]], Guard], counts: Counts
) -> None:
    class Sizes(OneByOne):
        def answer(self, payloads: Sequence[object]) -> list[object]:
            return [answer for p in payloads for answer in super(Sizes, self).answer([p])]

    payloads = [png(digits.images[-1]), png(torch.zeros(1, 9, 8)), png(digits.images[-2])]
    handler = Sizes(net)
    with counted_forwards(net) as forwards:
        outcomes = passed(fitted(OneByOne), handler, payloads, counts)
    assert [outcome.invalid for outcome in outcomes] == [None, InvalidReason.WRONG_SHAPE, None]
    assert None not in {outcomes[0].p_value, outcomes[2].p_value}
    assert forwards[-3:] == [NUMBER] * 3


@pytest.mark.parametrize("kind", [kind for kind, _ in HANDLERS])
def test_echoes_of_a_request_are_the_mean_of_those_of_its_views(
    net: SmallNet, guard: Guard, digits: Digits, kind: type[PngHandler]
) -> None:
    images = digits.images[:5]
    payloads = [png(image) for image in images]
    views = input_spec(kind(net), payloads).views
    with GatedBackbone(net, guard.router) as gated:
        runs = collect(kind(net), gated, payloads, Silent(), Extras(echo=ECHO), views)
    with torch.inference_mode():
        expected = (ECHO.logits(net, images) + ECHO.logits(net, images.flip(-1))) / 2
    assert runs.echoes is not None
    torch.testing.assert_close(runs.echoes, expected)
