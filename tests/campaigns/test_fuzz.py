"""Hostile input against a real guarded server, in short: every kind of case, exact counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from defense.offline.progress import Silent
from tests.campaigns import fuzz
from tests.campaigns.fuzz import CANARY, Report, Row
from tests.campaigns.harness import Guarded, serving, shipped_archive
from tests.campaigns.wire import Answer, Case, Target

REQUESTS = 200
SEED = 7


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    with shipped_archive() as archive, serving(archive) as running:
        yield running


@pytest.mark.server
def test_hostile_input_kills_no_worker_forges_nothing_and_is_counted_exactly(
    guarded: Guarded,
) -> None:
    report = fuzz.run(guarded, SEED, REQUESTS, Silent())

    assert report.problems() == []
    assert report.sent >= REQUESTS
    assert report.rows[CANARY].ok == report.rows[CANARY].sent
    assert report.counted["invalid"] > REQUESTS / 4
    assert report.counted["accept"] > REQUESTS / fuzz.CANARY_EVERY


def test_the_same_seed_makes_the_same_cases() -> None:
    target = Target("127.0.0.1", 1, "/predictions/guarded", "Bearer x")
    first, again = (list(fuzz.cases(SEED, 100, target)) for _ in range(2))
    assert first == again
    assert first != list(fuzz.cases(SEED + 1, 100, target))


def answer(status: int, verdict: str | None = None, body: bytes = b"", **headers: str) -> Answer:
    own = {} if verdict is None else {"x-pathguard-verdict": verdict}
    return Answer(status, "", tuple({**own, **headers}.items()), body)


def test_an_answer_is_told_by_who_gave_it() -> None:
    row = Row()
    answers = [answer(200, "accept"), answer(400, "invalid"), answer(431), answer(503), answer(0)]
    row.add(Case("x", ()), answers)
    assert (row.sent, row.ok, row.refused_by_guard) == (1, 1, 1)
    assert (row.refused_by_front_end, row.failed, row.unanswered) == (1, 1, 1)


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (answer(503, "failed"), "the guard failed: {'x: 503 by the guard (failed)': 1}"),
        (answer(200, "accept"), "answers show {'accept': 1}, the metrics {'accept': 0}"),
        (answer(200, echo="PathGuardFuzz7f3a"), "headers repeat what a client sent: {'x': 1}"),
    ],
)
def test_a_broken_promise_is_reported(found: Answer, problem: str) -> None:
    report = Report(counted={"accept": 0})
    report.add(Case("x", ()), [found])
    assert report.problems() == [problem]


def test_a_failure_of_the_front_end_is_named_without_what_it_quotes_of_the_request() -> None:
    body = b'{"code": 500, "type": "BadString", "message": "Bad string: \'secret\'"}'
    report = Report()
    report.add(Case("x", ()), [answer(500, body=body)])
    assert dict(report.failures) == {"x: 500 by the front end (BadString: Bad string)": 1}
    assert report.problems() == []
