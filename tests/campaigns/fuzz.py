"""Hostile input against a real guarded server: `python -m tests.campaigns.fuzz --help`.

Seeded cases of every kind that `images` and `wire` make, a known-good image between every few of
them. The guard's counters have to agree with the answers that came: see `Report.problems`.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
import typer
from rich.console import Console

from defense.offline.progress import Progress, bar
from tests.campaigns import images, wire
from tests.campaigns.harness import (
    Counts,
    Guarded,
    about,
    serving,
    shipped_archive,
    write_results,
)
from tests.campaigns.wire import Answer, Case, Target

CLIENTS = 8
CANARY_EVERY = 20
CANARY = "known-good"
BASES = 3
TOLERANCE = 1e-3
"""Of a probability: how requests share batches moves the last bits of floats."""
LEFT_BEHIND = Path("/tmp/pathguard-was-here")
"""What the scripts and pickles among the files would write, if anything ran them."""
CAUSES = {
    "empty name": "a form's part has an empty name",
    "NullPointer": "a form's part does not say what it is",
    "out of range: 0": "a form's boundary is empty",
    "Index 1 out of bounds": "a request line has no path, as `OPTIONS *` has none",
    "Bad": "a body is no form though its content type says so",
    "Invalid hex": "a body is no form though its content type says so",
}
"""What makes TorchServe's own front end fail, by what its exceptions say."""
UNCERTAIN = ("pipelined", "clients that leave", "bodies without a length")
"""Whole requests of which not every answer can be read."""


@cache
def _files() -> dict[str, bytes]:
    return {
        f"{name} {seed}": content
        for seed in range(BASES)
        for name, content in images.well_formed(100 + seed).items()
    }


@cache
def _bomb(name: str) -> bytes:
    return images.BOMBS[name]()


def _plain(kind: str, body: bytes, target: Target) -> Case:
    return Case(kind, (target.request(body),))


def _damaged(rng: Random, target: Target, raw: bytes) -> Case:
    other = rng.choice(list(_files().values()))
    how, body = images.damaged(rng, raw, other)
    return _plain(f"damaged: {how}", body, target)


def _bombed(rng: Random, target: Target, _: bytes) -> Case:
    return _plain("bombs", _bomb(rng.choice(list(images.BOMBS))), target)


def _polyglot(rng: Random, target: Target, _: bytes) -> Case:
    return _plain(
        "polyglots", rng.choice(list(images.polyglots(rng.randrange(9)).values())), target
    )


def _noise(rng: Random, target: Target, _: bytes) -> Case:
    text = f"{wire.MARKER}\r\n{wire.FORGED}\r\n".encode()
    return _plain(
        "noise", rng.choice([rng.randbytes(rng.randrange(4000)), text, b"", b"\0"]), target
    )


Maker = Callable[[Random, Target, bytes], Case]
MAKERS: tuple[tuple[float, Maker], ...] = (
    (40, _damaged),
    (10, lambda rng, target, raw: _plain("well-formed", raw, target)),
    (0.6, _bombed),
    (3, _polyglot),
    (3, _noise),
    (10, lambda rng, target, _: wire.json_case(rng, target)),
    (4, wire.base64_case),
    (4, wire.content_type_case),
    (8, wire.form_case),
    (7, wire.header_case),
    (3, wire.encoding_case),
    (5, wire.line_case),
    (2.4, wire.connection_case),
    (1, wire.leaving_case),
)
"""How often, in per cent, and by what a case is made."""


def cases(seed: int, count: int, target: Target) -> Iterator[Case]:
    """Yield the campaign's cases; the same seed makes the same ones."""
    rng = Random(seed)  # noqa: S311 - nothing is kept secret
    weights, makers = zip(*MAKERS, strict=True)
    files = list(_files().values())
    for _ in range(count):
        maker = rng.choices(makers, weights)[0]
        yield maker(rng, target, rng.choice(files))


@dataclass
class Row:
    """What became of the cases of one kind."""

    sent: int = 0
    ok: int = 0
    refused_by_guard: int = 0
    refused_by_front_end: int = 0
    failed: int = 0
    unanswered: int = 0
    slowest: float = 0.0

    def add(self, case: Case, answers: Iterable[Answer]) -> None:
        self.sent += 1
        for answer in answers:
            if answer.status == 0:
                self.unanswered += 1
                continue
            self.slowest = max(self.slowest, answer.seconds)
            if answer.status < 400:
                self.ok += 1
            elif answer.status >= 500:
                self.failed += 1
            elif answer.verdict is None:
                self.refused_by_front_end += 1
            else:
                self.refused_by_guard += 1


