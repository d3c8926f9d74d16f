"""Archives: what is read, what is refused, and that nothing is lost by wrapping."""

from __future__ import annotations

import io
import json
import stat
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from defense import archive as archive_module
from defense import wrap as wrap_module
from defense.archive import MANIFEST, extract_archive, read_archive
from defense.errors import ArchiveError
from defense.obstacles import archive_obstacles
from defense.wrap import read_wrap_facts, unwrap_archive, wrap_archive
from tests.archives import build_archive

OURS = "class Handler: ...\n"
MODEL = "import torch\n\nclass Tiny(torch.nn.Linear):\n    ...\n"
Entries = dict[str, bytes]


def manifest(**model: Any) -> bytes:
    described = {"modelName": "tiny", "modelVersion": "2.0", "handler": "image_classifier"}
    return json.dumps({"runtime": "python", "model": {**described, **model}}).encode()


def zip_archive(path: Path, entries: Entries, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as zipped:
        for name, content in entries.items():
            zipped.writestr(name, content)
    return path


def plain_archive(folder: Path, extra: Entries | None = None, **model: Any) -> Path:
    return zip_archive(folder / "plain.mar", {MANIFEST: manifest(**model), **(extra or {})})


@pytest.fixture
def guard_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "guard"
    (folder / "cards").mkdir(parents=True)
    (folder / "guard.json").write_text('{"schema": 1}')
    (folder / "tensors.safetensors").write_bytes(bytes(range(256)))
    (folder / "cards" / "report.json").write_text("{}")
    return folder


@pytest.fixture
def wrap(guard_folder: Path) -> Callable[[Path, Path], None]:
    def wrapped(source: Path, target: Path) -> None:
        wrap_archive(source, target, guard_folder=guard_folder, handler_source=OURS)

    return wrapped


def stream(content: bytes) -> Entries:
    """Unpack as TorchServe does: entry after entry, until something else begins."""
    found, at = {}, 0
    while content[at : at + 4] == b"PK\3\4":
        flags, method, packed_size, name_size, extra_size = struct.unpack(
            "<6xHH8xL4xHH", content[at : at + 30]
        )
        start = at + 30 + name_size + extra_size
        name = content[at + 30 : at + 30 + name_size].decode()
        if method == zipfile.ZIP_DEFLATED:
            inflate = zlib.decompressobj(-zlib.MAX_WBITS)
            found[name] = inflate.decompress(content[start:]) + inflate.flush()
            at = len(content) - len(inflate.unused_data)
        else:
            if packed_size == 0xFFFFFFFF:
                packed_size = struct.unpack("<12xQ", content[start - extra_size : start][:20])[0]
            at = start + packed_size
            found[name] = content[start:at]
        if flags & 0x8:
            assert content[at : at + 4] == b"PK\7\10"
            at += 16
    return found


class Unseekable(io.RawIOBase):
    """A target that zipfile cannot go back in, so that it writes data descriptors."""

    def __init__(self) -> None:
        self.content = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.content += data
        return len(data)


names = st.text("abcdefgh_é0", min_size=1, max_size=6).map(lambda name: f"extra/{name}.bin")
contents = st.binary(max_size=300)


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """Any zip that a tool might write: order, method, comment, descriptors and zip64 vary."""
    entries = draw(st.dictionaries(names, contents, max_size=5))
    order = draw(st.permutations([*entries, MANIFEST]))
    entries[MANIFEST] = manifest()
    target: Any = draw(st.sampled_from([io.BytesIO, Unseekable]))()
    streamed = isinstance(target, Unseekable)
    with zipfile.ZipFile(target, "w") as zipped:
        zipped.comment = draw(st.binary(max_size=40))
        for name in order:
            info = zipfile.ZipInfo(name)
            stored = not streamed and draw(st.booleans())
            info.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
            wide = not streamed and draw(st.booleans())
            with zipped.open(info, "w", force_zip64=wide) as entry:
                entry.write(entries[name])
    return bytes(target.content) if streamed else target.getvalue()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(original=archives())
def test_unwrapping_gives_back_what_was_wrapped_byte_for_byte(
    original: bytes, tmp_path: Path, wrap: Callable[[Path, Path], None]
) -> None:
    source, guarded, restored = (tmp_path / name for name in ("a.mar", "b.mar", "c.mar"))
    source.write_bytes(original)
    wrap(source, guarded)
    unwrap_archive(guarded, restored)
    assert restored.read_bytes() == original


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(original=archives())
def test_a_streaming_reader_finds_the_original_entries_and_then_ours(
    original: bytes, tmp_path: Path, wrap: Callable[[Path, Path], None]
) -> None:
    source, guarded = tmp_path / "a.mar", tmp_path / "b.mar"
    source.write_bytes(original)
    wrap(source, guarded)
    before, after = stream(original), stream(guarded.read_bytes())
    with zipfile.ZipFile(guarded) as zipped:
        assert zipped.testzip() is None
        assert sorted(zipped.namelist()) == sorted(after)
        assert {name: zipped.read(name) for name in after} == after
    described = json.loads(after.pop(MANIFEST))
    expected = json.loads(before.pop(MANIFEST))
    expected["model"]["handler"] = "pathguard_handler.py"
    assert described == expected
    assert before.items() <= after.items()
    assert after["pathguard_handler.py"].decode() == OURS


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_archive_is_read_or_refused_but_never_anything_else(
    data: st.DataObject, tmp_path: Path
) -> None:
    content = bytearray(data.draw(archives()))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.mar"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with suppress(ArchiveError):
        archive_obstacles(read_archive(path))


def test_an_archive_of_torch_model_archiver_tells_its_facts(tmp_path: Path) -> None:
    path = build_archive(
        tmp_path,
        handler="image_classifier",
        model_file_source=MODEL,
        state_dict={"weight": torch.zeros(2, 2)},
        name="lenet",
        version="3.1",
    )
    archive = read_archive(path)
    assert (archive.model_name, archive.model_version) == ("lenet", "3.1")
    assert (archive.handler, archive.envelope) == ("image_classifier", None)
    assert (archive.model_file, archive.serialized_file) == ("model.py", "model.pt")
    assert archive.entries == ("model.py", "model.pt", MANIFEST)
    assert archive_obstacles(archive) == []
    assert not archive.is_wrapped


def test_an_archive_of_torch_model_archiver_survives_wrapping(
    tmp_path: Path, wrap: Callable[[Path, Path], None]
) -> None:
    handler = tmp_path / "my_handler.py"
    handler.write_text("def handle(data, context): ...\n")
    source = build_archive(tmp_path, handler=f"{handler.with_suffix('')}:handle")
    wrap(source, tmp_path / "guarded.mar")
    unwrap_archive(tmp_path / "guarded.mar", tmp_path / "restored.mar")
    assert read_archive(source).handler == "my_handler:handle"
    assert (tmp_path / "restored.mar").read_bytes() == source.read_bytes()


def test_a_wrapped_archive_knows_its_original(
    tmp_path: Path, wrap: Callable[[Path, Path], None]
) -> None:
    source = plain_archive(tmp_path, {"data.bin": b"12"}, configFile="model-config.yaml")
    wrap(source, tmp_path / "guarded.mar")
    archive = extract_archive(tmp_path / "guarded.mar", tmp_path / "unpacked")
    facts = read_wrap_facts(tmp_path / "unpacked")
    assert archive.is_wrapped
    assert archive.handler == "pathguard_handler.py"
    assert (archive.model_name, archive.model_version) == ("tiny", "2.0")
    assert facts.inner_handler == "image_classifier"
    assert facts.manifest == json.loads(manifest(configFile="model-config.yaml"))
    assert facts.original_size == source.stat().st_size
    assert (tmp_path / "unpacked" / "pathguard" / "cards" / "report.json").read_text() == "{}"
    assert (tmp_path / "unpacked" / "pathguard" / "guard.json").read_text() == '{"schema": 1}'


def test_a_guard_configuration_is_put_beside_the_guard(tmp_path: Path, guard_folder: Path) -> None:
    source, target = plain_archive(tmp_path), tmp_path / "guarded.mar"
    wrap_archive(
        source, target, guard_folder=guard_folder, handler_source=OURS, guard_config=b"version: 1\n"
    )
    extract_archive(target, tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / "pathguard" / "guard.yaml").read_bytes() == b"version: 1\n"


def test_wrapping_twice_gives_the_same_bytes(
    tmp_path: Path, wrap: Callable[[Path, Path], None]
) -> None:
    source = plain_archive(tmp_path)
    wrap(source, tmp_path / "one.mar")
    wrap(source, tmp_path / "two.mar")
    assert (tmp_path / "one.mar").read_bytes() == (tmp_path / "two.mar").read_bytes()


def test_a_read_only_original_is_wrapped_and_keeps_its_permissions(
    tmp_path: Path, wrap: Callable[[Path, Path], None]
) -> None:
    source = plain_archive(tmp_path)
    source.chmod(0o440)
    wrap(source, tmp_path / "guarded.mar")
    assert stat.S_IMODE((tmp_path / "guarded.mar").stat().st_mode) == 0o440


def test_without_pathguard_installed_the_version_is_unknown(
    tmp_path: Path, wrap: Callable[[Path, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    wrap(plain_archive(tmp_path), tmp_path / "guarded.mar")
    extract_archive(tmp_path / "guarded.mar", tmp_path / "unpacked")
    assert read_wrap_facts(tmp_path / "unpacked").pathguard_version == "unknown"


@pytest.mark.parametrize("existing", [b"precious", None])
def test_a_failed_wrapping_changes_nothing(
    tmp_path: Path,
    guard_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    existing: bytes | None,
) -> None:
    source, target = plain_archive(tmp_path), tmp_path / "out" / "guarded.mar"
    target.parent.mkdir()
    if existing is not None:
        target.write_bytes(existing)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wrap_module, "_append", full)
    with pytest.raises(ArchiveError, match=r"guarded\.mar cannot be written \(.*No space left"):
        wrap_archive(source, target, guard_folder=guard_folder, handler_source=OURS)
    assert [path.read_bytes() for path in target.parent.iterdir()] == [existing] * bool(existing)


def test_a_target_in_no_folder_is_refused(
    tmp_path: Path, wrap: Callable[[Path, Path], None]
) -> None:
    with pytest.raises(ArchiveError, match=r"nowhere/guarded\.mar cannot be written"):
        wrap(plain_archive(tmp_path), tmp_path / "nowhere" / "guarded.mar")


def test_an_archive_is_not_replaced_by_its_own_wrapping(
    tmp_path: Path, wrap: Callable[[Path, Path], None]
) -> None:
    source = plain_archive(tmp_path)
    before = source.read_bytes()
    (tmp_path / "link.mar").symlink_to(source)
    for target in (source, tmp_path / "link.mar"):
        with pytest.raises(ArchiveError, match="would replace the archive that it is made from"):
            wrap(source, target)
    assert source.read_bytes() == before


def test_a_target_that_is_a_folder_is_refused(
    tmp_path: Path, wrap: Callable[[Path, Path], None]
) -> None:
    with pytest.raises(ArchiveError, match="is a folder, where the name of a new"):
        wrap(plain_archive(tmp_path), tmp_path)


@pytest.mark.parametrize("missing", ["guard.json", "tensors.safetensors"])
def test_an_incomplete_guard_is_refused(
    tmp_path: Path, guard_folder: Path, wrap: Callable[[Path, Path], None], missing: str
) -> None:
    (guard_folder / missing).unlink()
    with pytest.raises(ArchiveError, match=f"is no guard folder: it has no {missing}"):
        wrap(plain_archive(tmp_path), tmp_path / "guarded.mar")


def test_a_guard_file_with_a_name_of_ours_is_refused(
    tmp_path: Path, guard_folder: Path, wrap: Callable[[Path, Path], None]
) -> None:
    (guard_folder / "wrap.json").write_text("{}")
    with pytest.raises(ArchiveError, match=r"wrap\.json has a name that wrapping needs"):
        wrap(plain_archive(tmp_path), tmp_path / "guarded.mar")


def test_only_wrapped_archives_are_unwrapped(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="is not wrapped, so there is nothing to unwrap"):
        unwrap_archive(plain_archive(tmp_path), tmp_path / "restored.mar")
    with pytest.raises(ArchiveError, match=r"wrap\.json cannot be read .*; only wrapped"):
        read_wrap_facts(tmp_path)


def test_a_wrapped_archive_that_was_changed_is_not_unwrapped(
    tmp_path: Path, wrap: Callable[[Path, Path], None]
) -> None:
    guarded = tmp_path / "guarded.mar"
    wrap(plain_archive(tmp_path, {"a.txt": b"harmless"}), guarded)
    content = guarded.read_bytes()
    guarded.write_bytes(content.replace(b"a.txt", b"b.txt", 1))
    with pytest.raises(ArchiveError, match="was changed after it was wrapped"):
        unwrap_archive(guarded, tmp_path / "restored.mar")
    assert not (tmp_path / "restored.mar").exists()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ("[]", "is not a JSON object"),
        ("{", "is not JSON"),
        ('{"schema": 9}', "has schema 9, and this version of PathGuard reads 1"),
        ('{"schema": 1, "inner_handler": 3}', "has 3 where inner_handler should be"),
    ],
)
def test_damaged_wrap_facts_are_refused(tmp_path: Path, facts: str, message: str) -> None:
    (tmp_path / "pathguard").mkdir()
    (tmp_path / "pathguard" / "wrap.json").write_text(facts)
    with pytest.raises(ArchiveError, match=message):
        read_wrap_facts(tmp_path)


def test_a_tail_that_lies_about_its_place_is_refused(tmp_path: Path) -> None:
    facts = {"schema": 1, "inner_handler": "x", "manifest": {}, "original_size": 1}
    facts |= {"original_sha256": "0", "tail_offset": 1 << 60, "pathguard_version": "1"}
    entries = {
        MANIFEST: manifest(),
        "pathguard/wrap.json": json.dumps(facts).encode(),
        "pathguard/original_tail.bin": b"",
    }
    source = zip_archive(tmp_path / "lying.mar", entries)
    with pytest.raises(ArchiveError, match="was changed after it was wrapped"):
        unwrap_archive(source, tmp_path / "restored.mar")


@pytest.mark.parametrize(
    "name",
    ["/etc/cron.d/x", "../x", "a/../../x", "a\\x", "C:x", "./x", "a//x", "/", "MAR-INF/./x"],
)
def test_hostile_names_are_refused(tmp_path: Path, name: str) -> None:
    path = plain_archive(tmp_path, {name: b""})
    with pytest.raises(ArchiveError, match="has an unsafe entry"):
        read_archive(path)
    with pytest.raises(ArchiveError, match="has an unsafe entry"):
        extract_archive(path, tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFBLK])
