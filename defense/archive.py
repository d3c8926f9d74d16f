"""Read TorchServe model archives (`.mar`): what is in them, and unpack them, safely."""

from __future__ import annotations

import json
import lzma
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile, ZipFile, ZipInfo

from defense.errors import ArchiveError

MANIFEST = "MAR-INF/MANIFEST.json"
HANDLER = "pathguard_handler.py"
FOLDER = "pathguard"
WRAP = f"{FOLDER}/wrap.json"
_MAX_UNPACKED = 16 << 30
_MAX_MANIFEST = 1 << 20
_UNREADABLE = (
    BadZipFile,
    EOFError,
    KeyError,
    OSError,
    OverflowError,
    RuntimeError,  # encrypted entries; its child NotImplementedError: unknown compression
    ValueError,
    lzma.LZMAError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True)
class Archive:
    """What a `.mar` says about itself; nothing of it is unpacked or imported."""

    path: Path
    manifest: dict[str, object]
    entries: tuple[str, ...]

    @property
    def model_name(self) -> str:
        return self._text("modelName") or self.path.stem

    @property
    def model_version(self) -> str:
        return self._text("modelVersion") or "1.0"  # TorchServe's own default

    @property
    def handler(self) -> str | None:
        return self._text("handler")

    @property
    def envelope(self) -> str | None:
        return self._text("envelope")

    @property
    def serialized_file(self) -> str | None:
        return self._text("serializedFile")

    @property
    def model_file(self) -> str | None:
        return self._text("modelFile")

    @property
    def is_wrapped(self) -> bool:
        return WRAP in self.entries

    def _text(self, key: str) -> str | None:
        value = model_of(self.manifest).get(key)
        return None if value is None or value == "" else str(value)


def read_archive(path: Path) -> Archive:
    """Read and check the directory and the manifest of a `.mar`."""
    with opened(path) as zipped:
        infos = zipped.infolist()
        for info in infos:
            if reason := _unsafe(info):
                raise ArchiveError(f"{path} has an unsafe entry {info.orig_filename!r}: {reason}.")
        if (total := sum(info.file_size for info in infos)) > _MAX_UNPACKED:
            raise ArchiveError(
                f"{path} would unpack to {total} bytes, more than the {_MAX_UNPACKED} allowed."
            )
        manifest = _read_manifest(path, zipped)
    return Archive(path, manifest, tuple(dict.fromkeys(info.filename for info in infos)))


def extract_archive(path: Path, folder: Path) -> Archive:
    """Unpack into an empty or new folder; of entries with one name the last wins."""
    archive = read_archive(path)
    with opened(path) as zipped:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ArchiveError(f"{folder} is not empty, so {path} is not unpacked into it.")
        for name in archive.entries:
            zipped.extract(name, folder)
    return archive


@contextmanager
def opened(path: Path) -> Iterator[ZipFile]:
    """Open for reading; whatever a damaged file provokes in zipfile becomes one sentence."""
    if not path.exists():
        raise ArchiveError(f"There is no archive at {path}.")
    if path.is_dir():
        raise ArchiveError(f"{path} is a folder, where a .mar file was expected.")
    try:
        with ZipFile(path) as zipped:
            yield zipped
    except _UNREADABLE as error:
        raise ArchiveError(f"{path} cannot be read as a zip archive ({error}).") from error


def _unsafe(info: ZipInfo) -> str | None:
    name = info.orig_filename
    if any(part in ("", ".", "..") for part in name.removesuffix("/").split("/")):
        return "a name must be relative, without '.' and '..'"
    if any(character in name for character in "\\\0") or name[1:2] == ":":
        return "a name must be relative, with '/' between its parts"
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "links and devices are not allowed"
    return "encryption is not supported" if info.flag_bits & 0x1 else None


def _read_manifest(path: Path, zipped: ZipFile) -> dict[str, object]:
    if MANIFEST not in zipped.NameToInfo:
        raise ArchiveError(
            f"{path} has no {MANIFEST}, so it is no TorchServe archive; "
            "build one with torch-model-archiver."
        )
    info = zipped.getinfo(MANIFEST)
    if info.file_size > _MAX_MANIFEST:
        raise ArchiveError(f"{MANIFEST} in {path} has {info.file_size} bytes, which is absurd.")
    manifest = parse_object(zipped.read(info), f"{MANIFEST} in {path}")
    model = manifest.get("model")
    if not isinstance(model, dict):
        raise ArchiveError(f"{MANIFEST} in {path} has no object 'model'.")
    for key, value in model.items():
        if isinstance(value, (dict, list)):
            raise ArchiveError(f"{MANIFEST} in {path} has no plain value for model.{key}.")
    return manifest


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{where} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ArchiveError(f"{where} is not a JSON object.")
    return value


def model_of(manifest: Mapping[str, object]) -> dict[str, object]:
    return cast("dict[str, object]", manifest["model"])