@dataclass
class Report:
    """What a campaign found."""

    rows: dict[str, Row] = field(default_factory=dict)
    verdicts: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    echoes: Counter[str] = field(default_factory=Counter)
    canaries_astray: int = 0
    uncertain_requests: int = 0
    uncertain_seen: int = 0
    counted: dict[str, int] = field(default_factory=dict)
    counted_uncertain: int = 0
    workers_lost: int = 0
    restarts_logged: int = 0
    marked_lines: int = 0
    marked_metrics: int = 0
    left_behind: bool = False
    slowest: dict[str, list[float]] = field(default_factory=dict)
    batch: list[float] = field(default_factory=list)

    def add(self, case: Case, answers: list[Answer]) -> None:
        self.rows.setdefault(case.kind, Row()).add(case, answers)
        verdicts = [answer.verdict for answer in answers if answer.verdict]
        if case.kind in UNCERTAIN:
            self.uncertain_requests += max(case.reads, 1)
            self.uncertain_seen += len(verdicts)
        else:
            self.verdicts.update(verdicts)
        for answer in answers:
            if answer.status >= 500:
                self.failures[f"{case.kind}: {_cause(answer)}"] += 1
            said = [answer.reason, *(f"{name}: {value}" for name, value in answer.headers)]
            if wire.MARKER in "\n".join(said).lower():
                self.echoes[case.kind] += 1

    @property
    def sent(self) -> int:
        return sum(row.sent for row in self.rows.values())

    def problems(self) -> list[str]:
        """Say what of the promise was broken."""
        expected = {name: self.verdicts[name] for name in self.counted}
        unseen = self.uncertain_requests - self.uncertain_seen
        hidden = self.counted_uncertain - self.uncertain_seen
        checks = {
            f"{self.workers_lost} workers died": self.workers_lost + self.restarts_logged,
            f"{self.canaries_astray} known-good images were answered otherwise": self.canaries_astray,
            f"the guard failed: {dict(self.failures)}": any(
                "by the guard" in cause for cause in self.failures
            ),
            f"answers show {expected}, the metrics {self.counted}": expected != self.counted,
            f"of {unseen} unread answers {hidden} were counted": not 0 <= hidden <= unseen,
            f"{self.marked_lines} log lines hold what a client sent": self.marked_lines,
            f"{self.marked_metrics} metrics hold what a client sent": self.marked_metrics,
            f"headers repeat what a client sent: {dict(self.echoes)}": self.echoes,
            f"{LEFT_BEHIND} was written": self.left_behind,
        }
        return [problem for problem, found in checks.items() if found]


def _cause(answer: Answer) -> str:
    """Name a 5xx by who gave it; TorchServe's body says its exception's type."""
    if answer.verdict:
        return f"{answer.status} by the guard ({answer.verdict})"
    try:
        said = json.loads(answer.body)
        # Without what it quotes of the request.
        message = re.split(r"['\"]", said["message"])[0].strip(" :")
        return f"{answer.status} by the front end ({said['type']}: {message})"
    except (ValueError, KeyError, TypeError):
        return f"{answer.status} by the front end"


def _why(said: str) -> str:
    return next((cause for words, cause in CAUSES.items() if words in said), "not explained")


def target_of(guarded: Guarded) -> Target:
    """Return where a running server takes predictions."""
    url = urlsplit(guarded.url)
    assert url.hostname is not None
    assert url.port is not None
    token = guarded.server.token_header()["Authorization"]
    return Target(url.hostname, url.port, url.path, token)


@dataclass(frozen=True)
class Canary:
    """A known-good request and the answer that it has to get throughout."""

    case: Case
    expected: dict[str, float]

    @classmethod
    def find(cls, target: Target) -> Canary:
        """Find an image that the guard accepts; damaged files are made from others."""
        for seed in range(1000, 1100):
            raw = images.encoded(images.picture(seed), "PNG")
            case = _plain(CANARY, raw, target)
            [answer] = wire.send(target, case)
            if answer.verdict == "accept":
                return cls(case, json.loads(answer.body))
        raise AssertionError("the guard accepts none of a hundred pictures")

    def astray(self, answers: list[Answer]) -> bool:
        """Say whether an answer is another one than expected."""
        [answer] = answers
        if (answer.status, answer.verdict) != (200, "accept"):
            return True
        found = json.loads(answer.body)
        return list(found) != list(self.expected) or any(
            abs(found[name] - value) > TOLERANCE for name, value in self.expected.items()
        )