def test_links_and_devices_are_refused(tmp_path: Path, kind: int) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = (kind | 0o777) << 16
    path = plain_archive(tmp_path)
    with zipfile.ZipFile(path, "a") as zipped:
        zipped.writestr(link, "/etc/passwd")
    with pytest.raises(ArchiveError, match="'link': links and devices are not allowed"):
        read_archive(path)


def test_an_encrypted_entry_is_refused(tmp_path: Path) -> None:
    path = plain_archive(tmp_path)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\1\2") + 8] |= 0x1
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="encryption is not supported"):
        read_archive(path)


def test_an_archive_that_would_fill_the_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_module, "_MAX_UNPACKED", 1000)
    with pytest.raises(ArchiveError, match=r"would unpack to \d+ bytes, more than the 1000"):
        read_archive(plain_archive(tmp_path, {"zeros": bytes(10_000)}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe\xfd", "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b"{}", "has no object 'model'"),
        (b'{"model": {"handler": []}}', "has no plain value for model.handler"),
        (b" " * (1 << 21), "which is absurd"),
    ],
)
def test_a_malformed_manifest_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ArchiveError, match=message):
        read_archive(zip_archive(tmp_path / "x.mar", {MANIFEST: content}))


def test_what_is_no_archive_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.mar").write_text("no zip")
    zip_archive(tmp_path / "empty.mar", {"readme": b""})
    for path, message in {
        "absent.mar": "There is no archive at",
        ".": r"has no MAR-INF/MANIFEST\.json, so it is no TorchServe archive",
        "text.mar": "cannot be read as a zip archive",
        "empty.mar": r"has no MAR-INF/MANIFEST\.json, so it is no TorchServe archive",
    }.items():
        with pytest.raises(ArchiveError, match=message):
            read_archive(tmp_path / path)


