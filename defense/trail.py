"""The audit trail on disk: what its lines hold, and a reader that no line can upset.

A folder of JSON lines. `trail-*.jsonl` are written by the workers (`defense.audit`), one file at a
time each; `calls.jsonl` holds what people said of incidents. A worker may die in the middle of a
line, a disk may run full, and whoever reaches the folder may write anything into it: what does not
have the form below is counted and left out.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, Literal, NotRequired, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
)
from typing_extensions import TypedDict

from defense.errors import DataError, nearest

TRAIL_FILES = "trail-*.jsonl"
CALLS_FILE = "calls.jsonl"
PAYLOADS_FOLDER = "payloads"
PAYLOAD_SUFFIX = ".bin"
LONGEST_LINE = 1 << 20
LONGEST_TEXT = 500
LARGEST_PAYLOAD = 1 << 30
CALLS = ("attack", "false_alarm", "unsure")
VERDICTS = ("accept", "flag", "reject", "error", "invalid", "failed")
"""What a tally counts; all but the first make an incident."""


def _printable(text: str) -> str:
    """Return a text that neither ends a line nor steers a terminal, cut where it is long."""
    return "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:LONGEST_TEXT]
    )


def _in_utc(time: datetime) -> datetime:
    if not 2000 <= time.year < 9000:  # others overflow when they are moved to another time zone
        raise ValueError("the year is out of range")
    return time.astimezone(UTC)


def _to_number(key: object) -> object:
    """JSON has no other keys than texts."""
    return float(key) if isinstance(key, str) else key


def timestamp(time: datetime) -> str:
    """Write a UTC time to the millisecond, such as 2026-01-02T03:04:05.678Z."""
    return time.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


Text = Annotated[str, AfterValidator(_printable)]
Time = Annotated[AwareDatetime, AfterValidator(_in_utc), PlainSerializer(timestamp)]
Identifier = Annotated[str, Field(pattern=r"^[0-9a-f]{32}\z")]
Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=10**12)]
Rates = dict[Annotated[str, Field(pattern=r"^(flag|reject)\z")], Share]
Verdicts = dict[Annotated[str, Field(pattern=rf"^({'|'.join(VERDICTS)})\z")], Count]

Belief = TypedDict("Belief", {"class": Text, "share": Number})
Vote = TypedDict("Vote", {"site": Text, "class": Text, "share": Number})
Neighbour = TypedDict("Neighbour", {"image": Text, "class": Text, "distance": Number})


class _Channel(TypedDict):
    channel: int
    deviation: Number


class _Site(TypedDict):
    site: Text
    deviation: Number
    channels: list[_Channel]


class _Strays(TypedDict):
    site: Text
    channels: list[int]


class Pathway(TypedDict):
    """`defense.exemplars.Pathway.as_json`."""

    open: Number
    own: Number
    best: Belief
    strays: list[_Strays]


class Why(TypedDict):
    """`defense.reasons.Reasons.as_json`; a key that came later than this version is left out.

    Lines of before name no clean images.
    """

    predicted: Text
    runner_up: Text | None
    sites: list[_Site]
    votes: list[Vote]
    witness: Belief | None
    nearest_clean: NotRequired[list[Neighbour]]
    nearest_predicted: NotRequired[list[Neighbour]]
    pathway: NotRequired[Pathway | None]


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    v: Literal[1] = 1
    time: Time

    def line(self) -> bytes:
        """Return the one line that stands for this: ASCII, whatever its texts hold."""
        return (json.dumps(self.model_dump(), allow_nan=False) + "\n").encode("ascii")


class _Guarded(_Line):
    """What one worker says of the model that it serves.

    fingerprint: of the guard's backbone. guard: tells one guard for it from another.
    """

    model: Text
    version: Text
    fingerprint: Text
    guard: Text = ""
    target_fpr: Rates


class Incident(_Guarded):
    """A request that was flagged, rejected, or failed.

    id: made by us. request: TorchServe's id for it, "" where that is unknown. reason: why it was
    invalid. reasons: why its path is unusual, as `defense.reasons.Reasons.as_json` says it. payload:
    the name of the file in `payloads/` that holds what was sent, where that was asked for.
    """

    kind: Literal["incident"] = "incident"
    id: Identifier
    request: Text
    mode: Text
    verdict: Literal["flag", "reject", "error", "failed", "invalid"]
    reason: Text | None = None
    probing: bool = False
    p_value: Share | None = None
    score: float | None = None
    reasons: Why | None = None
    payload: Annotated[str, Field(pattern=r"^[0-9a-f]{32}\.bin\z")] | None = None


class Tally(_Guarded):
    """What one worker counted in the `seconds` up to `time`.

    verdicts: requests by verdict. p_values: all scored requests by the upper bound of their bucket;
    not cumulative. target_fpr: the rates that were in force.
    """

    kind: Literal["tally"] = "tally"
    seconds: Annotated[float, Field(ge=0, le=10**9)]
    verdicts: Verdicts
    p_values: dict[Annotated[Share, BeforeValidator(_to_number)], Count]


class Call(_Line):
    """What a person says that an incident was."""

    kind: Literal["call"] = "call"
    incident: Identifier
    call: Literal["attack", "false_alarm", "unsure"]
    by: Text | None = None


@dataclass(frozen=True)
class Trail:
    """All that could be read of a folder, oldest first.

    calls: the last one of every incident, by its id. damaged: lines that were left out. unreadable:
    files that could not be opened.
    """

    incidents: tuple[Incident, ...] = ()
    tallies: tuple[Tally, ...] = ()
    calls: dict[str, Call] = field(default_factory=dict)
    damaged: int = 0
    unreadable: int = 0

    def call_of(self, incident: Incident) -> str | None:
        """Return what was last said of an incident."""
        said = self.calls.get(incident.id)
        return None if said is None else said.call


_WRITTEN = TypeAdapter(Annotated[Incident | Tally, Field(discriminator="kind")])
_CALL = TypeAdapter(Call)
T = TypeVar("T")


def read_trail(folder: Path) -> Trail:
    """Read all that is whole; a folder that does not exist is an empty trail. Nothing is raised."""
    damage = _Damage()
    found = [
        entry
        for path in sorted(folder.glob(TRAIL_FILES))
        for entry in _entries(path, _WRITTEN, damage)
    ]
    found.sort(key=lambda entry: entry.time)
    return Trail(
        incidents=tuple(entry for entry in found if isinstance(entry, Incident)),
        tallies=tuple(entry for entry in found if isinstance(entry, Tally)),
        calls={call.incident: call for call in _entries(folder / CALLS_FILE, _CALL, damage)},
        damaged=damage.lines,
        unreadable=damage.files,
    )


def write_call(folder: Path, incident: str, call: str, *, by: str | None = None) -> Call:
    """Append what somebody says of the incident with this id; DataError where it cannot be kept."""
    if call not in CALLS:
        raise DataError(f"nothing is called '{call}'{nearest(call, CALLS)}")
    if not re.fullmatch("[0-9a-f]{32}", incident):
        raise DataError(
            f"'{_printable(incident)}' is no incident's id; give the 32 letters and digits of one"
        )
    said = Call(time=datetime.now(UTC), incident=incident, call=call, by=by)  # type: ignore[arg-type]
    path = folder / CALLS_FILE
    try:
        _append(path, said.line())
    except OSError as error:
        raise DataError(
            f"cannot write to {path}: {error.strerror}; make room, or get the right to write there"
        ) from error
    return said


def read_payload(folder: Path, incident: Incident) -> bytes | None:
    """Return what was sent, where that was kept and is still there."""
    if incident.payload is None:
        return None
    path = folder / PAYLOADS_FOLDER / incident.payload
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_PAYLOAD:
            return None
        return path.read_bytes()
    except OSError:
        return None


@dataclass
class _Damage:
    """What could not be read, counted on the way."""

    lines: int = 0
    files: int = 0


def _entries(path: Path, form: TypeAdapter[T], damage: _Damage) -> Iterator[T]:
    """Yield the lines of a file that have a form."""
    try:
        if not path.is_file():  # a pipe would never end
            return
        with path.open("rb") as file:
            for line in _lines(file):
                try:
                    yield form.validate_json(line)
                except ValidationError:
                    damage.lines += 1
    except FileNotFoundError:  # its time was over
        return
    except OSError:
        damage.files += 1


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yield every line; of one that is too long, an empty one in its place."""
    while line := file.readline(LONGEST_LINE):
        whole = line.endswith(b"\n") or len(line) < LONGEST_LINE
        while not line.endswith(b"\n") and (line := file.readline(LONGEST_LINE)):
            pass
        yield line if whole else b""


def _append(path: Path, line: bytes) -> None:
    """Append a line in one piece, and on a line of its own if somebody left half of one."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    handle = os.open(path, flags, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # the console may write one at the same time
        end = os.lseek(handle, 0, os.SEEK_END)
        half = end > 0 and os.pread(handle, 1, end - 1) != b"\n"
        write_whole(handle, b"\n" * half + line, end)
    finally:
        os.close(handle)


def write_whole(handle: int, content: bytes, end: int) -> None:
    """Write at the end of a file, whose size is `end`, all or nothing; OSError where it is nothing."""
    try:
        written = os.write(handle, content)
        if written < len(content):
            os.write(handle, content[written:])  # says what is wrong
    except OSError:
        with suppress(OSError):
            os.ftruncate(handle, end)
        raise
