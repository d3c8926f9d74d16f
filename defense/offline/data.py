"""Images on disk: a folder or a zip, one folder per class, or no classes at all."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile

from defense.errors import DataError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
PORTION = 256
"""Files that are read at a time."""


@dataclass(frozen=True)
class ImageSet:
    """Image files and their classes. `labels` index `class_names`; None where images are unlabelled."""

    root: Path
    names: tuple[str, ...]
    labels: tuple[int, ...] | None
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def payload(self, index: int) -> bytes:
        """Return one file's bytes."""
        if self.root.is_dir():
            return (self.root / self.names[index]).read_bytes()
        with ZipFile(self.root) as archive:
            return archive.read(self.names[index])

    def payloads(self, indices: Sequence[int]) -> list[bytes]:
        """Return several files' bytes."""
        if self.root.is_dir():
            return [self.payload(index) for index in indices]
        with ZipFile(self.root) as archive:
            return [archive.read(self.names[index]) for index in indices]

    def stream(self, indices: Sequence[int] | None = None) -> Iterator[bytes]:
        """Return the bytes of the given images, or of all, of which few are held at a time."""
        rows = range(len(self)) if indices is None else indices
        for start in range(0, len(rows), PORTION):
            yield from self.payloads(rows[start : start + PORTION])

    def take(self, indices: Sequence[int]) -> ImageSet:
        """Return the given images, in that order."""
        labels = None if self.labels is None else tuple(self.labels[i] for i in indices)
        return ImageSet(self.root, tuple(self.names[i] for i in indices), labels, self.class_names)

    def part(self, number: int, parts: int, *, last: int | None = None) -> ImageSet:
        """Return the images of part `number`, from 1, of `parts` disjoint ones of about one size.

        last: those of all parts from `number` to this one. An image's own name decides, so that it
        lies in the same part wherever the data lies.
        """
        last = number if last is None else last
        if not 1 <= number <= last <= parts:
            wanted = f"{number}" if last == number else f"{number}-{last}"
            raise DataError(
                f"there is no part {wanted} of {parts}; name one such as 1/2, from 1/{parts} to "
                f"{parts}/{parts}, or several such as 1-{parts}/{parts}"
            )
        keys = ["/".join(PurePosixPath(name).parts[-2:]).encode() for name in self.names]
        digests = [blake2b(key, digest_size=4).digest() for key in keys]
        return self.take(
            [i for i, d in enumerate(digests) if number <= int.from_bytes(d) % parts + 1 <= last]
        )

    def shuffled(self, seed: int, limit: int | None = None) -> ImageSet:
        """Return the images in random order, at most `limit`, classes in their own proportions."""
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)  # noqa: S311 - a reproducible split, no secret
        return self.take(order[:limit])


def read_images(path: Path) -> ImageSet:
    """List the images under `path`: a folder, a zip, or a folder inside a zip (`data.zip/test`).

    The class of an image is the name of the folder that it lies in; images that lie directly in
    `path` are unlabelled. DataError where there is none, or all are of one class.
    """
    # Absolute, because a handler that is opened offline finds itself in its own folder.
    root, inside = _locate(path.absolute())
    names = sorted(_names(root, inside))
    if not names:
        raise DataError(
            f"no images under {path}; expected files such as CLASS/1.png "
            f"({', '.join(sorted(SUFFIXES))})"
        )
    base = PurePosixPath(inside)
    folders = [str(PurePosixPath(name).parent.relative_to(base)) for name in names]
    if set(folders) == {"."}:
        return ImageSet(root, tuple(names), None, ())
    classes = [PurePosixPath(folder).name for folder in folders]
    class_names = tuple(sorted(set(classes)))
    if len(class_names) == 1:
        raise DataError(
            f"all images under {path} are of one class ('{class_names[0]}'); a guard needs at least "
            "two: give a folder with one folder per class"
        )
    if "." in folders:
        raise DataError(
            f"{folders.count('.')} images lie beside the class folders of {path}; "
            "move them into the folder of their class"
        )
    index = {name: i for i, name in enumerate(class_names)}
    return ImageSet(root, tuple(names), tuple(index[c] for c in classes), class_names)


def _locate(path: Path) -> tuple[Path, str]:
    """Return the folder or zip file, and the folder inside of the zip."""
    if path.is_dir():
        return path, "."
    for candidate in (path, *path.parents):
        if candidate.is_file():
            return candidate, path.relative_to(candidate).as_posix()
    raise DataError(f"there is no data at {path}; give a folder or a zip of images")


def _names(root: Path, inside: str) -> list[str]:
    if root.is_dir():
        found = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    else:
        try:
            with ZipFile(root) as archive:
                found = (name for name in archive.namelist())
        except (BadZipFile, OSError) as error:
            raise DataError(f"{root} is no zip file; give a folder or a zip of images") from error
    return [
        name
        for name in found
        if PurePosixPath(name).suffix.lower() in SUFFIXES
        and not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)
        and (inside == "." or PurePosixPath(name).is_relative_to(inside))
    ]
