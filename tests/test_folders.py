"""Archives that are no zip: folders and gzipped tars are read, wrapped and given back as safely."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from defense.archive import MANIFEST, extract_archive, opened_entry, read_archive
from defense.errors import ArchiveError
from defense.folders import folder_sizes, pack_tar, tree_hash
from defense.obstacles import archive_obstacles
from defense.wrap import read_wrap_facts, unwrap_archive, wrap_archive

MANIFEST_TEXT = json.dumps(
    {
        "runtime": "python",
        "model": {"modelName": "m", "modelVersion": "2.5", "handler": "image_classifier"},
    }
)
FILES = {"net.py": "class Net: ...", "package/__init__.py": "x = 1", MANIFEST: MANIFEST_TEXT}
Make = Callable[..., Path]


def as_folder(folder: Path, files: Mapping[str, str] = FILES) -> Path:
    for name, content in files.items():
        path = folder / "m" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder / "m"


def as_tar(folder: Path, files: Mapping[str, str] = FILES) -> Path:
    pack_tar(as_folder(folder / "unpacked", files), folder / "m.tar.gz", "top")
    return folder / "m.tar.gz"


@pytest.fixture(params=[as_folder, as_tar])
def make(request: pytest.FixtureRequest) -> Make:
    made: Make = request.param
    return made


@pytest.fixture
def guard_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "guard"
    folder.mkdir()
    for name in ("guard.json", "tensors.safetensors"):
        (folder / name).write_text(name)
    return folder


def wrap(source: Path, target: Path, guard_folder: Path) -> Path:
    wrap_archive(source, target, guard_folder=guard_folder, handler_source="# ours\n")
    return target


def contents(path: Path) -> object:
    if path.is_dir():
        return {name: (path / name).read_bytes() for name in folder_sizes(path)}
    return path.read_bytes()


def test_it_is_read_as_torchserve_would(tmp_path: Path, make: Make) -> None:
    archive = read_archive(make(tmp_path))
    assert set(archive.entries) == set(FILES)
    assert (archive.model_name, archive.model_version) == ("m", "2.5")
    assert archive_obstacles(archive) == []
    extract_archive(archive.path, tmp_path / "there")
    for name, content in FILES.items():
        assert (tmp_path / "there" / name).read_text() == content


def test_it_is_wrapped_and_given_back_byte_for_byte(
    tmp_path: Path, make: Make, guard_folder: Path
) -> None:
    source = make(tmp_path)
    before = contents(source)
    wrapped = wrap(source, tmp_path / f"wrapped-{source.name}", guard_folder)
    back = tmp_path / f"back-{source.name}"
    unwrap_archive(wrapped, back)

    archive = read_archive(wrapped)
    assert archive.is_wrapped
    assert archive.handler == "pathguard_handler.py"
    extract_archive(wrapped, tmp_path / "there")
    assert (tmp_path / "there" / "pathguard_handler.py").read_text() == "# ours\n"
    assert (tmp_path / "there" / "pathguard" / "guard.json").read_text() == "guard.json"
    assert read_wrap_facts(tmp_path / "there").inner_handler == "image_classifier"
    assert contents(back) == contents(source) == before


def test_the_same_inputs_give_the_same_bytes(
    tmp_path: Path, make: Make, guard_folder: Path
) -> None:
    source = make(tmp_path)
    one, two = (wrap(source, tmp_path / f"{n}-{source.name}", guard_folder) for n in "12")
    assert contents(one) == contents(two)


def test_a_wrapped_one_that_was_changed_is_not_given_back(
    tmp_path: Path, make: Make, guard_folder: Path
) -> None:
    source = make(tmp_path)
    wrapped = wrap(source, tmp_path / f"wrapped-{source.name}", guard_folder)
    if wrapped.is_dir():
        (wrapped / "net.py").write_text("changed")
    else:
        extract_archive(wrapped, tmp_path / "there")
        (tmp_path / "there" / "pathguard" / "original_tail.bin").write_text("changed")
        pack_tar(tmp_path / "there", wrapped, "top")
    with pytest.raises(ArchiveError, match="was changed after it was wrapped"):
        unwrap_archive(wrapped, tmp_path / f"back-{source.name}")
    assert not (tmp_path / f"back-{source.name}").exists()


def test_what_python_leaves_in_a_served_folder_is_no_part_of_it(
    tmp_path: Path, guard_folder: Path
) -> None:
    source = as_folder(tmp_path)
    wrapped = wrap(source, tmp_path / "wrapped", guard_folder)
    (wrapped / "__pycache__").mkdir()
    (wrapped / "__pycache__" / "net.pyc").write_bytes(b"0")
    unwrap_archive(wrapped, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


def test_a_folder_is_not_wrapped_into_one_that_exists_or_into_itself(
    tmp_path: Path, guard_folder: Path
) -> None:
    source = as_folder(tmp_path)
    for target in (guard_folder, source / "inside"):
        with pytest.raises(
            ArchiveError, match=r"exists or lies in .*; name a new folder beside it"
        ):
            wrap(source, target, guard_folder)
    with pytest.raises(ArchiveError, match="cannot be written"):
        wrap(source, tmp_path / "absent" / "target", guard_folder)


def test_a_link_in_a_folder_is_refused(tmp_path: Path) -> None:
    source = as_folder(tmp_path)
    (source / "secret").symlink_to("/etc/passwd")
    with pytest.raises(ArchiveError, match="unsafe entry 'secret': links and devices"):
        read_archive(source)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    source = as_folder(tmp_path)
    (source / "package").chmod(0)
    with pytest.raises(ArchiveError, match="cannot be read"):
        read_archive(source)


def test_an_entry_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ArchiveError, match=r"gone\.py cannot be read"),
        opened_entry(as_folder(tmp_path), "gone.py"),
    ):
        pass


def tar_of(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "entry",
    [
        member("top/../../etc/passwd"),
        member("/etc/passwd"),
        member("top/./x"),
        member("top/link", tarfile.SYMTYPE, "/etc/passwd"),
        member("top/link", tarfile.LNKTYPE, "top/other"),
        member("top/device", tarfile.CHRTYPE),
    ],
)
def test_an_unsafe_entry_of_a_tar_is_refused(tmp_path: Path, entry: tarfile.TarInfo) -> None:
    path = tar_of(tmp_path / "m.tar.gz", entry)
    with pytest.raises(ArchiveError, match=r"unsafe entry .* only files with relative names"):
        read_archive(path)
    with pytest.raises(ArchiveError, match="unsafe entry"):
        extract_archive(path, tmp_path / "there")


def test_a_file_beside_the_folder_of_a_tar_is_refused(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "m.tgz", member("net.py"))
    with pytest.raises(ArchiveError, match=r"has the file 'net\.py' outside of a folder"):
        read_archive(path)


def test_a_damaged_tar_is_refused(tmp_path: Path) -> None:
    path = as_tar(tmp_path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ArchiveError, match="cannot be read as a gzipped tar"):
        read_archive(path)


def test_a_hash_of_a_folder_knows_names_and_contents(tmp_path: Path) -> None:
    hashes = {
        tree_hash(as_folder(tmp_path / str(number), files))
        for number, files in enumerate(
            ({"a": "1", "b": "2"}, {"a": "2", "b": "1"}, {"ab": "12"}, {"a": "1", "c": "2"})
        )
    }
    assert len(hashes) == 4
