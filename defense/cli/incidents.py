"""`pathguard incidents`: look at the audit trail, say what incidents were, and replay them."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from defense.cli.options import console, out
from defense.errors import ConfigError, DataError, nearest
from defense.trail import CALLS, VERDICTS, Incident, Trail, read_trail, timestamp, write_call

incidents = typer.Typer(
    help="Look at the audit trail of a guarded server, say what incidents were, and replay them.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

UNCALLED = "none"
SHOWN_ID = 8
UNITS = {"m": "minutes", "h": "hours", "d": "days"}

Folder = Annotated[
    Path, typer.Option("--trail", help="The folder that guard.yaml names under audit.")
]
Name = Annotated[
    str, typer.Argument(help="An incident's id, or as much of its beginning as is unique.")
]
Since = Annotated[
    str | None,
    typer.Option(help="From then on: 90m, 12h or 7d ago, or a UTC time such as 2026-01-31T08:00."),
]
Until = Annotated[str | None, typer.Option(help="Before then, in the same form.")]
Model = Annotated[str | None, typer.Option(help="Of this model.")]
Spoken = Annotated[
    str | None, typer.Option("--verdict", help="flag, reject, error, failed or invalid.")
]
Largest = Annotated[float | None, typer.Option("--max-p", help="With a p-value up to this.")]
Called = Annotated[
    str | None,
    typer.Option("--call", help="Called attack, false_alarm or unsure, or none for uncalled ones."),
]
Limit = Annotated[int, typer.Option(help="The latest so many.")]


@dataclass(frozen=True)
class Filter:
    """Which incidents are asked for; None asks for any."""

    since: datetime | None = None
    until: datetime | None = None
    model: str | None = None
    verdict: str | None = None
    largest: float | None = None
    call: str | None = None

    def of(self, trail: Trail) -> list[Incident]:
        """Return the incidents that fit, the latest first."""
        return [incident for incident in reversed(trail.incidents) if self._fits(incident, trail)]

    def _fits(self, incident: Incident, trail: Trail) -> bool:
        p_value = incident.p_value
        return (
            (self.since is None or incident.time >= self.since)
            and (self.until is None or incident.time < self.until)
            and self.model in (None, incident.model)
            and self.verdict in (None, incident.verdict)
            and (self.largest is None or (p_value is not None and p_value <= self.largest))
            and self.call in (None, trail.call_of(incident) or UNCALLED)
        )


@incidents.command("list")
def list_(
    trail: Folder,
    since: Since = None,
    until: Until = None,
    model: Model = None,
    verdict: Spoken = None,
    max_p: Largest = None,
    call: Called = None,
    limit: Limit = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON each.")] = False,
) -> None:
    """List incidents, the latest first.

    Example: `pathguard incidents list --trail /var/lib/pathguard --since 2h --verdict reject`
    """
    found = open_trail(trail)
    fitting = make_filter(since, until, model, verdict, max_p, call).of(found)
    if as_json:
        for incident in fitting[:limit]:
            typer.echo(_document(incident, found))
        return
    table = Table("time (UTC)", "id", "model", "verdict", "p-value", "what", "call", box=None)
    for incident in fitting[:limit]:
        table.add_row(
            *_cells(
                incident.time.strftime("%Y-%m-%d %H:%M:%S"),
                incident.id[:SHOWN_ID],
                incident.model,
                incident.verdict,
                _number(incident.p_value),
                _gist(incident),
                found.call_of(incident),
            )
        )
    out.print(table)
    console.print(f"{min(limit, len(fitting))} of {len(fitting)} incidents.")


@incidents.command()
def show(
    incident: Name,
    trail: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show all that is known of an incident: verdict, unusual sites, what each layer reads.

    Example: `pathguard incidents show 3f9c --trail /var/lib/pathguard`
    """
    found = open_trail(trail)
    chosen = find(found, incident)
    if as_json:
        typer.echo(_document(chosen, found))
        return
    for name, value in _facts(chosen, found):
        out.print(Text(f"{name:<12} {value}"), soft_wrap=True)
    for table in _tables(chosen):
        out.print()
        out.print(table)