def test_missing_names_have_the_defaults_of_torchserve(tmp_path: Path) -> None:
    archive = read_archive(plain_archive(tmp_path, modelName=None, modelVersion=None))
    assert (archive.model_name, archive.model_version) == ("plain", "1.0")


def test_of_entries_with_one_name_the_last_is_unpacked(tmp_path: Path) -> None:
    path = plain_archive(tmp_path, {"a.txt": b"first", "folder/": b""})
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "a") as zipped:
        zipped.writestr("a.txt", "last")
    archive = extract_archive(path, tmp_path / "unpacked")
    assert archive.entries.count("a.txt") == 1
    assert (tmp_path / "unpacked" / "a.txt").read_text() == "last"
    assert (tmp_path / "unpacked" / "folder").is_dir()


def test_a_folder_with_something_in_it_is_not_unpacked_into(tmp_path: Path) -> None:
    path = plain_archive(tmp_path)
    with pytest.raises(ArchiveError, match=r"is not empty, so .* is not unpacked into it"):
        extract_archive(path, tmp_path)


def test_an_entry_with_a_wrong_checksum_is_not_unpacked(tmp_path: Path) -> None:
    entries = {MANIFEST: manifest(), "a.txt": b"content"}
    path = zip_archive(tmp_path / "x.mar", entries, zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"content", b"CONTENT", 1))
    with pytest.raises(ArchiveError, match=r"cannot be read as a zip archive .*CRC"):
        extract_archive(path, tmp_path / "unpacked")


