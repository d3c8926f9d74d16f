"""Work that hangs is ended when its time is over, and leaves nothing behind."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from defense.errors import GuardFailure
from defense.patience import within

LONG, SHORT = 60.0, 0.01


def hang() -> None:
    """Wait as waiting is done: between two steps of Python, and not giving up by itself."""
    while True:
        try:
            time.sleep(LONG)
        except Exception:  # noqa: S112 - as careless code does
            continue


def test_work_returns_what_it_returns() -> None:
    assert within(LONG, lambda: 3) == 3


def test_an_error_of_the_work_comes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        within(LONG, lambda: 1 // 0)


def test_work_that_takes_longer_fails_at_the_stage_timeout() -> None:
    with pytest.raises(GuardFailure, match=r"no verdict was had within 0\.01 s") as failed:
        within(SHORT, hang)
    assert failed.value.stage == "timeout"


@pytest.mark.parametrize("hangs", [False, True])
def test_afterwards_no_alarm_is_set_and_the_old_handler_is_back(hangs: bool) -> None:
    def own(_signal: int, _frame: object) -> None:
        raise AssertionError("this alarm was not ours")

    before = signal.signal(signal.SIGALRM, own)
    try:
        if hangs:
            with pytest.raises(GuardFailure, match="no verdict"):
                within(SHORT, hang)
        else:
            within(LONG, int)
        assert signal.getsignal(signal.SIGALRM) is own
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_work_in_another_thread_is_done_without_an_alarm() -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(within(LONG, lambda: 3)))
    thread.start()
    thread.join()
    assert found == [3]
