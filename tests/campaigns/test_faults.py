"""A few of the faults, caused on a real server; `make faults` causes all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.campaigns.broken_parts import Seen
from tests.campaigns.faults import FAULTS, Result, cause, page, scene
from tests.campaigns.scene import Scene

SHORT = (
    "detector hangs (open)",
    "detector raises (closed)",
    "CUDA out of memory in every forward pass",
    "guard.yaml replaced by a folder",
)
KNOWN = {fault.name: fault for fault in FAULTS}


@pytest.fixture(scope="module")
def on() -> Iterator[Scene]:
    with scene(0, workers=1) as running:
        yield running


@pytest.mark.server
@pytest.mark.parametrize("name", SHORT)
def test_what_is_promised_for_a_fault_is_kept(on: Scene, name: str) -> None:
    result = cause(KNOWN[name], on)
    assert result.kept, result.seen


@pytest.mark.server
def test_a_fault_that_cannot_be_caused_is_a_promise_not_kept(on: Scene) -> None:
    def fail(_: Scene) -> Seen:
        raise AssertionError("it never came true")

    result = cause(replace(FAULTS[0], cause=fail), on)
    assert (result.kept, result.seen) == (False, "AssertionError: it never came true")


def test_the_page_counts_promises_and_says_what_was_not_run() -> None:
    rows = [Result("a", "b", "c", "d", kept) for kept in (True, False, None)]
    text = page(rows, 7)
    assert "--seed 7" in text
    assert "1 of 3 promises were kept" in text
    assert [word in text for word in ("| yes |", "| **no** |", "| not run |")] == [True] * 3
