"""Small model archives for tests, made by torch-model-archiver itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch


def build_archive(
    folder: Path,
    *,
    handler: str | Path = "image_classifier",
    model_file_source: str | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    serialized_file: Path | None = None,
    extra_files: Sequence[Path] = (),
    config_file: Path | None = None,
    name: str = "tiny",
    version: str = "1.0",
) -> Path:
    """Build `folder/<name>.mar`.

    `handler` is the name of one of TorchServe's own or the path of a file; an entry point is named
    without the file's suffix, as in `folder/my_handler:entry`.
    The weights are `state_dict`, saved as `model.pt`, or any ready `serialized_file`.
    """
    with TemporaryDirectory() as private:
        # torch-model-archiver deletes <temporary folder>/<model name> before it builds.
        sources, scratch = Path(private, "sources"), Path(private, "scratch")
        sources.mkdir()
        scratch.mkdir()
        arguments = {"--model-name": name, "--version": version, "--handler": str(handler)}
        if model_file_source is not None:
            arguments["--model-file"] = str(sources / "model.py")
            (sources / "model.py").write_text(model_file_source)
        if state_dict is not None:
            serialized_file = sources / "model.pt"
            torch.save(dict(state_dict), serialized_file)
        if serialized_file is not None:
            arguments["--serialized-file"] = str(serialized_file)
        if config_file is not None:
            arguments["--config-file"] = str(config_file)
        if extra_files:
            arguments["--extra-files"] = ",".join(map(str, extra_files))
        main = "from model_archiver.model_packaging import generate_model_archive as g; g()"
        options = [word for pair in arguments.items() for word in pair]
        subprocess.run(
            [sys.executable, "-c", main, *options, "--export-path", str(folder), "--force"],
            env={**os.environ, "TMPDIR": str(scratch)},
            check=True,
        )
    return folder / f"{name}.mar"
