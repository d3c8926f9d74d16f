"""Guard an archive of every kind on real TorchServes, and write down what became of requests.

python -m tests.archives          # writes benchmarks/archives.json and archives.md
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console

from defense.offline.progress import bar
from tests.archives.kinds import KINDS, REFUSED
from tests.archives.trial import (
    FIT,
    SENT,
    Result,
    guard,
    refusal,
    served,
    servers,
    try_out,
    write_images,
)
from tests.campaigns.harness import RESULTS, about, write_results

COMMAND = "python -m tests.archives"


def described(result: Result) -> dict[str, Any]:
    """Return a row of the results."""
    return {
        "kind": result.kind.name,
        "what": result.kind.what,
        "doctor": result.guarded.doctor,
        "views": result.guarded.views,
        "identical": [result.identical, result.accepted],
        "noise": list(result.noise),
        "garbage": result.garbage,
        "batch": list(result.batch),
        "counted_once": result.counted,
        "unwraps": result.guarded.unwraps,
        "kept": result.kept,
    }


def row(result: dict[str, Any]) -> str:
    """Write a row of the table for people."""
    words = {True: "yes", False: "**no**"}
    batch = "one at a time" if not result["batch"] else ", ".join(map(str, result["batch"]))
    cells = [
        result["what"],
        result["views"],
        "{} of {}".format(*result["identical"]),
        ", ".join(map(str, result["noise"])),
        result["garbage"],
        batch,
        words[result["counted_once"]],
        words[result["unwraps"]],
        words[result["kept"]],
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def page(results: Sequence[dict[str, Any]], refused: dict[str, str]) -> str:
    """Write the tables for people."""
    kept = sum(result["kept"] for result in results)
    return "\n".join(
        [
            "# Archives",
            "",
            f"Written by `{COMMAND}` (`make archives`). torch-model-archiver built each archive around",
            f"a small network for digits. It was examined as `pathguard doctor` does, fitted to {FIT}",
            "images through its own handler, wrapped, served by a real TorchServe beside its original,",
            f"and unwrapped. {kept} of {len(results)} kinds kept every promise:",
            "",
            f"* {SENT} accepted answers are those of the original, to the byte;",
            "* noise gets 403, and bytes that are no image a 4xx;",
            "* so they do in one batch of a digit, noise, no image, and a digit;",
            "* every scored request is counted once, for the version that scored it;",
            "* unwrapping gives back the original, byte for byte.",
            "",
            "| archive | rows per request | identical answers | noise | no image | in one batch | "
            "counted once | unwraps | kept |",
            "|---|---|---|---|---|---|---|---|---|",
            *map(row, results),
            "",
            "What cannot be guarded is refused by `pathguard doctor`, before there is anything to wrap:",
            "",
            "| archive | reason |",
            "|---|---|",
            *(f"| {name} | {reason} |" for name, reason in refused.items()),
            "",
        ]
    )


def earlier() -> dict[str, dict[str, Any]]:
    """Return the rows of the last results by kind."""
    path = RESULTS / "archives.json"
    rows = json.loads(path.read_text())["kinds"] if path.is_file() else []
    return {row["kind"]: row for row in rows}


def main(
    only: Annotated[
        str, typer.Option(help="Kinds, separated by commas; the rows of others are kept.")
    ] = "",
) -> None:
    """Try every kind of archive and write benchmarks/archives.json and archives.md."""
    console = Console(stderr=True)
    names = only.split(",") if only else [kind.name for kind in KINDS]
    kinds = [kind for kind in KINDS if kind.name in names]
    rows = {name: found for name, found in earlier().items() if name not in names}
    with TemporaryDirectory() as place, bar(console, "archives", 2 * len(kinds)) as progress:
        folder = Path(place)
        refused = {
            one.name: refusal(one, folder / one.name).replace(f"{folder}/", "") for one in REFUSED
        }
        images, requests = write_images(folder / "images")
        for group in servers(kinds):
            found = []
            for kind in group:
                found.append(guard(kind, folder / kind.name, images))
                progress.advance()
            with served(found, folder) as server:
                for one in found:
                    rows[one.kind.name] = described(try_out(server, one, requests))
                    progress.advance()
            results = [rows[kind.name] for kind in KINDS if kind.name in rows]
            content = {"about": about(COMMAND, 0), "kinds": results, "refused": refused}
            write_results("archives", content, page(results, refused))
    console.print((RESULTS / "archives.md").read_text(), markup=False)
    if not all(row["kept"] for row in rows.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
