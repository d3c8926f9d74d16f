"""Invariants 3, 4 and 8 at the gate: a request is what it is, whoever its neighbours are."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from torch import Tensor

from defense.backbone import GatedBackbone
from defense.config import ModelSettings
from defense.gate import Gate, Outcome
from defense.guard import AttachedGuard, Guard
from defense.looks import Extras
from defense.metrics import ModelMetrics, make_instruments
from defense.offline.collect import collect_inputs
from defense.payload import InvalidReason
from defense.types import Routed, Scored, Verdict
from tests.conftest import Counts, Digits
from tests.looks import ECHO, small_witness, with_extras
from tests.served import (
    PngHandler,
    SmallNet,
    counted_forwards,
    encoded,
    images_like_noise,
    nan_image,
    png,
)

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO")
SETTINGS = ModelSettings.model_validate(
    {"limits": {"max_bytes": 5000, "max_pixels": 2000, "formats": FORMATS}}
)
TWO_LOOKS = ModelSettings.model_validate(
    {
        "flag": {"target_fpr": 0.05},
        "reject": {"target_fpr": 0.02},
        "second_look": {"below_p": 0.5, "budget_ms": 10_000},
    }
)
Clean = Callable[[int], Tensor]


@pytest.fixture(scope="module")
def attached(guard: Guard, trained: SmallNet) -> Iterator[AttachedGuard]:
    with guard.attach(trained) as attached:
        yield attached


@pytest.fixture(scope="module")
def pool(clean: Clean) -> list[bytes]:
    """Requests of every kind, none of them near a threshold."""
    image = png(clean(1)[0])
    return [
        *(png(digit) for digit in clean(3)),
        *(png(noise) for noise in images_like_noise(2, 5)),
        nan_image(),
        b"",
        b"garbage",
        image[:50],
        image[:-20],
        png(torch.zeros(1, 9, 8)),
        png(torch.zeros(1, 60, 60)),
        encoded(torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()),
        b"x" * 5001,
        image + b"iCCP" * 40,
    ]


def passed(attached: AttachedGuard, payloads: Sequence[bytes]) -> tuple[list[Outcome], Counts]:
    """Pass a batch through a gate with metrics of its own."""
    registry = CollectorRegistry()
    counts = Counts(
        registry, ModelMetrics(make_instruments(registry), model="small", version="1.0")
    )
    gate = Gate(attached, SETTINGS, counts.metrics)
    handler = PngHandler(attached.backbone.model)
    return gate.pass_batch(
        payloads, lambda rows: handler.answer([payloads[r] for r in rows])
    ), counts


def status(outcome: Outcome) -> Verdict | InvalidReason | None:
    return outcome.verdict or outcome.invalid


def invalid_total(counts: Counts) -> float:
    return sum(counts.value("invalid_inputs_total", reason=r.value) for r in InvalidReason)


@given(picks=st.lists(st.integers(0, 13), max_size=12))
def test_a_request_has_the_same_status_alone_and_in_any_batch(
    attached: AttachedGuard, pool: list[bytes], picks: list[int]
) -> None:
    alone = [passed(attached, [payload])[0][0] for payload in pool]
    together, _ = passed(attached, [pool[pick] for pick in picks])
    assert [status(outcome) for outcome in together] == [status(alone[pick]) for pick in picks]
    for outcome, pick in zip(together, picks, strict=True):
        if alone[pick].score is not None:
            assert outcome.score == pytest.approx(alone[pick].score, rel=1e-4)


def test_the_pool_holds_requests_of_every_kind(attached: AttachedGuard, pool: list[bytes]) -> None:
    found = {status(outcome) for outcome in passed(attached, pool)[0]}
    assert found == {Verdict.ACCEPT, Verdict.REJECT} | set(InvalidReason) - {
        InvalidReason.UNREADABLE
    }


@given(picks=st.lists(st.integers(0, 13), max_size=12))
def test_every_request_is_counted_exactly_once(
    attached: AttachedGuard, pool: list[bytes], picks: list[int]
) -> None:
    outcomes, counts = passed(attached, [pool[pick] for pick in picks])
    assert sum(counts.verdicts().values()) + invalid_total(counts) == len(picks)
    assert counts.value("p_value_count") == sum(outcome.verdict is not None for outcome in outcomes)
    for verdict in Verdict:
        wanted = sum(outcome.verdict is verdict for outcome in outcomes)
        assert counts.verdicts().get(verdict.value, 0) == wanted


@given(picks=st.lists(st.integers(0, 13), min_size=1, max_size=12))
def test_any_batch_takes_at_most_one_forward_pass(
    attached: AttachedGuard, trained: SmallNet, pool: list[bytes], picks: list[int]
) -> None:
    with counted_forwards(trained) as forwards:
        passed(attached, [pool[pick] for pick in picks])
    assert len(forwards) <= 1


def mutated(original: bytes, seed: int) -> bytes:
    """Cut, repeat or overwrite parts of a file."""
    draw = random.Random(seed)  # noqa: S311 - damage that can be repeated, no secret
    content = bytearray(original)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(content) + 1)
        part = draw.randbytes(draw.randint(1, 4))
        action = draw.choice(("cut", "overwrite", "insert", "drop"))
        if action == "cut":
            del content[place:]
        elif action == "overwrite":
            content[place : place + len(part)] = part
        elif action == "insert":
            content[place:place] = part
        else:
            del content[place : place + len(part)]
    return bytes(content)


DRAWN = torch.randint(0, 256, (8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
FILES = [encoded(DRAWN.numpy(), kind) for kind in FORMATS]
damaged = st.builds(mutated, st.sampled_from(FILES), st.integers(0, 2**31))


@given(content=st.one_of(st.binary(max_size=300), damaged))
def test_any_byte_string_is_answered_or_invalid_for_a_listed_reason_and_never_anything_else(
    attached: AttachedGuard, pool: list[bytes], content: bytes
) -> None:
    expected, _ = passed(attached, pool[:2])
    (first, odd, second), counts = passed(attached, [pool[0], content, pool[1]])
    assert odd.failure is None
    assert (odd.verdict is None) == isinstance(odd.invalid, InvalidReason)
    assert (odd.invalid is None) == (odd.answer is not None)
    assert odd.verdict is not Verdict.ERROR
    for found, wanted in zip((first, second), expected, strict=True):
        assert found.verdict is wanted.verdict is Verdict.ACCEPT
        assert isinstance(found.answer, dict)
        assert isinstance(wanted.answer, dict)
        assert found.answer["class"] == wanted.answer["class"]
    assert sum(counts.verdicts().values()) + invalid_total(counts) == 3
    assert counts.value("errors_total", stage="handler") == 0


@given(order=st.permutations(range(10)), cut=st.integers(1, 9), seed=st.integers(0, 1000))
def test_a_row_of_a_run_scores_the_same_in_any_order_and_company(
    guard: Guard, attached: AttachedGuard, digits: Digits, order: list[int], cut: int, seed: int
) -> None:
    rows = digits.images[seed : seed + 10]
    with torch.inference_mode():
        run: Routed = attached.backbone.run(rows)
        whole = guard.score(run).score
        permuted = guard.score(attached.backbone.run(rows[order])).score
        parts = [
            guard.score(attached.backbone.run(part)).score for part in (rows[:cut], rows[cut:])
        ]
    torch.testing.assert_close(permuted, whole[order], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def two_looks(guard: Guard, trained: SmallNet, digits: Digits) -> Iterator[AttachedGuard]:
    """A guard with a witness and a second look at half of all requests, and time for all of them."""
    extras = Extras(small_witness(), ECHO)
    with GatedBackbone(trained, guard.router) as gated:
        runs = collect_inputs(trained, gated, digits.images[:200], extras)
    with with_extras(guard, extras, runs).attach(trained, TWO_LOOKS) as attached:
        yield attached


@given(order=st.permutations(range(8)), cut=st.integers(1, 7), start=st.integers(200, 1000))
def test_a_second_look_says_the_same_in_any_order_and_company(
    two_looks: AttachedGuard, digits: Digits, order: list[int], cut: int, start: int
) -> None:
    rows = digits.images[start : start + 8]
    with torch.inference_mode():
        whole = two_looks(rows).scored
        permuted = two_looks(rows[order]).scored
        parts = Scored.concat([two_looks(part).scored for part in (rows[:cut], rows[cut:])])
    # A score that ties with one of calibration to rounding may fall on either side of it.
    for found, expected in ((permuted, whole.take(torch.tensor(order))), (parts, whole)):
        torch.testing.assert_close(found.score, expected.score, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.p_value, expected.p_value, rtol=0, atol=1.5 / 201)
