"""Everything that the pages draw on, as it is at the moment of asking."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

from defense.config import Limits
from defense.console.cases import Case
from defense.console.lens import Lens
from defense.console.pictures import as_png
from defense.errors import DataError
from defense.offline.data import ImageSet
from defense.trail import Trail, read_payload, read_trail, write_call

EXAMPLES = 6
"""Clean pictures of a class that are shown."""
NO_PAYLOAD = (
    "the picture was not kept; 'audit: {payloads: {max_mib: 256}}' in guard.yaml keeps those of later "
    "incidents"
)
GONE = (
    "the picture is no longer kept; raise audit.payloads.max_mib in guard.yaml to keep more of them"
)
NO_EXAMPLES = "Start the console with --data to see clean pictures of a class here."


@dataclass(frozen=True)
class Settings:
    """What the console was started with.

    folder: of the trail. limits: under which payloads are decoded. examples: clean pictures. lens:
    the network, for attributions. by: whose calls are kept. clock: tells the time, in UTC.
    """

    folder: Path
    limits: Limits
    by: str
    clock: Callable[[], datetime]
    examples: ImageSet | None = None
    lens: Lens | None = None


class Desk:
    """The trail, read again when it has changed, with the pictures that belong to it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._read: tuple[object, Trail, dict[str, Case]] | None = None

    @property
    def trail(self) -> Trail:
        return self._current()[0]

    @property
    def cases(self) -> Mapping[str, Case]:
        """All incidents by their id, newest first."""
        return self._current()[1]

    def call(self, incidents: Sequence[str], call: str) -> None:
        """Keep what a person says of incidents."""
        for incident in incidents:
            write_call(self.settings.folder, incident, call, by=self.settings.by)

    def payload(self, case: Case) -> bytes:
        """Return what the client sent; DataError says why it is not there."""
        found = read_payload(self.settings.folder, case.incident)
        if found is None:
            raise DataError(NO_PAYLOAD if case.incident.payload is None else GONE)
        return found

    def picture(self, case: Case) -> bytes:
        """Return what the client sent as a PNG; DataError says why there is none."""
        return as_png(self.payload(case), self.settings.limits)

    def examples(self, names: Sequence[str]) -> dict[str, list[int]]:
        """Return the numbers of a few clean pictures of each class; of unknown classes none."""
        images = self.settings.examples
        if images is None or images.labels is None:
            return {}
        found: dict[str, list[int]] = {}
        for name in dict.fromkeys(names):
            if name in images.class_names:
                label = images.class_names.index(name)
                own = [i for i, other in enumerate(images.labels) if other == label]
                found[name] = own[:: max(1, len(own) // EXAMPLES)][:EXAMPLES]
        return found

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """The numbers of clean pictures by their names; a guard knows them by name."""
        images = self.settings.examples
        return {} if images is None else {name: i for i, name in enumerate(images.names)}

    def example(self, number: int) -> bytes:
        """Return a clean picture as a PNG; DataError where there is none of that number."""
        images = self.settings.examples
        if images is None or not 0 <= number < len(images):
            raise DataError(f"there is no example {number}; open one from the page of an incident")
        return as_png(images.payload(number), self.settings.limits)

    def _current(self) -> tuple[Trail, Mapping[str, Case]]:
        """Read the trail again where a file of it is new, longer or gone."""
        with self._lock:
            files = sorted(self.settings.folder.glob("*.jsonl"))
            state = [(f.name, *_size(f)) for f in files]
            if self._read is None or self._read[0] != state:
                trail = read_trail(self.settings.folder)
                self._read = (state, trail, _cases(trail))
            return self._read[1], self._read[2]


def _size(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except FileNotFoundError:  # rotated away since it was listed
        return (0, 0)
    return found.st_size, found.st_mtime_ns


def _cases(trail: Trail) -> dict[str, Case]:
    return {i.id: Case(i, trail.call_of(i)) for i in reversed(trail.incidents)}
