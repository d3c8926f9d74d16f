"""Progress of long work, for whoever watches; silent where nobody does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress(Protocol):
    def advance(self, steps: int = 1) -> None: ...


class Silent:
    """Progress that nobody watches."""

    def advance(self, steps: int = 1) -> None:  # noqa: ARG002
        return None


class _Bar:
    def __init__(self, bars: RichProgress, text: str, total: int | None) -> None:
        self._bars = bars
        self._task = bars.add_task(text, total=total)

    def advance(self, steps: int = 1) -> None:
        self._bars.advance(self._task, steps)


@contextmanager
def bar(console: Console, text: str, total: int | None) -> Iterator[Progress]:
    """Show a bar while the block runs; without a total it only counts."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=console) as bars:
        yield _Bar(bars, text, total)
