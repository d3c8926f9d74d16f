"""Read TorchServe model archives: what is in them, and unpack them, safely.

Most are zip files (`.mar`); `defense.folders` reads the others.
"""

from __future__ import annotations

import json
import lzma
import shutil
import stat
import struct
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast
from zipfile import BadZipFile, ZipFile, ZipInfo

from defense.errors import ArchiveError
from defense.folders import folder_sizes, is_tar, tar_entry, tar_sizes, unpack_tar

MANIFEST = "MAR-INF/MANIFEST.json"
HANDLER = "pathguard_handler.py"
FOLDER = "pathguard"
WRAP = f"{FOLDER}/wrap.json"
_MAX_UNPACKED = 16 << 30
_MAX_RATIO = 200
_RATIO_FROM = 64 << 20
_MAX_ENTRIES = 100_000
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
    """What an archive says about itself; nothing of it is unpacked or imported."""

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
    """Read and check the directory and the manifest of an archive: a `.mar`, a folder or a tar."""
    if not path.exists():
        raise ArchiveError(f"There is no archive at {path}.")
    if not (path.is_dir() or path.is_file()):
        raise ArchiveError(f"{path} is a device or a pipe, where an archive was expected.")
    if path.is_dir() or is_tar(path):
        sizes = folder_sizes(path) if path.is_dir() else tar_sizes(path)
        entries, unpacked = tuple(sizes), sum(sizes.values())
    else:
        with opened(path) as zipped:
            infos = zipped.infolist()
        for info in infos:
            if reason := _unsafe(info):
                raise ArchiveError(f"{path} has an unsafe entry {info.orig_filename!r}: {reason}.")
        unpacked = sum(info.file_size for info in infos)
        entries = tuple(dict.fromkeys(info.filename for info in infos))
    _check_extent(path, entries, unpacked)
    return Archive(path, _read_manifest(path, entries), entries)


def _check_extent(path: Path, entries: Sequence[str], unpacked: int) -> None:
    """Refuse an archive that would fill the disk, or come out differently on another one."""
    if unpacked > _MAX_UNPACKED:
        raise ArchiveError(
            f"{path} would unpack to {unpacked} bytes, more than the {_MAX_UNPACKED} allowed."
        )
    packed = unpacked if path.is_dir() else path.stat().st_size
    if unpacked > max(_RATIO_FROM, _MAX_RATIO * packed):
        raise ArchiveError(
            f"{path} would unpack to {unpacked // packed} times its size, as only zip bombs do."
        )
    if len(entries) > _MAX_ENTRIES:
        raise ArchiveError(
            f"{path} has {len(entries)} entries, more than the {_MAX_ENTRIES} allowed."
        )
    folded: dict[str, str] = {}
    for name in entries:
        other = folded.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise ArchiveError(
                f"{path} has entries {other!r} and {name!r}, which are one file where case does not "
                "count; rename one."
            )


def extract_archive(path: Path, folder: Path) -> Archive:
    """Unpack into an empty or new folder; of entries with one name the last wins."""
    archive = read_archive(path)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ArchiveError(f"{folder} is not empty, so {path} is not unpacked into it.")
    if path.is_dir():
        for name in archive.entries:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path / name, folder / name)
    elif is_tar(path):
        unpack_tar(path, folder)
    else:
        with opened(path) as zipped:
            for name in archive.entries:
                zipped.extract(name, folder)
    return archive


@contextmanager
def opened_entry(path: Path, name: str) -> Iterator[IO[bytes]]:
    """Open one entry of an archive for reading."""
    if path.is_dir():
        try:
            with (path / name).open("rb") as file:
                yield file
        except OSError as error:
            raise ArchiveError(f"{path / name} cannot be read ({error}).") from error
    elif is_tar(path):
        with tar_entry(path, name) as file:
            yield file
    else:
        with opened(path) as zipped, zipped.open(name) as file:
            yield file


@contextmanager
def opened(path: Path) -> Iterator[ZipFile]:
    """Open a `.mar`; whatever a damaged file provokes in zipfile becomes one sentence."""
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


def _read_manifest(path: Path, entries: Sequence[str]) -> dict[str, object]:
    if MANIFEST not in entries:
        raise ArchiveError(
            f"{path} has no {MANIFEST}, so it is no TorchServe archive; "
            "build one with torch-model-archiver."
        )
    with opened_entry(path, MANIFEST) as file:
        content = file.read(_MAX_MANIFEST + 1)
    if len(content) > _MAX_MANIFEST:
        raise ArchiveError(f"{MANIFEST} in {path} has over {_MAX_MANIFEST} bytes, which is absurd.")
    manifest = parse_object(content, f"{MANIFEST} in {path}")
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
