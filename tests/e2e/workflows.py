"""Workflow archives of two models in a row, made by torch-workflow-archiver itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SPECIFICATION = """\
models:
  min-workers: 1
  max-workers: 1
  batch-size: 1
  max-batch-delay: 10
  retry-attempts: 1
  timeout-ms: 170000
  first:
    url: {first}
  second:
    url: {second}
dag:
  first: [second]
"""

ECHO_HANDLER = """
class Echo:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        return [bytes(row.get("data") or row.get("body")) for row in data]
"""


def build_workflow(folder: Path, name: str, first: str, second: str) -> Path:
    """Build `folder/<name>.war`, in which `second` gets what `first` answered; both are .mar names."""
    specification = folder / f"{name}.yaml"
    specification.write_text(SPECIFICATION.format(first=first, second=second))
    handler = folder / "no_functions.py"  # the archiver wants one, also where no node is a function
    handler.touch()
    subprocess.run(
        [
            Path(sys.executable).with_name("torch-workflow-archiver"),
            *("--workflow-name", name),
            *("--spec-file", specification),
            *("--handler", handler),
            *("--export-path", folder),
        ],
        check=True,
        capture_output=True,
    )
    return folder / f"{name}.war"
