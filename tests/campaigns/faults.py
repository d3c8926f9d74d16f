"""Faults, caused for real on a real TorchServe: what is promised, what was seen, what shows it.

python -m tests.campaigns.faults          # writes benchmarks/faults.json and faults.md
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from defense.offline.progress import bar
from tests.campaigns import broken_parts, lost_parts
from tests.campaigns.broken_parts import Fault, Seen
from tests.campaigns.harness import about, serving, shipped_archive, write_results
from tests.campaigns.injected import FAULT_VARIABLE, HANDLER_SOURCE
from tests.campaigns.scene import CALM, Scene, noise_images

BATCH, WORKERS, DELAY_MS = 4, 2, 200
COMMAND = "python -m tests.campaigns.faults"
FAULTS: tuple[Fault, ...] = (*broken_parts.FAULTS, *lost_parts.FAULTS)


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    fault: str
    promise: str
    seen: str
    shown_by: str
    kept: bool | None
    """Whether the promise was kept; None where the fault could not be caused here."""


@contextmanager
def scene(seed: int, *, workers: int = WORKERS) -> Iterator[Scene]:
    """Serve the shipped network, with a guard whose parts fail on demand."""
    with tempfile.TemporaryDirectory() as folder, shipped_archive(HANDLER_SOURCE) as archive:
        fault = Path(folder) / "fault"
        fault.write_text("")
        os.environ[FAULT_VARIABLE] = str(fault)
        try:
            with serving(
                archive,
                defaults=CALM,
                workers=workers,
                batch_size=BATCH,
                max_batch_delay_ms=DELAY_MS,
                response_timeout_s=30,
            ) as guarded:
                yield Scene(guarded, archive, fault, noise_images(BATCH, seed))
        finally:
            del os.environ[FAULT_VARIABLE]


def cause(fault: Fault, on: Scene) -> Result:
    """Cause one fault; whatever goes wrong in doing so is a promise that was not kept."""
    try:
        seen = fault.cause(on)
    except Exception as error:
        seen = Seen(False, f"{type(error).__name__}: {error}")
    finally:
        on.fault.write_text("")
    return Result(fault.name, fault.promise, seen.text, fault.shown_by, seen.kept)


def page(results: Sequence[Result], seed: int) -> str:
    """Write the table for people."""
    words = {True: "yes", False: "**no**", None: "not run"}
    rows = [
        f"| {r.fault} | {r.promise} | {r.seen} | {words[r.kept]} | {r.shown_by} |" for r in results
    ]
    kept = sum(result.kept is True for result in results)
    return "\n".join(
        [
            "# Faults",
            "",
            f"Written by `{COMMAND} --seed {seed}` (`make faults`). Each fault was caused on a real",
            "TorchServe that served the CIFAR-10 network of the model store behind its guard with",
            f"{WORKERS} workers; {kept} of {len(results)} promises were kept. A part that fails on",
            "demand (`tests/campaigns/injected.py`) is the part itself with a `raise`, a wait or a NaN",
            "in it; all around it is the product. *Open* and *closed* are `on_error` in guard.yaml.",
            "",
            "| fault | promise | seen | kept | shown by |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main(
    seed: Annotated[int, typer.Option(help="of the images that are sent")] = 0,
    only: Annotated[str, typer.Option(help="part of the names of the faults to cause")] = "",
) -> None:
    """Cause every fault and write benchmarks/faults.json and faults.md."""
    console = Console(stderr=True)
    chosen = [fault for fault in FAULTS if only in fault.name]
    results = []
    with bar(console, "causing faults", len(chosen)) as progress, scene(seed) as on:
        for fault in chosen:
            results.append(cause(fault, on))
            progress.advance()
    if not only:
        rows = {"about": about(COMMAND, seed), "faults": [asdict(result) for result in results]}
        write_results("faults", rows, page(results, seed))
    for result in results:
        console.print(f"{result.kept}  {result.fault}: {result.seen}", markup=False)
    if any(result.kept is False for result in results):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
