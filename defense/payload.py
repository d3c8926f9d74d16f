"""What a request carries, looked at before anything decodes it, and after decoding it failed."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum

from PIL import Image, UnidentifiedImageError

from defense.config import Limits


class InvalidReason(StrEnum):
    """Why a request could not be answered: the whole list that clients and metrics see."""

    EMPTY = "empty"
    TOO_MANY_BYTES = "too_many_bytes"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_MANY_PARTS = "too_many_parts"
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED_IMAGE = "truncated_image"
    WRONG_SHAPE = "wrong_shape"
    NOT_FINITE = "not_finite"
    UNREADABLE = "unreadable"


_PNG = b"\x89PNG"
_PASSES = {b"\xff\xd8": b"\xff\xda", _PNG: b"iCCP"}
"""How a file begins, and what begins a piece of it that takes far longer than its bytes say.

A scan of a progressive JPEG takes a few bytes and a pass over all pixels; a PNG should have one
colour profile, and Pillow inflates a megabyte for each. Pixels cannot hold a scan's beginning, and
elsewhere chance makes few.
"""


def over_limits(payload: object, limits: Limits) -> InvalidReason | None:
    """Return what a payload breaks of `limits`, from its bytes and its image header alone.

    A payload that is no image passes: only the archive's own handler knows what else it reads. A
    number does not, because torch's tensors take it for a length, and their memory follows.
    """
    if isinstance(payload, (int, float)):
        return InvalidReason.WRONG_SHAPE
    raw = as_bytes(payload)
    if raw is None:
        return None
    if len(raw) > limits.max_bytes:
        return InvalidReason.TOO_MANY_BYTES
    if not raw:
        return InvalidReason.EMPTY
    if _passes(raw) > limits.max_passes or _chunks(raw, limits.max_parts) > limits.max_parts:
        return InvalidReason.TOO_MANY_PARTS
    file = _Metered(raw, limits.max_parts)
    try:
        with opening_only(limits.formats), _opened(file) as image:
            pixels = image.width * image.height
    except Image.DecompressionBombError:
        return InvalidReason.TOO_MANY_PIXELS
    except Exception:
        return InvalidReason.TOO_MANY_PARTS if file.reads_left < 0 else None
    return InvalidReason.TOO_MANY_PIXELS if pixels > limits.max_pixels else None


@contextmanager
def opening_only(formats: Sequence[str]) -> Iterator[None]:
    """Let Pillow open no other formats within the block, whoever asks it to.

    For the whole process: a block in another thread must not end before one that it began in.
    """
    Image.init()
    known = Image.ID
    Image.ID = [name for name in known if name in formats]
    try:
        yield
    finally:
        Image.ID = known


def diagnose(payload: object) -> InvalidReason:
    """Return why the archive's handler could not read a payload."""
    raw = as_bytes(payload)
    if raw is None:
        return InvalidReason.UNREADABLE
    if not raw:
        return InvalidReason.EMPTY
    try:
        with _opened(io.BytesIO(raw)) as image:
            image.load()
    except UnidentifiedImageError:
        return InvalidReason.NOT_AN_IMAGE
    except Image.DecompressionBombError:
        return InvalidReason.TOO_MANY_PIXELS
    except Exception:
        # PIL has no common error for damaged data: OSError, SyntaxError, struct.error and others.
        return InvalidReason.TRUNCATED_IMAGE
    return InvalidReason.UNREADABLE


def as_bytes(payload: object) -> bytes | None:
    """Return a payload's bytes; a base64 text is decoded as TorchServe's vision handlers do."""
    if isinstance(payload, (bytes, bytearray)):
        return bytes(payload)
    if isinstance(payload, str):
        try:
            return base64.b64decode(payload)
        except (binascii.Error, ValueError):
            return payload.encode("utf-8", "replace")
    return None


def _passes(raw: bytes) -> int:
    return sum(raw.count(mark) for start, mark in _PASSES.items() if raw.startswith(start))


def _chunks(raw: bytes, most: int) -> int:
    """Count the chunks of a PNG, up to one more than `most`: Pillow walks through all of them."""
    count, at = 0, 8
    while count <= most and raw.startswith(_PNG) and at < len(raw):
        at += 12 + int.from_bytes(raw[at : at + 4], "big")
        count += 1
    return count


class _Metered(io.BytesIO):
    """Bytes of which a parser may read only so many pieces: one with more has lost its way."""

    def __init__(self, raw: bytes, reads: int) -> None:
        super().__init__(raw)
        self.reads_left = reads

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise EOFError
        return super().read(size)


def _opened(file: io.BytesIO) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file)
