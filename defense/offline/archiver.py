"""Make an ordinary TorchServe archive with torch-model-archiver, as its users do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from defense.errors import ArchiveError


def make_archive(
    target: Path,
    *,
    handler: str,
    model_file: Path | None = None,
    serialized_file: Path | None = None,
    extra_files: Sequence[Path] = (),
    config_file: Path | None = None,
    version: str = "1.0",
    requirements_file: Path | None = None,
    archive_format: str = "default",
) -> None:
    """Write the archive `target`; its model is called as the file.

    handler: the name of one of TorchServe's own, or a file's path. archive_format: one of
    torch-model-archiver's; `target` ends as that format does (in .mar, in .tar.gz, or as a folder).
    """
    arguments = {
        "--model-name": target.name.removesuffix(".mar").removesuffix(".tar.gz"),
        "--archive-format": archive_format,
        "--version": version,
        "--handler": handler,
        "--export-path": str(target.parent),
    }
    optional = {
        "--model-file": model_file,
        "--serialized-file": serialized_file,
        "--config-file": config_file,
        "--requirements-file": requirements_file,
        "--extra-files": ",".join(map(str, extra_files)) or None,
    }
    arguments |= {name: str(value) for name, value in optional.items() if value is not None}
    code = "from model_archiver.model_packaging import generate_model_archive as g; g()"
    words = [word for pair in arguments.items() for word in pair]
    target.parent.mkdir(parents=True, exist_ok=True)
    # The archiver deletes <temporary folder>/<model name> before it builds: give it one of its own.
    with TemporaryDirectory() as scratch:
        done = subprocess.run(
            [sys.executable, "-c", code, *words, "--force"],
            env={**os.environ, "TMPDIR": scratch},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ArchiveError(f"torch-model-archiver could not write {target}: {reason}")
