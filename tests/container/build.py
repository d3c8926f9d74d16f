"""Carry out the Dockerfile's build stage without an engine: `python -m tests.container.build DIR`.

DIR/opt/pathguard then holds what the image would hold in /opt/pathguard. In the place of the base
image stand the machine's own system and Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.container.dockerfile import ROOT, Stage, read_stages
from tests.container.room import SCRIPT, base_image, missing


def build(stage: Stage, folder: Path) -> None:
    """Copy and run what a stage copies and runs; what is in `folder` already goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    workdir, target = folder / "src", folder / "opt"
    target.mkdir(parents=True)
    for text in stage.all("COPY"):
        *sources, place = text.split()
        for source in sources:
            _copy(ROOT / source, workdir / place / (source if place.endswith("/") else ""))
    # pip unpacks gigabytes, and the room's /tmp is memory.
    path = f"{sys.base_prefix}/bin:/usr/bin:/bin"
    variables = {"PATH": path, "TMPDIR": stage.last("WORKDIR")}
    variables |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    with TemporaryDirectory(prefix="room-") as root:
        mounts = [*base_image(), f"{workdir}:{stage.last('WORKDIR')}:rw", f"{target}:/opt:rw"]
        room = ["unshare", "--mount", "--pid", "--ipc", "--fork", str(SCRIPT), root, *mounts, "--"]
        inside = ["chroot", root, "env", "-i", "-C", stage.last("WORKDIR")]
        inside += [f"{name}={value}" for name, value in variables.items()]
        for command in stage.all("RUN"):
            subprocess.run([*room, *inside, "sh", "-c", command], check=True)


def _copy(source: Path, place: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    build(read_stages()[0], Path(sys.argv[1]).absolute())
