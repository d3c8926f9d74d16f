"""Archives and guard folders made by an enemy are refused before anything of them runs."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from defense import archive as archive_module
from defense.archive import MANIFEST, WRAP, extract_archive, read_archive
from defense.artifact import JSON_NAME, TENSORS_NAME, load_guard, save_guard
from defense.cli.app import app
from defense.errors import ArchiveError, PathGuardError
from defense.guard import Guard
from defense.wrap import unwrap_archive, wrap_archive

Entries = list[tuple[str, bytes]]
TRACE = "something-ran"


def manifest(**model: Any) -> bytes:
    described = {"modelName": "m", "modelVersion": "1.0", "handler": "handler.py"}
    return json.dumps({"runtime": "python", "model": {**described, **model}}).encode()


def handler(folder: Path) -> tuple[str, bytes]:
    """Return a handler that leaves a trace as soon as it is imported."""
    return "handler.py", f"open({str(folder / TRACE)!r}, 'w').close()\n".encode()


def zipped(path: Path, entries: Entries) -> Path:
    """Write a zip whose names may repeat."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            kind = stat.S_IFLNK if name == "link" else stat.S_IFREG
            info.external_attr = (kind | 0o644) << 16
            target.writestr(info, content)
    return path


HOSTILE: dict[str, Entries] = {
    "a way out": [("../../escaped.py", b"x")],
    "an absolute path": [("/tmp/escaped.py", b"x")],
    "a drive": [("C:escaped.py", b"x")],
    "a link": [("link", b"/etc/passwd")],
    "a name in two cases": [("model.py", b"x"), ("Model.py", b"y")],
    "a name composed in two ways": [("\u00e9.py", b"x"), ("e\u0301.py", b"y")],
    "a bomb": [("zeros.pt", bytes(70_000_000))],
    "a deep manifest": [(MANIFEST, b"[" * 100_000)],
    "a long manifest": [(MANIFEST, b" " * (1 << 21))],
    "a manifest of another shape": [(MANIFEST, b'{"model": {"handler": {"a": 1}}}')],
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_archive_is_refused_by_everyone_and_nothing_of_it_runs(
    guard: Guard, tmp_path: Path, what: str
) -> None:
    save_guard(guard, tmp_path / "guard")
    entries = [(MANIFEST, manifest()), handler(tmp_path), *HOSTILE[what]]
    path = zipped(tmp_path / "x.mar", entries)
    before = sorted(tmp_path.iterdir())
    for use in (
        lambda: read_archive(path),
        lambda: extract_archive(path, tmp_path / "unpacked"),
        lambda: wrap_archive(
            path, tmp_path / "out.mar", guard_folder=tmp_path / "guard", handler_source=""
        ),
        lambda: unwrap_archive(path, tmp_path / "out.mar"),
    ):
        with pytest.raises(ArchiveError):
            use()
    refusal = CliRunner().invoke(app, ["doctor", str(path)])
    assert isinstance(refusal.exception, ArchiveError)
    assert sorted(tmp_path.iterdir()) == before


def test_names_that_differ_in_case_alone_are_named(tmp_path: Path) -> None:
    entries = [(MANIFEST, manifest()), *HOSTILE["a name in two cases"]]
    with pytest.raises(ArchiveError, match=r"has entries 'model.py' and 'Model.py', which are one"):
        read_archive(zipped(tmp_path / "x.mar", entries))


def test_a_bomb_is_known_by_how_little_it_is_packed_into(tmp_path: Path) -> None:
    entries = [(MANIFEST, manifest()), *HOSTILE["a bomb"]]
    with pytest.raises(ArchiveError, match=r"would unpack to \d+ times its size, as only zip bomb"):
        read_archive(zipped(tmp_path / "x.mar", entries))


def test_an_archive_of_too_many_entries_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_module, "_MAX_ENTRIES", 20)
    entries = [(MANIFEST, manifest()), *[(f"{number}", b"") for number in range(20)]]
    with pytest.raises(ArchiveError, match="has 21 entries, more than the 20 allowed"):
        read_archive(zipped(tmp_path / "x.mar", entries))


def test_a_pipe_in_the_place_of_an_archive_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.mar")
    with pytest.raises(ArchiveError, match="is a device or a pipe, where an archive was expected"):
        read_archive(tmp_path / "x.mar")


@pytest.mark.parametrize(("field", "size"), [(20, 0), (20, 3), (24, 0), (24, 3), (24, 2**32 - 2)])
def test_a_size_that_lies_ends_the_unpacking(tmp_path: Path, field: int, size: int) -> None:
    path = zipped(tmp_path / "x.mar", [(MANIFEST, manifest()), ("a.bin", os.urandom(100))])
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\1\2") + field
    content[at : at + 4] = struct.pack("<I", size)
    path.write_bytes(content)
    with pytest.raises(ArchiveError):
        extract_archive(path, tmp_path / "unpacked")


def test_a_file_that_is_also_a_folder_ends_the_unpacking(tmp_path: Path) -> None:
    entries = [(MANIFEST, manifest()), ("a", b"x"), ("a/b", b"y")]
    with pytest.raises(ArchiveError):
        extract_archive(zipped(tmp_path / "x.mar", entries), tmp_path / "unpacked")


