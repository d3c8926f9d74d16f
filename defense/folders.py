"""Model archives that are no zip: folders (`--archive-format no-archive`) and gzipped tars (`tgz`).

TorchServe serves a folder where it lies, and strips the first part of every name in a tar.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from defense.errors import ArchiveError

LITTER = "__pycache__"
"""What Python leaves in a folder that is served; it belongs to no archive."""


def is_tar(path: Path) -> bool:
    """Say whether TorchServe would read this file as a gzipped tar: by its name, as it does."""
    return path.name.endswith((".tar.gz", ".tgz"))


def folder_sizes(folder: Path) -> dict[str, int]:
    """Return the sizes of all files in a folder by relative name; links and devices are an error."""
    sizes: dict[str, int] = {}
    try:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            found = path.lstat()
            if stat.S_ISREG(found.st_mode):
                sizes[name] = found.st_size
            elif not stat.S_ISDIR(found.st_mode):
                raise ArchiveError(
                    f"{folder} has an unsafe entry {name!r}: links and devices are not allowed."
                )
    except OSError as error:
        raise ArchiveError(f"{folder} cannot be read ({error}).") from error
    return {name: size for name, size in sizes.items() if LITTER not in name.split("/")}


def tar_sizes(path: Path) -> dict[str, int]:
    """Return the sizes of all files in a tar by the names that TorchServe unpacks them to."""
    with opened_tar(path) as tar:
        return {name: member.size for name, member in _members(path, tar).items()}


@contextmanager
def tar_entry(path: Path, name: str) -> Iterator[IO[bytes]]:
    """Open one file of a tar."""
    with opened_tar(path) as tar:
        member = tar.extractfile(_members(path, tar)[name])
        assert member is not None
        with member:
            yield member


def unpack_tar(path: Path, folder: Path) -> None:
    """Unpack a tar into a folder, each file under the name that TorchServe gives it."""
    with opened_tar(path) as tar:
        for name, member in _members(path, tar).items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None
            with source, target.open("wb") as file:
                shutil.copyfileobj(source, file)


def pack_tar(folder: Path, target: Path, top: str) -> None:
    """Write the files of a folder as a gzipped tar, below `top`; same files, same bytes."""
    with (
        target.open("wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as tar,
    ):
        for name, size in folder_sizes(folder).items():
            info = tarfile.TarInfo(f"{top}/{name}")
            info.size = size
            with (folder / name).open("rb") as content:
                tar.addfile(info, content)


@contextmanager
def opened_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open for reading; whatever a damaged file provokes becomes one sentence."""
    try:
        with tarfile.open(path, "r:gz") as tar:
            yield tar
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise ArchiveError(f"{path} cannot be read as a gzipped tar ({error}).") from error


def _members(path: Path, tar: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    members: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        if member.isdir():
            continue
        name = member.name.partition("/")[2]
        if not member.isreg() or any(part in ("", ".", "..") for part in member.name.split("/")):
            raise ArchiveError(
                f"{path} has an unsafe entry {member.name!r}: only files with relative names, "
                "without '.' and '..', are allowed."
            )
        if not name:
            raise ArchiveError(
                f"{path} has the file {member.name!r} outside of a folder, where TorchServe expects "
                "everything in one; build it with torch-model-archiver."
            )
        members[name] = member
    return members


def tree_hash(folder: Path) -> str:
    """Return the SHA-256 over the names and the contents of a folder's files."""
    whole = hashlib.sha256()
    for name in folder_sizes(folder):
        with (folder / name).open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{name}\0{content}\n".encode())
    return whole.hexdigest()