@incidents.command()
def call(
    incident: Name,
    said: Annotated[str, typer.Argument(metavar="CALL", help="attack, false_alarm or unsure.")],
    trail: Folder,
    by: Annotated[str | None, typer.Option(help="Who says so.")] = None,
) -> None:
    """Say what an incident was. The last word counts; 'pathguard recalibrate' learns from it.

    Example: `pathguard incidents call 3f9c false_alarm --trail /var/lib/pathguard --by ada`
    """
    chosen = find(open_trail(trail), incident)
    write_call(trail, chosen.id, said, by=by)
    console.print(Text(f"Incident {chosen.id} is called {said}."))


@incidents.command()
def replay(
    trail: Folder,
    archive: Annotated[Path, typer.Option(help="The archive that was guarded, unwrapped.")],
    guard: Annotated[Path, typer.Option(help="The guard folder to try, a newer one for instance.")],
    config: Annotated[
        Path | None, typer.Option(help="Judge by the thresholds of this guard.yaml.")
    ] = None,
    since: Since = None,
    until: Until = None,
    model: Model = None,
    verdict: Spoken = None,
    max_p: Largest = None,
    call: Called = None,
    limit: Limit = 200,
) -> None:
    """Send kept payloads through another guard, and compare verdicts. Nothing is served or counted.

    Needs payloads in the trail (`audit: {payloads: {}}`). The archive's code runs, as in a fit.

    Example: `pathguard incidents replay --trail /var/lib/pathguard --archive model.mar --guard new/`
    """
    from defense.artifact import load_guard
    from defense.cli.replay import replay as judge_again
    from defense.config import Settings, read_settings
    from defense.offline.progress import bar
    from handlers.torchserve_inner import open_archive

    trail = trail.absolute()  # an archive that is open has its own folder as the working one
    found = open_trail(trail)
    asked = make_filter(since, until, model, verdict, max_p, call).of(found)
    chosen = [incident for incident in asked if incident.payload is not None][:limit]
    if not chosen:
        raise DataError(
            f"none of {len(asked)} incidents has a payload to replay; set payloads under audit in "
            "guard.yaml, or ask for others"
        )
    fitted = load_guard(guard)
    settings = read_settings(config) if config else Settings()
    replayed = []
    with (
        tempfile.TemporaryDirectory(prefix="pathguard-") as work,
        open_archive(archive.absolute(), Path(work)) as served,
        bar(console, "Replaying", len(chosen)) as progress,
    ):
        for name in sorted({incident.model for incident in chosen}):
            of_model = [incident for incident in chosen if incident.model == name]
            own = settings.for_model(name)
            replayed += judge_again(of_model, trail, served, fitted, own, progress)
    table = Table(
        "time (UTC)", "id", "model", "was", "p-value", "is now", "p-value", "call", box=None
    )
    for row in replayed:
        was, now = row.incident, row.outcome
        table.add_row(
            *_cells(
                was.time.strftime("%Y-%m-%d %H:%M:%S"),
                was.id[:SHOWN_ID],
                was.model,
                was.verdict,
                _number(was.p_value),
                row.verdict or "payload gone",
                _number(None if now is None else now.p_value),
                found.call_of(was),
            )
        )
    out.print(table)
    spoken = [row.verdict for row in replayed]
    console.print(
        ", ".join(f"{spoken.count(v)} {v}" for v in VERDICTS if v in spoken)
        + f"; {sum(v == row.incident.verdict for v, row in zip(spoken, replayed, strict=True))} as "
        "they were."
    )


def open_trail(folder: Path) -> Trail:
    """Read a trail, and say what of it could not be read; DataError where there is none."""
    if not folder.is_dir():
        raise DataError(
            f"there is no audit trail in {folder}; name the folder that guard.yaml has under audit"
        )
    found = read_trail(folder)
    if found.damaged:
        console.print(f"{found.damaged} damaged lines were left out.")
    if found.unreadable:
        console.print(
            f"{found.unreadable} files could not be opened; ask for the right to read them."
        )
    return found


def find(trail: Trail, name: str) -> Incident:
    """Return the incident whose id begins so; DataError where that is none or several."""
    found = {incident.id: incident for incident in trail.incidents if incident.id.startswith(name)}
    if len(found) != 1 or not name:
        many = f"{len(found)} incidents begin" if found else "no incident begins"
        raise DataError(f"{many} with '{name}'; see 'pathguard incidents list' for their ids")
    return next(iter(found.values()))


