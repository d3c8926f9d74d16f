"""Images in folders and zips: the folder that an image lies in is its class."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from defense.errors import DataError
from defense.offline.data import ImageSet, read_images

FILES = {"cat/1.png": b"c1", "cat/2.JPG": b"c2", "dog/1.webp": b"d1", "dog/notes.txt": b"x"}


def as_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def as_zip(root: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(root / "data.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return root / "data.zip"


@pytest.mark.parametrize("store", [as_folder, as_zip])
def test_a_folder_and_a_zip_hold_the_same_images(
    store: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path
) -> None:
    images = read_images(store(tmp_path, FILES))
    assert images.names == ("cat/1.png", "cat/2.JPG", "dog/1.webp")
    assert images.class_names == ("cat", "dog")
    assert images.labels == (0, 0, 1)
    assert (
        [images.payload(i) for i in range(3)] == images.payloads(range(3)) == [b"c1", b"c2", b"d1"]
    )
    assert len(images) == 3


@pytest.mark.parametrize("store", [as_folder, as_zip])
def test_a_folder_inside_can_be_named(
    store: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path
) -> None:
    files = {f"{part}/{name}": data for part in ("train", "test") for name, data in FILES.items()}
    images = read_images(store(tmp_path, files | {"testing/cat/1.png": b"no"}) / "test")
    assert len(images) == 3
    assert images.class_names == ("cat", "dog")
    assert images.payloads([2]) == [b"d1"]


def test_images_without_class_folders_are_unlabelled(tmp_path: Path) -> None:
    images = read_images(as_folder(tmp_path, {"1.png": b"", "2.png": b""}))
    assert (images.labels, images.class_names) == (None, ())


@pytest.mark.parametrize("store", [as_folder, as_zip])
def test_no_image_is_an_error_that_says_what_was_expected(
    store: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path
) -> None:
    with pytest.raises(
        DataError, match=r"no images under .*; expected files such as CLASS/1\.png \(\.bmp"
    ):
        read_images(store(tmp_path, {"cat/readme.txt": b""}))


def test_a_single_class_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"all images under .* are of one class \('cat'\)"):
        read_images(as_folder(tmp_path, {"cat/1.png": b"", "cat/2.png": b""}))


def test_images_beside_the_class_folders_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"2 images lie beside the class folders of .*; move them into"
    ):
        read_images(as_folder(tmp_path, FILES | {"7.png": b"", "8.png": b""}))


def test_data_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    where = tmp_path / "no" / "where"
    with pytest.raises(
        DataError, match=f"there is no data at {re.escape(str(where))}; give a folder"
    ):
        read_images(where)


def test_a_file_that_is_no_zip_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(
        DataError, match=r"data\.zip is no zip file; give a folder or a zip of images"
    ):
        read_images(tmp_path / "data.zip")


def test_shuffling_is_reproducible_keeps_labels_with_images_and_can_be_limited() -> None:
    images = ImageSet(Path(), tuple(f"{i}.png" for i in range(50)), tuple(range(50)), ("x",) * 50)
    shuffled = images.shuffled(3)
    assert shuffled == images.shuffled(3)
    assert shuffled.names != images.names
    assert sorted(shuffled.names) == sorted(images.names)
    assert shuffled.labels is not None
    assert shuffled.names == tuple(f"{label}.png" for label in shuffled.labels)
    assert images.shuffled(3, limit=7).names == shuffled.names[:7]
    assert images.shuffled(4).names != shuffled.names


def test_unlabelled_images_stay_unlabelled_when_some_are_taken() -> None:
    images = ImageSet(Path(), ("a", "b", "c"), None, ())
    assert images.take([2, 0]) == ImageSet(Path(), ("c", "a"), None, ())


def test_what_an_operating_system_leaves_in_a_zip_is_no_image(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for name in ("a/1.png", "b/2.png", "__MACOSX/a/._1.png", "a/.hidden.png"):
            archive.writestr(name, b"")

    assert read_images(tmp_path / "data.zip").names == ("a/1.png", "b/2.png")


def test_parts_are_disjoint_complete_and_the_same_wherever_the_images_lie(tmp_path: Path) -> None:
    names = tuple(f"cat/{i}.png" for i in range(200))
    here = ImageSet(tmp_path, names, (0,) * 200, ("cat",))
    there = ImageSet(tmp_path, tuple(f"test/{name}" for name in names), (0,) * 200, ("cat",))
    first, second = here.part(1, 2), here.part(2, 2)
    assert sorted(first.names + second.names) == sorted(names)
    assert 70 < len(first) < 130
    assert [f"test/{name}" for name in first.names] == list(there.part(1, 2).names)


def test_several_parts_are_those_that_lie_in_one_of_them(tmp_path: Path) -> None:
    images = ImageSet(tmp_path, tuple(f"cat/{i}.png" for i in range(200)), (0,) * 200, ("cat",))
    some = [images.part(number, 5) for number in (2, 3, 4)]
    together = images.part(2, 5, last=4)
    assert sorted(together.names) == sorted(name for part in some for name in part.names)
    assert images.part(1, 5, last=5) == images


@pytest.mark.parametrize(
    ("first", "last", "wanted"), [(3, None, "3"), (0, 1, "0-1"), (2, 1, "2-1"), (1, 3, "1-3")]
)
def test_a_part_that_does_not_exist_is_refused(
    tmp_path: Path, first: int, last: int | None, wanted: str
) -> None:
    with pytest.raises(DataError, match=f"there is no part {wanted} of 2; name one such as 1/2"):
        ImageSet(tmp_path, (), None, ()).part(first, 2, last=last)
