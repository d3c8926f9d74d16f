"""A long run at saturation with mixed traffic: does every count agree, and does nothing grow?

The audit trail is on, and its lines are one of the counts.

python -m tests.campaigns.soak            # writes benchmarks/soak.json and soak.md
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console

from defense.offline.progress import Progress, bar
from defense.trail import read_trail
from tests.campaigns.harness import Counts, Guarded, about, serving, write_results
from tests.campaigns.traffic import (
    BLOCK,
    BURST,
    BURST_LENGTH,
    CALM,
    MAX_BYTES,
    MIX,
    Done,
    Load,
    digits_archive,
)
from tests.e2e.requests import scrape, total

WORKERS, QUEUE, BATCH, DELAY_MS = 2, 32, 8, 2
PARTS = 10
STARTUP_S = 600
MOST_GROWTH = 0.02
MOST_RISE = 1.25
SAMPLE_SECONDS = 0.5
COMMAND = "python -m tests.campaigns.soak"
DEFAULTS = {
    "flag": {"target_fpr": 0.05},
    "reject": {"target_fpr": 0.01},
    "limits": {"max_bytes": MAX_BYTES},
}
AUDIT = {"max_mib": 1024}
"""Enough that no line is rotated away before it is counted."""
WRITING_SECONDS = 60
"""What the thread that writes the trail may take for what is left at the end."""


@dataclass(frozen=True)
class Sample:
    """What one worker, or TorchServe itself (`pid` of its JVM), held at a moment."""

    at: float
    pid: int
    rss_mb: float
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Part:
    """One tenth of a run. Latencies are of requests outside of bursts that were answered."""

    seconds: float
    per_second: float
    p50_ms: float
    p99_ms: float
    overload: int
    rss_mb: list[float]
    descriptors: list[int]
    threads: list[int]
    server_descriptors: int


@dataclass(frozen=True)
class Check:
    """Two counts that have to be the same."""

    of: str
    clients: int
    counted: int


@dataclass(frozen=True)
class Soak:
    """What a run found."""

    requests: int
    seconds: float
    statuses: dict[str, int]
    lost: dict[str, int]
    checks: list[Check]
    same_workers: bool
    parts: list[Part]

    @property
    def growth(self) -> list[float]:
        """By how much each worker's memory grew over the second half of the run, as a share."""
        half, last = self.parts[PARTS // 2].rss_mb, self.parts[-1].rss_mb
        return [end / begin - 1 for begin, end in zip(half, last, strict=True)]

    @property
    def rise(self) -> float:
        """The median p99 of the second half's parts over that of the first half's."""
        p99 = [part.p99_ms for part in self.parts]
        return statistics.median(p99[PARTS // 2 :]) / max(
            statistics.median(p99[: PARTS // 2]), 1e-9
        )

    def kept(self, *, long: bool = True) -> dict[str, bool]:
        """Say which promises were kept; those about growth need a `long` run."""
        half, last = self.parts[PARTS // 2], self.parts[-1]
        counts = {
            "every request was answered": not self.lost,
            "all counts agree": all(c.clients == c.counted for c in self.checks),
            "no worker died": self.same_workers,
            "no 5xx but TorchServe's own 503 of a full queue": all(
                status < "500" or status == "503 overload" for status in self.statuses
            ),
        }
        flat = {
            f"memory grew by less than {MOST_GROWTH:.0%} over the second half": max(self.growth)
            < MOST_GROWTH,
            "descriptors and threads of the workers are flat": (half.descriptors, half.threads)
            == (last.descriptors, last.threads),
            f"p99 of the second half at most {MOST_RISE:g} times that of the first": self.rise
            <= MOST_RISE,
        }
        return counts | flat if long else counts


@contextmanager
def sampled(guarded: Guarded) -> Iterator[list[Sample]]:
    """Look at the workers and at the server all the time that the block runs."""
    process = guarded.server._process
    assert process is not None
    watched = [psutil.Process(pid) for pid in [*guarded.workers(), process.pid]]
    samples: list[Sample] = []
    stopped = threading.Event()

    def look() -> None:
        while True:
            for one in watched:
                try:
                    rss, files, threads = one.memory_info().rss, one.num_fds(), one.num_threads()
                except psutil.NoSuchProcess:
                    continue
                samples.append(Sample(time.monotonic(), one.pid, rss / 2**20, files, threads))
            if stopped.wait(SAMPLE_SECONDS):
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield samples
    finally:
        stopped.set()
        thread.join()


def torchserve_counts(guarded: Guarded) -> Counter[str]:
    """Return TorchServe's own counters: requests by the class of their status, and predictions."""
    url = f"{guarded.server._url(guarded.server.settings.metrics_port)}/metrics"
    found: Counter[str] = Counter()
    for (name, _), value in scrape(url).items():
        if name.startswith("Requests") or name == "ts_inference_requests_total":
            found[name] += int(value)
    return found


def trail_lines(guarded: Guarded, expected: int) -> int:
    """Return the incidents in the trail and those that were counted as lost, when all are written."""
    deadline = time.monotonic() + WRITING_SECONDS
    while True:
        lost = int(total(guarded.metrics_url, "pathguard_audit_total", result="lost"))
        found = len(read_trail(guarded.trail).incidents) + lost
        if found >= expected or time.monotonic() > deadline:
            return found
        time.sleep(1)


def reconcile(load: Load, guard: Counts, server: Counter[str]) -> list[Check]:
    """Hold what the clients saw against what the guard and the server counted."""
    done = load.done
    predictions = [one for one in done if one.kind != "describe"]

    def seen(*verdicts: str) -> int:
        return sum(one.verdict in verdicts for one in predictions)

    def of_status(first: int) -> int:
        return sum(one.status // 100 == first for one in done)

    describe = [o for o in done if o.kind == "describe" and o.status == 200]
    verdicts = ("accept", "flag", "reject", "error", "invalid")
    answered = sum(not one.overload for one in done)
    return [
        *(Check(f"guard: {name}", seen(name), getattr(guard, name)) for name in verdicts),
        Check("guard: failed", seen("failed"), guard.failed),
        Check("guard: describe calls", len(describe), guard.passed),
        Check("guard: all", answered, guard.total),
        Check("TorchServe: predictions", len(predictions), server["ts_inference_requests_total"]),
        *(
            Check(f"TorchServe: {n}xx", of_status(n), server[f"Requests{n}XX_total"])
            for n in (2, 4, 5)
        ),
    ]


def soak(
    archive: Path, bodies: dict[str, list[bytes]], *, requests: int, seed: int, progress: Progress
) -> Soak:
    """Send `requests` of the mix to a guarded server and say what came of them."""
    with serving(
        archive,
        defaults=DEFAULTS,
        audit=AUDIT,
        workers=WORKERS,
        queue=QUEUE,
        batch_size=BATCH,
        max_batch_delay_ms=DELAY_MS,
        startup_timeout_s=STARTUP_S,
    ) as guarded:
        workers = guarded.workers()
        load = Load(guarded, bodies, requests, seed, progress)
        with sampled(guarded) as samples:
            guard, server = Counts.read(guarded), torchserve_counts(guarded)
            begun = time.monotonic()
            load.run()
            seconds = time.monotonic() - begun
            guard = Counts.read(guarded).since(guard)
            server = torchserve_counts(guarded) - server
            server["Requests2XX_total"] -= 1  # the first look at these counters counts itself
        same = guarded.workers() == workers
        checks = reconcile(load, guard, server)
        incidents = sum(one.verdict not in ("", "accept") for one in load.done)
        checks.append(Check("audit trail: lines", incidents, trail_lines(guarded, incidents)))
    statuses = Counter(
        f"{one.status} {one.verdict or ('overload' if one.overload else one.kind)}"
        for one in load.done
    )
    return Soak(
        requests,
        round(seconds, 1),
        dict(sorted(statuses.items())),
        dict(load.lost),
        checks,
        same,
        parts(load.done, samples, workers),
    )


def parts(done: Sequence[Done], samples: Sequence[Sample], workers: Sequence[int]) -> list[Part]:
    """Return a run's tenths, each of as many requests."""
    ordered = sorted(done, key=lambda one: one.at)
    size = len(ordered) // PARTS
    tenths = [ordered[n * size : (n + 1) * size] for n in range(PARTS)]
    edges = [tenth[0].at for tenth in tenths] + [float("inf")]
    return [
        _part(tenth, [s for s in samples if begin <= s.at < end], workers)
        for tenth, begin, end in zip(tenths, edges, edges[1:], strict=False)
    ]


def _part(tenth: Sequence[Done], samples: Sequence[Sample], workers: Sequence[int]) -> Part:
    seconds = max(one.at + one.seconds for one in tenth) - tenth[0].at
    took = sorted(one.seconds for one in tenth if not one.burst and one.status != 503) or [0.0]
    own = [[s for s in samples if s.pid == pid] for pid in workers]
    server = [s.descriptors for s in samples if s.pid not in workers]
    return Part(
        seconds=round(seconds, 2),
        per_second=round(len(tenth) / seconds, 1),
        p50_ms=round(1000 * took[len(took) // 2], 2),
        p99_ms=round(1000 * took[int(0.99 * len(took))], 2),
        overload=sum(one.overload for one in tenth),
        rss_mb=[round(statistics.median([s.rss_mb for s in of] or [0]), 2) for of in own],
        # Whoever reads the metrics holds a descriptor and a thread for a moment; a leak would stay.
        descriptors=[int(statistics.median([s.descriptors for s in of] or [0])) for of in own],
        threads=[int(statistics.median([s.threads for s in of] or [0])) for of in own],
        server_descriptors=int(statistics.median(server or [0])),
    )


def page(found: Soak, seed: int) -> str:
    """Write the tables for people."""
    mix = ", ".join(f"{percent} % {kind}" for kind, percent in MIX.items())
    growth = ", ".join(f"{share:+.2%}" for share in found.growth)
    tenths = [
        f"| {n} | {p.per_second:g} | {p.p50_ms:g} | {p.p99_ms:g} | {p.overload} | "
        f"{' / '.join(f'{m:.1f}' for m in p.rss_mb)} | {' / '.join(map(str, p.descriptors))} | "
        f"{' / '.join(map(str, p.threads))} | {p.server_descriptors} |"
        for n, p in enumerate(found.parts, 1)
    ]
    return "\n".join(
        [
            "# Soak",
            "",
            f"Written by `{COMMAND} --requests {found.requests} --seed {seed}` (`make soak`):",
            f"{found.requests:,} requests in {found.seconds:g} s to the demo's guarded network with",
            f"{WORKERS} workers, room for {QUEUE} waiting requests and an audit trail. {mix}.",
            f"{CALM} clients are always at work; of every {BLOCK} requests {BURST_LENGTH} are a burst",
            f"of {BURST} clients at once. Clients, server and workers share the machine.",
            "",
            "| promise | kept |",
            "|---|---|",
            *(f"| {what} | {'yes' if so else '**no**'} |" for what, so in found.kept().items()),
            "",
            f"Over the second half of the run memory of the workers: {growth}; p99 against the first",
            f"half: {found.rise:.2f}. All that runs on the machine shows in the rates and latencies",
            "below: compare tenths by their requests/s.",
            "",
            "## Counts",
            "",
            "| count | clients | metric |",
            "|---|---|---|",
            *(f"| {c.of} | {c.clients:,} | {c.counted:,} |" for c in found.checks),
            "",
            "| status and verdict | requests |",
            "|---|---|",
            *(f"| {status} | {count:,} |" for status, count in found.statuses.items()),
            "",
            "*Overload* is TorchServe's own 503 for a request that finds its queue full: it never",
            "reaches a worker, so the guard does not count it.",
            "",
            "## By tenths of the run",
            "",
            "Latencies are of answered requests outside of bursts. Two figures are of two workers.",
            "",
            "| tenth | requests/s | p50 ms | p99 ms | overload | memory MB | descriptors | threads "
            "| descriptors of the JVM |",
            "|---|---|---|---|---|---|---|---|---|",
            *tenths,
            "",
        ]
    )


def main(
    requests: Annotated[int, typer.Option(min=PARTS, help="how many to send")] = 100_000,
    seed: Annotated[int, typer.Option(help="of the network, the guard and the mix")] = 0,
) -> None:
    """Send mixed traffic at saturation and write benchmarks/soak.json and soak.md."""
    console = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory() as work,
        bar(console, "sending requests", requests) as progress,
    ):
        archive, bodies = digits_archive(Path(work), seed=seed, trained=True)
        found = soak(archive, bodies, requests=requests, seed=seed, progress=progress)
    rows = {
        "about": about(COMMAND, seed),
        "kept": found.kept(),
        "growth": found.growth,
        "p99_rise": found.rise,
    }
    write_results("soak", rows | asdict(found), page(found, seed))
    for what, so in found.kept().items():
        console.print(f"{so}  {what}", markup=False)
    if not all(found.kept().values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
