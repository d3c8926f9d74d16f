"""What stands in the way of guarding an archive, as far as that shows without loading it."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import PurePosixPath
from tempfile import TemporaryFile
from zipfile import ZipFile, is_zipfile

import yaml

from defense.archive import FOLDER, Archive, model_of, opened, opened_entry
from defense.folders import is_tar

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
_UNSERVED = {
    "asyncCommunication": "gets its requests one by one while it answers others",
    "continuousBatching": "answers its requests in pieces",
    "sequenceBatching": "keeps the state of a sequence of requests",
    "parallelType": "is spread over several processes",
}
"""Keys of model-config.yaml for ways of serving in which nobody sees a batch and its answers."""
_STREAMING = b"send_intermediate_predict_response"
_MAX_SOURCE = 1 << 20
# The model folder comes first on a worker's sys.path: such a module would be imported for ours.
_OUR_MODULES = ("defense", "handlers", "pathguard_handler")


def archive_obstacles(archive: Archive) -> list[str]:
    """Say why an archive cannot be guarded, as far as that shows without loading its model."""
    if archive.is_wrapped:
        return [f"{archive.path} is already wrapped; unwrap it first."]
    reasons = [
        *_name_obstacles(archive),
        *_layout_obstacles(archive),
        *_manifest_obstacles(archive),
        *_model_obstacles(archive),
        *_serving_obstacles(archive),
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
    if archive.path.is_dir() or is_tar(archive.path):
        return
    with opened(archive.path) as zipped, archive.path.open("rb") as file:
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
    elif name.endswith(".so") or (name.endswith(".pt2") and _is_compiled(archive, name)):
        yield (
            f"'{name}' is compiled ahead of time and has no modules that could be observed; "
            "archive the exported program itself, or the eager model"
        )


def _is_compiled(archive: Archive, name: str) -> bool:
    """Say whether a .pt2 file holds a library of AOTInductor rather than an exported program."""
    with TemporaryFile() as copy:
        with opened_entry(archive.path, name) as packed:
            shutil.copyfileobj(packed, copy)
        if not is_zipfile(copy):
            return False
        with ZipFile(copy) as inner:
            names = inner.namelist()
    return any("/data/aotinductor/" in inner for inner in names)


def _serving_obstacles(archive: Archive) -> Iterator[str]:
    """Find ways of serving that give a batch's answers elsewhere than where the handler returns."""
    name = model_of(archive.manifest).get("configFile")
    if isinstance(name, str) and name in archive.entries:
        try:
            found = yaml.safe_load(_source(archive, name))
        except yaml.YAMLError:
            yield f"its '{name}' is no YAML"
            found = None
        for key, what in _UNSERVED.items():
            if isinstance(found, dict) and found.get(key):
                yield f"with '{key}' in its '{name}' it {what}, where no answer can be held back"
    handler = str(archive.handler).split(":")[0].removesuffix(".py").split("/")[-1] + ".py"
    if handler in archive.entries and _STREAMING in _source(archive, handler):
        yield f"its handler '{archive.handler}' streams answers, which cannot be taken back"


def _source(archive: Archive, name: str) -> bytes:
    with opened_entry(archive.path, name) as file:
        return file.read(_MAX_SOURCE)