def make_filter(
    since: str | None,
    until: str | None,
    model: str | None,
    verdict: str | None,
    largest: float | None,
    call: str | None,
) -> Filter:
    """Read what was asked for; ConfigError where that is no time, verdict or call."""
    for option, value, known in (
        ("--verdict", verdict, VERDICTS[1:]),
        ("--call", call, (*CALLS, UNCALLED)),
    ):
        if value is not None and value not in known:
            raise ConfigError(f"{option} knows no '{value}'{nearest(value, known)}")
    return Filter(_time(since), _time(until), model, verdict, largest, call)


def _time(text: str | None) -> datetime | None:
    if text is None:
        return None
    ago = re.fullmatch(r"(\d{1,6})([mhd])", text)
    try:
        if ago:
            return datetime.now(UTC) - timedelta(**{UNITS[ago[2]]: int(ago[1])})
        time = datetime.fromisoformat(text)
        return (time.replace(tzinfo=UTC) if time.tzinfo is None else time).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"'{text}' is no time; give 90m, 12h or 7d for so long ago, or a time such as "
            "2026-01-31T08:00"
        ) from error


def _cells(*values: str | None) -> list[Text]:
    """Return texts that no markup in them changes."""
    return [Text(value or "") for value in values]


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.2g}"


def _document(incident: Incident, trail: Trail) -> str:
    return json.dumps({**incident.model_dump(), "call": trail.call_of(incident)})


def _gist(incident: Incident) -> str:
    """Say in a few words what the incident is about."""
    if incident.reason is not None:
        return incident.reason.replace("_", " ")
    why = incident.reasons
    said = ["asked again and again"] if incident.probing else []
    if why is not None:
        said.append(f"taken for {why['predicted']}")
        others = {vote["class"] for vote in why["votes"]} - {why["predicted"]}
        if others:
            read = sum(vote["class"] in others for vote in why["votes"])
            said.append(f"{read} of {len(why['votes'])} sites read another class")
    return ", ".join(said)


def _facts(incident: Incident, trail: Trail) -> Iterator[tuple[str, str]]:
    yield "incident", incident.id
    yield "time", timestamp(incident.time)
    yield "request", incident.request or "unknown"
    yield "model", f"{incident.model} {incident.version}"
    yield "guard", f"{incident.guard} for {incident.fingerprint[:16]}"
    yield "verdict", f"{incident.verdict} (mode {incident.mode})"
    if incident.reason:
        yield "reason", incident.reason
    if incident.p_value is not None:
        targets = ", ".join(f"{tier} {rate:g}" for tier, rate in incident.target_fpr.items())
        yield "p-value", f"{incident.p_value:.3g} (targets: {targets})"
    if incident.score is not None:
        yield "score", f"{incident.score:.4g}"
    yield "probing", "yes" if incident.probing else "no"
    yield "payload", incident.payload or "not kept"
    said = trail.calls.get(incident.id)
    yield "call", f"{said.call}{f' by {said.by}' if said.by else ''}" if said else "none yet"
    if incident.reasons is not None:
        yield "predicted", f"{incident.reasons['predicted']}, then {incident.reasons['runner_up']}"
        witness = incident.reasons["witness"]
        if witness is not None:
            yield "witness", f"{witness['class']} ({witness['share']:.0%})"


def _tables(incident: Incident) -> Iterator[Table]:
    why = incident.reasons
    if why is None:
        return
    if why["sites"]:
        table = Table("unusual site", "deviations", "channels (deviations)", box=None)
        for site in why["sites"]:
            channels = [f"{one['channel']} ({one['deviation']:+.1f})" for one in site["channels"]]
            table.add_row(*_cells(site["site"], f"{site['deviation']:.1f}", ", ".join(channels)))
        yield table
    if why["votes"]:
        table = Table("site", "reads", "share", box=None)
        for vote in why["votes"]:
            table.add_row(*_cells(vote["site"], vote["class"], f"{vote['share']:.0%}"))
        yield table
    for title, near in (
        ("nearest clean paths", why.get("nearest_clean")),
        ("nearest of that class", why.get("nearest_predicted")),
    ):
        if near:
            table = Table(title, "class", "distance", box=None)
            for one in near:
                table.add_row(*_cells(one["image"], one["class"], f"{one['distance']:.2f}"))
            yield table
