"""Read, wrap and unwrap TorchServe model archives (`.mar`).

A wrapped archive is the original's bytes up to its central directory, then our entries, then a new
directory. TorchServe streams through the entries and overwrites what it has already written, so our
manifest, the later one, wins; and the original is still in there, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile, mkstemp
from typing import Any, cast
from zipfile import BadZipFile, ZipFile, ZipInfo, is_zipfile

from defense.errors import ArchiveError

MANIFEST = "MAR-INF/MANIFEST.json"
HANDLER = "pathguard_handler.py"
FOLDER = "pathguard"

_WRAP = f"{FOLDER}/wrap.json"
_TAIL = f"{FOLDER}/original_tail.bin"
_CONFIG = f"{FOLDER}/guard.yaml"
_GUARD_FILES = ("guard.json", "tensors.safetensors")
_SCHEMA = 1
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
_BUILT_IN_HANDLERS = (
    "base_handler",
    "dali_image_classifier",
    "densenet_handler",
    "image_classifier",
    "image_segmenter",
    "object_detector",
    "text_classifier",
    "text_handler",
    "trt_llm_handler",
    "vision_handler",
    "vllm_handler",
)
# The model folder comes first on a worker's sys.path: such a module would be imported for ours.
_OUR_MODULES = ("defense", "handlers", "pathguard_handler")


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
        return _WRAP in self.entries

    def _text(self, key: str) -> str | None:
        value = _model(self.manifest).get(key)
        return None if value is None or value == "" else str(value)


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


def read_archive(path: Path) -> Archive:
    """Read and check the directory and the manifest of a `.mar`."""
    with _opened(path) as zipped:
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
        {**archive.manifest, "model": {**_model(archive.manifest), "handler": HANDLER}}
    )
    with _replacing(target, source) as draft:
        facts, tail = _remember(archive, draft)
        contents |= {_TAIL: tail, _WRAP: _json(asdict(facts))}
        with ZipFile(draft, "a") as zipped:
            _forget(zipped, MANIFEST)
            for name, content in sorted(contents.items()):
                _append(zipped, name, content)


def unwrap_archive(source: Path, target: Path) -> None:
    """Write to `target` the archive that was wrapped into `source`, byte for byte."""
    if not read_archive(source).is_wrapped:
        raise ArchiveError(f"{source} is not wrapped, so there is nothing to unwrap.")
    with _opened(source) as zipped:
        facts = _parse_facts(zipped.read(_WRAP), f"{_WRAP} in {source}")
        tail = zipped.read(_TAIL)
    with _replacing(target, source) as draft:
        intact = 0 <= facts.tail_offset < draft.stat().st_size
        if intact:
            with draft.open("r+b") as file:
                file.truncate(facts.tail_offset)
                file.seek(facts.tail_offset)
                file.write(tail)
        if not intact or _sha256(draft) != facts.original_sha256:
            raise ArchiveError(
                f"{source} was changed after it was wrapped: what it holds is no longer the "
                f"original with SHA-256 {facts.original_sha256}."
            )


def read_wrap_facts(folder: Path) -> WrapFacts:
    """Read `pathguard/wrap.json` of an archive that is unpacked in `folder`."""
    path = folder / _WRAP
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArchiveError(
            f"{path} cannot be read ({error.strerror}); only wrapped archives have it."
        ) from error
    return _parse_facts(content, str(path))


def extract_archive(path: Path, folder: Path) -> Archive:
    """Unpack into an empty or new folder; of entries with one name the last wins."""
    archive = read_archive(path)
    with _opened(path) as zipped:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ArchiveError(f"{folder} is not empty, so {path} is not unpacked into it.")
        for name in archive.entries:
            zipped.extract(name, folder)
    return archive


def archive_obstacles(archive: Archive) -> list[str]:
    """Say why an archive cannot be guarded, as far as that shows without loading its model."""
    if archive.is_wrapped:
        return [f"{archive.path} is already wrapped; unwrap it first."]
    reasons = [
        *_name_obstacles(archive),
        *_layout_obstacles(archive),
        *_manifest_obstacles(archive),
        *_model_obstacles(archive),
    ]
    return [f"{archive.path} cannot be guarded: {reason}." for reason in reasons]


def _name_obstacles(archive: Archive) -> Iterator[str]:
    for top in dict.fromkeys(name.split("/")[0] for name in archive.entries):
        if top == FOLDER:
            yield f"its folder '{top}' has the name of the folder that a guard is put into"
        stem = top.split(".")[0]
        if stem in _OUR_MODULES and PurePosixPath(top).suffix in ("", ".py", ".pyc", ".so"):
            yield f"its '{top}' would be imported in place of PathGuard's own '{stem}'; rename it"


def _layout_obstacles(archive: Archive) -> Iterator[str]:
    """Find what TorchServe, which streams through the entries, would not see as Python does.

    A streaming reader ends at the first byte that begins no entry: behind a gap our handler would
    be overlooked, and the model served without its guard.
    """
    with _opened(archive.path) as zipped, archive.path.open("rb") as file:
        end, descriptor = 0, {0}
        for info in sorted(zipped.infolist(), key=lambda info: info.header_offset):
            if info.header_offset - end not in descriptor:
                break
            file.seek(info.header_offset)
            magic, flags, name_length, extra_length = struct.unpack("<4s2xH18xHH", file.read(30))
            if magic != b"PK\3\4":
                break
            name = file.read(name_length).decode("utf-8" if flags & 0x800 else "cp437")
            if name != info.orig_filename:
                yield f"its entry '{info.filename}' has another name in its header; zip it anew"
            end = info.header_offset + 30 + name_length + extra_length + info.compress_size
            descriptor = {12, 16, 20, 24} if flags & 0x8 else {0}
        else:
            if zipped.start_dir - end in descriptor:
                return
    yield "it has bytes before or between its entries, at which TorchServe stops; zip it anew"


def _manifest_obstacles(archive: Archive) -> Iterator[str]:
    if archive.envelope:
        yield f"its service envelope '{archive.envelope}' is not supported yet"
    if archive.manifest.get("runtime") == "LSP":
        yield "its runtime is 'LSP', the C++ backend, which runs no Python handler"
    handler = archive.handler
    if handler is None:
        yield "its manifest names no handler"
    elif not _handler_exists(archive, handler):
        yield f"its handler '{handler}' is neither in the archive nor one of TorchServe's own"


def _handler_exists(archive: Archive, handler: str) -> bool:
    """Look for a handler where TorchServe does: the archive, its own handlers, sys.path."""
    module = handler.split(":")[0].removesuffix(".py").split("/")[-1]
    packed = {f"{module}.py", f"{module}/__init__.py"}
    if packed & {*archive.entries} or module in _BUILT_IN_HANDLERS:
        return True
    try:
        return module != "" and find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _model_obstacles(archive: Archive) -> Iterator[str]:
    for name in (archive.serialized_file, archive.model_file):
        if name and name not in archive.entries:
            yield f"its manifest names '{name}', which is not in the archive"
    name = archive.serialized_file
    if name not in archive.entries or archive.model_file:
        return
    if name.endswith(".onnx"):
        yield f"'{name}' is an ONNX graph, which has no modules whose outputs could be observed"
    elif name.endswith((".so", ".pt2")):
        yield f"'{name}' is compiled ahead of time and has no modules that could be observed"
    elif _is_torchscript(archive, name):
        yield (
            f"'{name}' is TorchScript, whose modules cannot be observed; "
            "archive the eager model with --model-file and a state dict"
        )


def _is_torchscript(archive: Archive, name: str) -> bool:
    with _opened(archive.path) as zipped, TemporaryFile() as copy:
        with zipped.open(name) as packed:
            shutil.copyfileobj(packed, copy)
        if not is_zipfile(copy):
            return False
        with ZipFile(copy) as inner:
            names = inner.namelist()
    return any(inner.endswith("/constants.pkl") or "/code/" in inner for inner in names)


@contextmanager
def _opened(path: Path) -> Iterator[ZipFile]:
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
    manifest = _parse_object(zipped.read(info), f"{MANIFEST} in {path}")
    model = manifest.get("model")
    if not isinstance(model, dict):
        raise ArchiveError(f"{MANIFEST} in {path} has no object 'model'.")
    for key, value in model.items():
        if isinstance(value, (dict, list)):
            raise ArchiveError(f"{MANIFEST} in {path} has no plain value for model.{key}.")
    return manifest


def _parse_object(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{where} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ArchiveError(f"{where} is not a JSON object.")
    return value


def _parse_facts(content: bytes, where: str) -> WrapFacts:
    raw = _parse_object(content, where)
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
    for name in (_WRAP, _TAIL):
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
    facts = WrapFacts(
        schema=_SCHEMA,
        inner_handler=archive.handler or "",
        manifest=archive.manifest,
        original_size=offset + len(tail),
        original_sha256=_sha256(copy),
        tail_offset=offset,
        pathguard_version=_version(),
    )
    return facts, tail


def _model(manifest: Mapping[str, object]) -> dict[str, object]:
    return cast("dict[str, object]", manifest["model"])


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
