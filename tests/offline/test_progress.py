"""Progress is shown to whoever watches."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from defense.offline.progress import Silent, bar


def test_a_bar_shows_what_is_done_of_how_much() -> None:
    screen = StringIO()
    with bar(Console(file=screen, force_terminal=True), "Fitting", 7) as progress:
        progress.advance(3)
        progress.advance()
    assert "Fitting" in screen.getvalue()
    assert "4/7" in screen.getvalue()


def test_silence_is_progress_too() -> None:
    screen = StringIO()
    with bar(Console(file=screen), "Fitting", 7):
        Silent().advance(3)
    assert "3/7" not in screen.getvalue()