def test_an_archive_that_was_cut_anywhere_is_refused(tmp_path: Path) -> None:
    content = zipped(
        tmp_path / "whole.mar", [(MANIFEST, manifest()), ("a.bin", os.urandom(500))]
    ).read_bytes()
    path = tmp_path / "x.mar"
    for end in range(0, len(content), 37):
        path.write_bytes(content[:end])
        with pytest.raises(ArchiveError):
            read_archive(path)


@pytest.mark.parametrize("facts", [b"[" * 100_000, b" " * (1 << 23), b'{"schema": 1}'])
def test_a_hostile_memory_of_the_original_is_not_unwrapped(tmp_path: Path, facts: bytes) -> None:
    entries = [(MANIFEST, manifest()), (WRAP, facts), ("pathguard/original_tail.bin", b"")]
    with pytest.raises(ArchiveError):
        unwrap_archive(zipped(tmp_path / "x.mar", entries), tmp_path / "out.mar")
    assert not (tmp_path / "out.mar").exists()


@pytest.fixture
def folder(guard: Guard, tmp_path: Path) -> Path:
    save_guard(guard, tmp_path / "guard")
    return tmp_path / "guard"


def put_tensors(
    folder: Path, header: bytes, data: bytes = b"", *, length: int | None = None
) -> None:
    """Write a tensor file with this header, and its hash where guard.json has it."""
    payload = struct.pack("<Q", len(header) if length is None else length) + header + data
    (folder / TENSORS_NAME).write_bytes(payload)
    edit(folder, tensors_sha256=hashlib.sha256(payload).hexdigest())


def edit(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / JSON_NAME).read_text())
    (folder / JSON_NAME).write_text(json.dumps({**document, **changes}))


def described(shape: list[int], end: int, *, dtype: str = "F32", start: int = 0) -> bytes:
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return json.dumps({"a": tensor}).encode()


@pytest.mark.parametrize(
    "write",
    [
        lambda f: put_tensors(f, b"{}", length=2**63),
        lambda f: put_tensors(f, b"{}", length=100),
        lambda f: put_tensors(f, b"{}", length=0),
        lambda f: put_tensors(f, b"{" * 50_000),
        lambda f: put_tensors(f, b"\xff\xfe"),
        lambda f: put_tensors(f, b"[]"),
        lambda f: put_tensors(f, described([2], 8)),
        lambda f: put_tensors(f, described([2**40, 2**40], 8), bytes(8)),
        lambda f: put_tensors(f, described([2**62], 2**64 - 1), bytes(8)),
        lambda f: put_tensors(f, described([2], 4), bytes(8)),
        lambda f: put_tensors(f, described([-1], 8), bytes(8)),
        lambda f: put_tensors(f, described([2], 0, start=8), bytes(8)),
        lambda f: put_tensors(f, described([2], 8, dtype="PICKLE"), bytes(8)),
        lambda f: put_tensors(f, described([2], 8), bytes(80)),
        lambda f: put_tensors(f, b"{}"),
        lambda f: (f / TENSORS_NAME).write_bytes(b""),
        lambda f: os.truncate(f / TENSORS_NAME, 100),
        lambda f: os.truncate(f / TENSORS_NAME, 1 << 32),
        lambda f: os.truncate(f / JSON_NAME, 1 << 30),
        lambda f: edit(f, tensors_sha256="0" * 64),
        lambda f: edit(f, tensors_sha256=None),
        lambda f: edit(f, inputs={"shape": [float("inf")], "dtype": "float32"}),
        lambda f: edit(f, inputs={"shape": [float("nan")], "dtype": "float32"}),
        lambda f: edit(f, class_names={"a": 1}, router={"name": ["a"], "fitted": {}}),
        lambda f: edit(f, schema="x" * 10**6),
        lambda f: edit(f, router="x" * 10**6),
        lambda f: edit(f, calibrations={"path": {"score": 10**400}}),
        lambda f: (f / JSON_NAME).write_text('{"a":' * 10**5),
        lambda f: (f / JSON_NAME).write_text("1" * 10**5),
        lambda f: (f / JSON_NAME).write_bytes(b"\x80\x04K\x01."),
        lambda f: replaced(f / JSON_NAME, os.mkfifo),
        lambda f: replaced(f / TENSORS_NAME, os.mkfifo),
        lambda f: replaced(f / JSON_NAME, os.mkdir),
        lambda f: replaced(f / TENSORS_NAME, lambda path: os.symlink("/dev/zero", path)),
    ],
)
def test_a_hostile_guard_folder_is_refused_in_a_short_sentence(
    folder: Path, write: Callable[[Path], object]
) -> None:
    write(folder)
    with pytest.raises(PathGuardError) as refusal:
        load_guard(folder)
    assert len(str(refusal.value)) < len(str(folder)) + 700
    assert "\n" not in str(refusal.value)


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def test_random_bytes_are_no_guard_and_no_archive(folder: Path, tmp_path: Path) -> None:
    for size in (0, 1, 22, 100, 5000):
        (tmp_path / "x.mar").write_bytes(os.urandom(size))
        with pytest.raises(ArchiveError):
            read_archive(tmp_path / "x.mar")
        put_tensors(folder, os.urandom(size))
        with pytest.raises(PathGuardError):
            load_guard(folder)
    with pytest.raises(ArchiveError):
        read_archive(zipped(tmp_path / "y.mar", [("a", b"x")]))
