"""Small model archives for tests, made by torch-model-archiver itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from defense.offline.archiver import make_archive

SUFFIXES = {"no-archive": "", "tgz": ".tar.gz"}


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
    requirements_file: Path | None = None,
    archive_format: str = "default",
) -> Path:
    """Build `folder/<name>.mar`, or a folder or tar of that name where another format is asked.

    `handler` is the name of one of TorchServe's own or the path of a file; an entry point is named
    without the file's suffix, as in `folder/my_handler:entry`.
    The weights are `state_dict`, saved as `model.pt`, or any ready `serialized_file`.
    """
    target = folder / f"{name}{SUFFIXES.get(archive_format, '.mar')}"
    with TemporaryDirectory() as private:
        sources = Path(private)
        model_file = None
        if model_file_source is not None:
            model_file = sources / "model.py"
            model_file.write_text(model_file_source)
        if state_dict is not None:
            serialized_file = sources / "model.pt"
            torch.save(dict(state_dict), serialized_file)
        make_archive(
            target,
            handler=str(handler),
            model_file=model_file,
            serialized_file=serialized_file,
            extra_files=extra_files,
            config_file=config_file,
            version=version,
            requirements_file=requirements_file,
            archive_format=archive_format,
        )
    return target
