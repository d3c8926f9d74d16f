"""The error tree: one base that the command line catches, and hints that help."""

from __future__ import annotations

import inspect

import pytest

from defense import errors
from defense.errors import GuardFailure, PathGuardError, nearest


def test_every_error_is_a_pathguard_error() -> None:
    found = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)]
    assert len(found) >= 9
    assert all(issubclass(kind, PathGuardError) for kind in found)


def test_a_guard_failure_names_its_stage() -> None:
    failure = GuardFailure("score", "no number")
    assert (failure.stage, str(failure)) == ("score", "no number")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("rejct", "; did you mean 'reject'?"),
        ("zzz", "; known are: flag, reject"),
        ("", "; known are: flag, reject"),
    ],
)
def test_a_hint_is_the_nearest_name_or_all_of_them(name: str, hint: str) -> None:
    assert nearest(name, ["reject", "flag"]) == hint
