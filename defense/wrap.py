"""Wrap an archive around a guard, and unwrap it, byte for byte.

A wrapped archive is the original's bytes up to its central directory, then our entries, then a new
directory. TorchServe streams through the entries and overwrites what it has already written, so our
manifest, the later one, wins; and the original is still in there, byte for byte.

A folder is copied with our files beside its own, and its manifest is kept with ours; a gzipped tar is
packed anew and carries its original, for nothing else gives back the same compressed bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory, mkstemp
from zipfile import ZipFile, ZipInfo

from defense.archive import (
    FOLDER,
    HANDLER,
    MANIFEST,
    WRAP,
    Archive,
    model_of,
    opened_entry,
    parse_object,
    read_archive,
)
from defense.errors import ArchiveError
from defense.folders import LITTER, folder_sizes, is_tar, pack_tar, tree_hash, unpack_tar
from defense.obstacles import archive_obstacles

_TAIL = f"{FOLDER}/original_tail.bin"
_CONFIG = f"{FOLDER}/guard.yaml"
_GUARD_FILES = ("guard.json", "tensors.safetensors")
_SCHEMA = 1
_MAX_FACTS = 1 << 22


@dataclass(frozen=True)
class WrapFacts:
    """What a wrapped archive remembers of its original (`pathguard/wrap.json`)."""

    schema: int
    inner_handler: str
    manifest: dict[str, object]
    original_size: int
    original_sha256: str
    tail_offset: int
    pathguard_version: str


def wrap_archive(
    source: Path,
    target: Path,
    *,
    guard_folder: Path,
    handler_source: str,
    guard_config: bytes | None = None,
) -> None:
    """Write the guarded `target`: all of `source`, then the guard and the handler that asks it."""
    archive = read_archive(source)
    if obstacles := archive_obstacles(archive):
        raise ArchiveError(obstacles[0])
    contents: dict[str, bytes | Path] = dict(_guard_files(guard_folder))
    if guard_config is not None:
        contents[_CONFIG] = guard_config
    contents[HANDLER] = handler_source.encode()
    contents[MANIFEST] = _json(
        {**archive.manifest, "model": {**model_of(archive.manifest), "handler": HANDLER}}
    )
    if source.is_dir():
        with _replacing_folder(target, source) as folder:
            manifest = (folder / MANIFEST).read_bytes()
            facts = _facts(archive, sum(folder_sizes(folder).values()), tree_hash(folder), 0)
            _write(folder, contents | {_TAIL: manifest, WRAP: _json(asdict(facts))})
        return
    with _replacing(target, source) as draft:
        if is_tar(source):
            _wrap_tar(archive, draft, contents)
            return
        facts, tail = _remember(archive, draft)
        contents |= {_TAIL: tail, WRAP: _json(asdict(facts))}
        with ZipFile(draft, "a") as zipped:
            _forget(zipped, MANIFEST)
            for name, content in sorted(contents.items()):
                _append(zipped, name, content)


def unwrap_archive(source: Path, target: Path) -> None:
    """Write to `target` the archive that was wrapped into `source`, byte for byte."""
    if not read_archive(source).is_wrapped:
        raise ArchiveError(f"{source} is not wrapped, so there is nothing to unwrap.")
    with opened_entry(source, WRAP) as file:
        facts = _parse_facts(file.read(_MAX_FACTS), f"{WRAP} in {source}")
    with opened_entry(source, _TAIL) as file:
        # What was put in cannot be larger than all of it; a bomb ends in another hash.
        tail = file.read(max(source.stat().st_size, _MAX_FACTS))
    if source.is_dir():
        with _replacing_folder(target, source) as folder:
            shutil.rmtree(folder / FOLDER)
            (folder / HANDLER).unlink(missing_ok=True)
            (folder / MANIFEST).write_bytes(tail)
            if tree_hash(folder) != facts.original_sha256:
                raise _changed(source, facts)
        return
    with _replacing(target, source) as draft:
        intact = 0 <= facts.tail_offset < draft.stat().st_size
        if intact:
            with draft.open("r+b") as file:
                file.truncate(facts.tail_offset)
                file.seek(facts.tail_offset)
                file.write(tail)
        if not intact or _sha256(draft) != facts.original_sha256:
            raise _changed(source, facts)


def _changed(source: Path, facts: WrapFacts) -> ArchiveError:
    return ArchiveError(
        f"{source} was changed after it was wrapped: what it holds is no longer the "
        f"original with SHA-256 {facts.original_sha256}."
    )


def _wrap_tar(archive: Archive, draft: Path, contents: Mapping[str, bytes | Path]) -> None:
    """Pack a tar anew with our files in it; the whole original is what leads back to it."""
    original = draft.read_bytes()
    facts = _facts(archive, len(original), hashlib.sha256(original).hexdigest(), 0)
    with TemporaryDirectory(dir=draft.parent) as scratch:
        folder = Path(scratch)
        unpack_tar(draft, folder)
        _write(folder, {**contents, _TAIL: original, WRAP: _json(asdict(facts))})
        pack_tar(folder, draft, archive.model_name)


def _write(folder: Path, contents: Mapping[str, bytes | Path]) -> None:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())


def read_wrap_facts(folder: Path) -> WrapFacts:
    """Read `pathguard/wrap.json` of an archive that is unpacked in `folder`."""
    path = folder / WRAP
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArchiveError(
            f"{path} cannot be read ({error.strerror}); only wrapped archives have it."
        ) from error
    return _parse_facts(content, str(path))


def _parse_facts(content: bytes, where: str) -> WrapFacts:
    raw = parse_object(content, where)
    if raw.get("schema") != _SCHEMA:
        raise ArchiveError(
            f"{where} has schema {raw.get('schema')!r}, and this version of PathGuard reads "
            f"{_SCHEMA}; wrap the original again."
        )
    kinds = {
        "schema": int,
        "inner_handler": str,
        "manifest": dict,
        "original_size": int,
        "original_sha256": str,
        "tail_offset": int,
        "pathguard_version": str,
    }
    for key, kind in kinds.items():
        if not isinstance(raw.get(key), kind):
            raise ArchiveError(f"{where} has {raw.get(key)!r} where {key} should be.")
    return WrapFacts(**{key: raw[key] for key in kinds})


def _guard_files(folder: Path) -> dict[str, Path]:
    """Name the regular files of a guard folder as they are called inside an archive."""
    found = {
        f"{FOLDER}/{path.relative_to(folder).as_posix()}": path
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }
    for name in _GUARD_FILES:
        if f"{FOLDER}/{name}" not in found:
            raise ArchiveError(f"{folder} is no guard folder: it has no {name}.")
    for name in (WRAP, _TAIL):
        if name in found:
            raise ArchiveError(f"{found[name]} has a name that wrapping needs for itself.")
    return found


def _remember(archive: Archive, copy: Path) -> tuple[WrapFacts, bytes]:
    """Take down, from a copy that nobody else writes, what leads back to the original."""
    with ZipFile(copy) as zipped:
        offset = zipped.start_dir
    with copy.open("rb") as file:
        file.seek(offset)
        tail = file.read()
    return _facts(archive, offset + len(tail), _sha256(copy), offset), tail


def _facts(archive: Archive, size: int, sha256: str, tail_offset: int) -> WrapFacts:
    return WrapFacts(
        schema=_SCHEMA,
        inner_handler=archive.handler or "",
        manifest=archive.manifest,
        original_size=size,
        original_sha256=sha256,
        tail_offset=tail_offset,
        pathguard_version=_version(),
    )


def _forget(zipped: ZipFile, name: str) -> None:
    """Take a name out of the directory that will be written; its bytes stay where they are."""
    zipped.filelist[:] = [info for info in zipped.filelist if info.filename != name]
    zipped.NameToInfo.pop(name, None)


def _append(zipped: ZipFile, name: str, content: bytes | Path) -> None:
    """Store an entry uncompressed and undated, so that the same inputs give the same bytes."""
    info = ZipInfo(name)
    info.create_system = 3
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    if isinstance(content, bytes):
        zipped.writestr(info, content)
        return
    info.file_size = content.stat().st_size
    with content.open("rb") as source, zipped.open(info, "w") as packed:
        shutil.copyfileobj(source, packed)


@contextmanager
def _replacing(target: Path, source: Path) -> Iterator[Path]:
    """Yield a copy of `source` that takes the place of `target` only if the block succeeds."""
    if target.exists() and target.samefile(source):
        raise ArchiveError(f"{target} would replace the archive that it is made from.")
    if target.is_dir():
        raise ArchiveError(f"{target} is a folder, where the name of a new .mar was expected.")
    try:
        handle, name = mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        draft = Path(name)
        try:
            shutil.copyfile(source, draft)
            yield draft
            shutil.copymode(source, draft)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise ArchiveError(f"{target} cannot be written ({error}).") from error


@contextmanager
def _replacing_folder(target: Path, source: Path) -> Iterator[Path]:
    """Yield a copy of the folder `source` that becomes `target` only if the block succeeds."""
    target, source = target.absolute(), source.absolute()
    if target.exists() or target.is_relative_to(source):
        raise ArchiveError(f"{target} exists or lies in {source}; name a new folder beside it.")
    try:
        with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            draft = Path(scratch) / target.name
            shutil.copytree(source, draft, ignore=shutil.ignore_patterns(LITTER))
            yield draft
            draft.replace(target)
    except OSError as error:
        raise ArchiveError(f"{target} cannot be written ({error}).") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _version() -> str:
    try:
        return metadata.version("pathguard")
    except metadata.PackageNotFoundError:
        return "unknown"