def run(guarded: Guarded, seed: int, count: int, progress: Progress) -> Report:
    """Send `count` cases and as many known-good images as belong between them, and add up."""
    target, report = target_of(guarded), Report()
    LEFT_BEHIND.unlink(missing_ok=True)
    canary = Canary.find(target)
    workers, start = guarded.workers(), Counts.read(guarded)
    certain, uncertain = _certain_first(cases(seed, count, target))
    _send_all(target, canary, certain, report, progress)
    middle = _settled(guarded)
    counted = middle.since(start)
    report.counted = {
        name: getattr(counted, name)
        for name in ("accept", "flag", "reject", "error", "invalid", "failed")
    }
    _send_all(target, canary, uncertain, report, progress)
    known = report.rows[CANARY].sent
    report.counted_uncertain = _settled(guarded).since(middle).total - (
        known - _canaries(len(certain))
    )
    report.verdicts["accept"] -= known - _canaries(len(certain))
    _look_around(guarded, report, workers)
    return report


def _certain_first(made: Iterable[Case]) -> tuple[list[Case], list[Case]]:
    certain: list[Case] = []
    uncertain: list[Case] = []
    for case in made:
        (uncertain if case.kind in UNCERTAIN else certain).append(case)
    return certain, uncertain


def _canaries(number: int) -> int:
    return -(-number // CANARY_EVERY)


def _send_all(
    target: Target, canary: Canary, made: list[Case], report: Report, progress: Progress
) -> None:
    sent: list[Case] = []
    for at in range(0, len(made), CANARY_EVERY):
        sent += [canary.case, *made[at : at + CANARY_EVERY]]
    with ThreadPoolExecutor(CLIENTS) as pool:
        for case, answers in zip(sent, pool.map(partial(wire.send, target), sent), strict=True):
            report.add(case, answers)
            report.canaries_astray += case.kind == CANARY and canary.astray(answers)
            progress.advance()


def _settled(guarded: Guarded) -> Counts:
    """Return the counts as soon as they have stood still for a second."""
    before = Counts.read(guarded)
    while True:
        time.sleep(1)
        after = Counts.read(guarded)
        if after == before:
            return after
        before = after


def _look_around(guarded: Guarded, report: Report, workers: list[int]) -> None:
    """Look for traces of what was sent: in the logs, in the metrics, among the processes."""
    file = guarded.server.log_file
    logs = [path.read_text(errors="replace") for path in file.parent.glob(f"{file.name}*")]
    lines = [line for log in logs for line in log.lower().splitlines()]
    report.marked_lines = sum(wire.MARKER in line for line in lines)
    report.restarts_logged = sum("worker died" in line for line in lines)
    report.workers_lost = len({*workers} - {*guarded.workers()})
    urls = (guarded.metrics_url, f"{guarded.server.metrics_url}/metrics")
    texts = [httpx.get(url, timeout=10).text.lower() for url in urls]
    report.marked_metrics = sum(text.count(wire.MARKER) for text in texts)
    report.left_behind = LEFT_BEHIND.exists()


def time_slowest(guarded: Guarded, progress: Progress) -> dict[str, list[float]]:
    """Return bytes, status and seconds of the slowest files that the limits let through."""
    target, found = target_of(guarded), {}
    for name, make in images.slowest_within_limits():
        raw = make()
        [answer] = wire.send(target, _plain("slowest", raw, target))
        found[name] = [len(raw), answer.status, round(answer.seconds, 3)]
        progress.advance()
    return found


def slowest_of(report: Report) -> str:
    """Return the name of the file that took longest."""
    return max(report.slowest, key=lambda name: report.slowest[name][2])


def time_batch(guarded: Guarded, slowest: str) -> list[float]:
    """Send a slow file a few times at once, once damaged; return how many, answers and seconds."""
    target = target_of(guarded)
    raw = dict(images.slowest_within_limits())[slowest]()
    slow, damaged = (_plain("batch", body, target) for body in (raw, raw[: len(raw) // 2]))
    made = [*[slow] * (CLIENTS - 1), damaged]
    send = partial(wire.send, target, patience=300)
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [answer for found in pool.map(send, made) for answer in found]
    answered = sum(0 < answer.status < 500 for answer in answers)
    return [len(made), answered, round(max(answer.seconds for answer in answers), 3)]


def page(report: Report, facts: dict[str, Any]) -> str:
    """Return the results as a page of tables."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    problems = report.problems()
    front = sorted(cause for cause in report.failures if "front end" in cause)
    rows = [
        f"| {kind} | {r.sent} | {r.ok} | {r.refused_by_guard} | {r.refused_by_front_end} | {r.failed} "
        f"| {r.unanswered} | {r.slowest:.2f} s |"
        for kind, r in sorted(report.rows.items())
    ]
    slow = [
        f"| {name} | {size:,.0f} | {status:.0f} | {seconds:.2f} s |"
        for name, (size, status, seconds) in sorted(report.slowest.items(), key=lambda i: -i[1][2])
    ]
    return "\n".join(
        [
            "# Hostile input against a guarded server",
            "",
            f"`{facts['command']}`, seed {facts['seed']}, {facts['date']}, {facts['cores']} cores "
            f"({facts['machine']}), {versions}.",
            "",
            f"{report.sent:,} requests, {CLIENTS} at a time, to the shipped CIFAR-10 archive with the "
            f"shipped guard and the default configuration; every {CANARY_EVERY} have a known-good image "
            "among them, which has to get the same answer throughout. "
            + (
                "**Every promise held.**" if not problems else f"**Broken: {'; '.join(problems)}.**"
            ),
            "",
            "| promise | found |",
            "|---|---|",
            f"| workers that died | {report.workers_lost} |",
            f"| known-good images answered otherwise | {report.canaries_astray} of "
            f"{report.rows[CANARY].sent} |",
            f"| 5xx by the guard or the archive's handler | "
            f"{sum(n for cause, n in report.failures.items() if 'by the guard' in cause)} |",
            f"| log lines, metrics and headers that hold what a client sent | {report.marked_lines}, "
            f"{report.marked_metrics}, {report.echoes.total()} |",
            f"| answers by verdict | {dict(sorted(report.verdicts.items()))} |".replace("'", ""),
            f"| counted by the metrics | "
            f"{dict(sorted((k, v) for k, v in report.counted.items() if v))} |".replace("'", ""),
            f"| whole requests whose answer could not be read | "
            f"{report.uncertain_requests - report.uncertain_seen}, of which "
            f"{report.counted_uncertain - report.uncertain_seen} were counted |",
            "",
            "| kind | sent | 200 | 4xx, guard | 4xx, front end | 5xx | no answer | slowest |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            "Slowest: from connecting to the answer, beside seven others. No answer: the connection "
            "was closed on a request that broke off, or a request that never ends was left after "
            f"{wire.READ_SECONDS:.0f} s.",
            "",
            "## 5xx of TorchServe's own front end",
            "",
            "Of requests that never reach a worker, so no guard can do better:",
            "",
            *[f"- {report.failures[said]} times: {said}: {_why(said)}" for said in front],
            "",
            "## The slowest files that the default limits let through",
            "",
            f"One after the other, each alone on the server. {report.batch[0]} of the slowest at once, "
            f"one of them damaged: {report.batch[1]} answered after {report.batch[2]:.1f} s. Where one "
            "of a batch fails, the others are preprocessed up to three times. TorchServe ends a worker "
            "that takes longer than its `responseTimeout`, which `pathguard serve` sets to 120 s.",
            "",
            "| file | bytes | status | answered after |",
            "|---|---|---|---|",
            *slow,
            "",
        ]
    )


def results(report: Report, facts: dict[str, Any]) -> dict[str, Any]:
    """Return all that was found as JSON."""
    found = {name: value for name, value in vars(report).items() if name != "rows"}
    rows = {kind: vars(row) for kind, row in sorted(report.rows.items())}
    return {**facts, "requests": report.sent, "problems": report.problems(), **found, "kinds": rows}


def main(
    requests: Annotated[int, typer.Option(help="Cases to send, known-good images apart.")] = 20_000,
    seed: Annotated[int, typer.Option(help="The same seed sends the same cases.")] = 0,
    name: Annotated[str, typer.Option(help="benchmarks/NAME.json and .md are written.")] = "fuzz",
) -> None:
    """Fuzz a guarded TorchServe and write what came of it; ends with 1 where a promise was broken."""
    console = Console(stderr=True)
    slow = sum(1 for _ in images.slowest_within_limits())
    with (
        shipped_archive() as archive,
        serving(archive) as guarded,
        bar(console, "Requests", requests + _canaries(requests) + slow) as progress,
    ):
        workers = guarded.workers()
        report = run(guarded, seed, requests, progress)
        report.slowest = time_slowest(guarded, progress)
        report.batch = time_batch(guarded, slowest_of(report))
        report.workers_lost = len({*workers} - {*guarded.workers()})
    facts = about(f"python -m tests.campaigns.fuzz --requests {requests} --seed {seed}", seed)
    write_results(name, results(report, facts), page(report, facts))
    for problem in report.problems():
        console.print(problem, style="red")
    raise typer.Exit(bool(report.problems()))


if __name__ == "__main__":
    typer.run(main)
