"""Every error that a user can meet, as one tree.

A message is one sentence: what happened, where, what was expected and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class PathGuardError(Exception):
    """Base of everything that PathGuard raises on purpose; the command line prints it and exits 1."""


class ConfigError(PathGuardError):
    """`guard.yaml` (or a threshold in it) does not say something that can be carried out."""


class SiteError(PathGuardError):
    """The backbone has no such site, or nothing that could be observed."""


class DataError(PathGuardError):
    """Images to fit or to evaluate on are missing, unreadable or too few."""


class CalibrationError(PathGuardError):
    """Calibration scores cannot keep the promise that was asked of them."""


class ArtifactError(PathGuardError):
    """A guard folder is damaged, of another schema, or bound to another backbone."""


class ArchiveError(PathGuardError):
    """A model archive cannot be read, guarded, wrapped or unwrapped."""


class ServerError(PathGuardError):
    """A model server could not be started, reached or stopped."""


class GuardFailure(PathGuardError):
    """The guard itself failed on a batch; `stage` names where, for the error counter."""

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(message)
        self.stage = stage


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint such as `; did you mean 'reject'?`, or the list of known names."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known are: {', '.join(known)}"
