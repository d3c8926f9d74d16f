"""What several commands share: where they print, and options that mean the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console(stderr=True)
"""Progress and advice go to stderr; results go to stdout."""
out = Console()

ArchiveFile = Annotated[
    Path, typer.Argument(help="A TorchServe archive: a .mar, a folder or a .tar.gz.")
]
Data = Annotated[
    Path,
    typer.Option(help="Images: a folder or a zip, one folder per class (or DATA.zip/FOLDER)."),
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same artefact.")]
Part = Annotated[
    str | None,
    typer.Option(
        help="Use one of several disjoint parts of the images only, or some: such as 1/2 or 1-4/5."
    ),
]
Eps = Annotated[
    str, typer.Option(help="Largest change of a pixel, of 1 or as a fraction such as 8/255.")
]


def advise(command: str) -> None:
    console.print(f"Next: [bold]{command}[/bold]", soft_wrap=True, highlight=False)