def compiled() -> bytes:
    """Return a package as AOTInductor writes it, without the library that it would hold."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as zipped:
        zipped.writestr("m/data/aotinductor/model/m.wrapper.so", "")
        zipped.writestr("m/archive_format", "pt2")
    return content.getvalue()


def state_dict() -> bytes:
    content = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, content)
    return content.getvalue()


@pytest.mark.parametrize(
    ("extra", "model", "obstacle"),
    [
        ({"pathguard/x": b""}, {}, "its folder 'pathguard' has the name of the folder"),
        ({"pathguard_handler.py": b""}, {}, "its 'pathguard_handler.py' would be imported"),
        ({"defense/__init__.py": b""}, {}, "its 'defense' would be imported in place of"),
        ({"defense.py": b""}, {}, "its 'defense.py' would be imported in place of"),
        ({"handlers/x.py": b""}, {}, "its 'handlers' would be imported in place of"),
        ({"handlers.cpython-311-x.so": b""}, {}, "'handlers.cpython-311-x.so' would be imported"),
        (
            {"c.yaml": b"asyncCommunication: true"},
            {"configFile": "c.yaml"},
            "with 'asyncCommunication' in its 'c.yaml' it gets its requests one by one",
        ),
        ({"c.yaml": b"parallelType: pp"}, {"configFile": "c.yaml"}, "is spread over several"),
        ({"c.yaml": b"sequenceBatching: true"}, {"configFile": "c.yaml"}, "keeps the state of"),
        ({"c.yaml": b"continuousBatching: true"}, {"configFile": "c.yaml"}, "in pieces"),
        ({"c.yaml": b"a: ["}, {"configFile": "c.yaml"}, "its 'c.yaml' is no YAML"),
        (
            {"own.py": b"send_intermediate_predict_response(x)"},
            {"handler": "own.py"},
            "its handler 'own.py' streams answers, which cannot be taken back",
        ),
        ({}, {"handler": None}, "its manifest names no handler"),
        ({}, {"handler": "gone.py:handle"}, "its handler 'gone.py:handle' is neither in the"),
        ({}, {"handler": ":"}, "its handler ':' is neither in the"),
        ({}, {"handler": "a.b"}, "its handler 'a.b' is neither in the"),
        ({}, {"serializedFile": "m.pt"}, "its manifest names 'm.pt', which is not in the archive"),
        ({}, {"modelFile": "m.py"}, "its manifest names 'm.py', which is not in the archive"),
        ({"m.onnx": b""}, {"serializedFile": "m.onnx"}, "'m.onnx' is an ONNX graph"),
        ({"m.so": b""}, {"serializedFile": "m.so"}, "'m.so' is compiled ahead of time"),
        ({"m.pt2": compiled()}, {"serializedFile": "m.pt2"}, "'m.pt2' is compiled ahead of time"),
    ],
)
def test_what_cannot_be_guarded_is_named_and_not_wrapped(
    tmp_path: Path,
    wrap: Callable[[Path, Path], None],
    extra: Entries,
    model: dict[str, Any],
    obstacle: str,
) -> None:
    path = plain_archive(tmp_path, extra, **model)
    (sentence,) = archive_obstacles(read_archive(path))
    assert obstacle in sentence
    with pytest.raises(ArchiveError) as refused:
        wrap(path, tmp_path / "guarded.mar")
    assert str(refused.value) == sentence


@pytest.mark.parametrize(
    ("extra", "model"),
    [
        ({"defense_notes.py": b"", "my/handlers.py": b"", "defense.txt": b""}, {}),
        ({"my_handler.py": b""}, {"handler": "folder/my_handler.py:entry"}),
        ({"my_handler/__init__.py": b""}, {"handler": "my_handler"}),
        ({}, {"handler": "json"}),  # a module of the environment
        ({"m.pt": state_dict()}, {"serializedFile": "m.pt"}),
        ({"m.bin": b"?"}, {"serializedFile": "m.bin"}),
        ({"m.pt2": b"?"}, {"serializedFile": "m.pt2"}),
    ],
)
def test_what_can_be_guarded_has_no_obstacles(
    tmp_path: Path, extra: Entries, model: dict[str, Any]
) -> None:
    assert archive_obstacles(read_archive(plain_archive(tmp_path, extra, **model))) == []


def test_the_cpp_backend_is_an_obstacle(tmp_path: Path) -> None:
    content = manifest().replace(b'"python"', b'"LSP"')
    path = zip_archive(tmp_path / "x.mar", {MANIFEST: content})
    assert "its runtime is 'LSP'" in archive_obstacles(read_archive(path))[0]


def test_a_wrapped_archive_is_not_wrapped_again(
    tmp_path: Path, wrap: Callable[[Path, Path], None]
) -> None:
    wrap(plain_archive(tmp_path), tmp_path / "guarded.mar")
    with pytest.raises(ArchiveError, match="is already wrapped; unwrap it first"):
        wrap(tmp_path / "guarded.mar", tmp_path / "again.mar")


def with_bytes_before(content: bytes) -> bytes:
    return b"#!/bin/sh\n" + content


def with_bytes_before_the_directory(content: bytes) -> bytes:
    directory = content.index(b"PK\1\2")
    end = content.index(b"PK\5\6")
    place = struct.pack("<L", directory + 3)
    return (
        content[:directory] + b"gap" + content[directory : end + 16] + place + content[end + 20 :]
    )


def with_another_first_signature(content: bytes) -> bytes:
    return b"PK\0\0" + content[4:]


@pytest.mark.parametrize(
    "change",
    [with_bytes_before, with_bytes_before_the_directory, with_another_first_signature],
)
def test_an_archive_in_which_torchserve_would_stop_before_our_entries_is_refused(
    tmp_path: Path, wrap: Callable[[Path, Path], None], change: Callable[[bytes], bytes]
) -> None:
    entries = {"a.txt": b"a", MANIFEST: manifest()}
    path = zip_archive(tmp_path / "x.mar", entries, zipfile.ZIP_STORED)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ArchiveError, match="at which TorchServe stops; zip it anew"):
        wrap(path, tmp_path / "guarded.mar")


def test_an_entry_with_two_names_is_refused(
    tmp_path: Path, wrap: Callable[[Path, Path], None]
) -> None:
    path = plain_archive(tmp_path, {"defense_.py": b"", "other.py": b""})
    path.write_bytes(path.read_bytes().replace(b"other.py", b"othel.py", 1))
    with pytest.raises(ArchiveError, match=r"its entry 'other\.py' has another name"):
        wrap(path, tmp_path / "guarded.mar")


def test_every_message_is_one_sentence(tmp_path: Path) -> None:
    sentences: Iterable[str] = archive_obstacles(
        read_archive(plain_archive(tmp_path, {"defense.py": b""}, handler=None))
    )
    for sentence in sentences:
        assert sentence.endswith(".")
        assert ". " not in sentence
        assert "\n" not in sentence
