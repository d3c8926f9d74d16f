"""Work that may hang, ended when its time is over.

A detector that hangs would hold its worker until the server's own time limit kills it, with every
request that waits. An alarm ends it instead: a signal costs a millionth of a second per batch,
where a thread to be left behind would keep a second pool of torch's threads spinning beside the
first. Python handles signals in the main thread, where TorchServe calls its handlers, and between
two of its own steps: one native call that never returns is left to the server's time limit, and so
is work in another thread.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from defense.errors import GuardFailure

T = TypeVar("T")


class _Overdue(BaseException):
    """Not an `Exception`: the work may catch those."""


def within(seconds: float, work: Callable[[], T]) -> T:
    """Return what `work` returns, or raise what it raises; GuardFailure where it takes longer."""
    if threading.current_thread() is not threading.main_thread():
        return work()
    before = signal.signal(signal.SIGALRM, _ring)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            return work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _Overdue:
        raise GuardFailure("timeout", f"no verdict was had within {seconds:g} s") from None
    finally:
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


def _ring(_signal: int, _frame: FrameType | None) -> None:
    raise _Overdue
