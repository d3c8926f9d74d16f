"""Results that a killed study finds again: tensors in files named by what made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from defense.offline.training import write_tensors

Tensors = dict[str, Tensor]
PACKAGE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Store:
    """A folder of tensors. `about` is what all of them depend on: weights, images, seed."""

    folder: Path
    about: str

    def keep(self, label: str, make: Callable[[], Tensors], **depends: object) -> Tensors:
        """Return what `make` returned when it was last called for this label and `depends`.

        A file that cannot be read is made again: it was cut off.
        """
        path = self._path(label, depends)
        if not self.kept(label, **depends):
            # Copies, because safetensors refuses tensors that share memory.
            made = {
                name: value.detach().clone(memory_format=torch.contiguous_format)
                for name, value in make().items()
            }
            write_tensors(path, made, {"label": label, "depends": _canonical(depends)})
        return load_file(path)

    def keep_plain(
        self, label: str, make: Callable[[], dict[str, Any]], **depends: object
    ) -> dict[str, Any]:
        """As `keep`, for plain figures: what JSON can hold."""

        def encoded() -> Tensors:
            text = json.dumps(make()).encode()
            return {"json": torch.frombuffer(bytearray(text), dtype=torch.uint8)}

        kept = self.keep(label, encoded, **depends)["json"]
        found: dict[str, Any] = json.loads(kept.numpy().tobytes())
        return found

    def kept(self, label: str, **depends: object) -> bool:
        """Say whether a whole file for this label and `depends` is there."""
        try:
            with safe_open(self._path(label, depends), "pt"):
                return True
        except (SafetensorError, OSError):
            return False

    def _path(self, label: str, depends: dict[str, object]) -> Path:
        key = hashlib.sha256(f"{self.about}|{label}|{_canonical(depends)}".encode()).hexdigest()
        return self.folder / f"{label.replace(' ', '-').replace('/', '-')}-{key[:16]}.safetensors"


def code_digest() -> str:
    """Name the code of this package: figures that other code made are made again."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _canonical(depends: dict[str, object]) -> str:
    return json.dumps(depends, sort_keys=True, default=str)
