"""Payloads are judged by size and header before decoding, and diagnosed after it failed."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from defense.config import Limits
from defense.payload import InvalidReason, as_bytes, diagnose, opening_only, over_limits
from tests.campaigns.images import chunk, gif, jpeg_of_scans, png
from tests.served import encoded

GREY = encoded(np.arange(64, dtype=np.uint8).reshape(8, 8))
NOISE = encoded(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), "JPEG")


def header_of_a_png(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds no pixels."""
    size = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = (
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c))
        for c in (size, b"IDAT")
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def short_id(value: object) -> str | None:
    return f"{len(value)} bytes" if isinstance(value, bytes) else None


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (GREY, None),
        (bytearray(GREY), None),
        (base64.b64encode(GREY).decode(), None),
        (b"", InvalidReason.EMPTY),
        ("", InvalidReason.EMPTY),
        (b"x" * 2001, InvalidReason.TOO_MANY_BYTES),
        (base64.b64encode(b"x" * 2001).decode(), InvalidReason.TOO_MANY_BYTES),
        (encoded(np.zeros((11, 10), np.uint8)), InvalidReason.TOO_MANY_PIXELS),
        (header_of_a_png(60_000, 60_000), InvalidReason.TOO_MANY_PIXELS),
        (header_of_a_png(12_000, 12_000), InvalidReason.TOO_MANY_PIXELS),
        (b"no image at all", None),
        (GREY[:20], None),
        ({"instances": [1]}, None),
        (None, None),
        (10**10, InvalidReason.WRONG_SHAPE),
        (True, InvalidReason.WRONG_SHAPE),
        (1.5, InvalidReason.WRONG_SHAPE),
    ],
    ids=short_id,
)
def test_limits_are_checked_from_the_size_and_the_header_alone(
    payload: object, reason: InvalidReason | None
) -> None:
    assert over_limits(payload, Limits(max_bytes=2000, max_pixels=100)) is reason


def test_a_limit_itself_is_within_the_limits() -> None:
    image = encoded(np.zeros((10, 10), np.uint8))
    assert over_limits(image, Limits(max_bytes=len(image), max_pixels=100)) is None


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", InvalidReason.EMPTY),
        (b"no image at all", InvalidReason.NOT_AN_IMAGE),
        ("no image at all", InvalidReason.NOT_AN_IMAGE),
        ("\u00fc", InvalidReason.NOT_AN_IMAGE),
        (GREY[:20], InvalidReason.TRUNCATED_IMAGE),
        (GREY[:-30], InvalidReason.TRUNCATED_IMAGE),
        (NOISE[: len(NOISE) // 2], InvalidReason.TRUNCATED_IMAGE),
        (GREY[:44] + b"\x00\x00" + GREY[46:], InvalidReason.TRUNCATED_IMAGE),
        (header_of_a_png(60_000, 60_000), InvalidReason.TOO_MANY_PIXELS),
        (GREY, InvalidReason.UNREADABLE),
        ({"instances": [1]}, InvalidReason.UNREADABLE),
        (None, InvalidReason.UNREADABLE),
    ],
    ids=short_id,
)
def test_a_payload_that_the_handler_could_not_read_gets_a_reason(
    payload: object, reason: InvalidReason
) -> None:
    assert diagnose(payload) is reason


def test_a_text_is_read_as_base64_and_as_itself_where_it_is_none() -> None:
    assert as_bytes(base64.b64encode(b"hello").decode()) == b"hello"
    assert as_bytes("abc") == b"abc"
    assert as_bytes(3) is None


def test_pillows_own_limit_is_no_warning_but_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert over_limits(GREY, Limits(max_pixels=60)) is InvalidReason.TOO_MANY_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    assert diagnose(GREY) is InvalidReason.TOO_MANY_PIXELS


def test_scans_of_a_jpeg_are_counted_before_it_is_opened() -> None:
    image = jpeg_of_scans(16, 20)
    passes = image.count(b"\xff\xda")
    assert over_limits(image, Limits(max_passes=passes)) is None
    assert over_limits(image, Limits(max_passes=passes - 1)) is InvalidReason.TOO_MANY_PARTS


def test_colour_profiles_of_a_png_are_counted_before_it_is_opened() -> None:
    profile = chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(10)))
    assert over_limits(png(8, 8, profile), Limits(max_passes=1)) is None
    assert over_limits(png(8, 8, profile * 2), Limits(max_passes=1)) is InvalidReason.TOO_MANY_PARTS


@pytest.mark.parametrize(
    "image",
    [
        png(8, 8, chunk(b"tEXt", b"a\0b") * 100),
        png(8, 8, chunk(b"abCd", b"") * 100),
        gif(b"!\xfe" + b"\1x" * 200 + b"\0"),
        gif(b"!\xfe\1x\0" * 100),
        b"\xff\xd8" + b"\xff\xfe\0\2" * 200 + NOISE[2:],
    ],
    ids=["texts", "unknown chunks", "blocks", "extensions", "segments"],
)
def test_a_header_of_more_pieces_than_allowed_is_not_read_to_its_end(image: bytes) -> None:
    assert over_limits(image, Limits()) is None
    limits = Limits(max_parts=100)
    assert over_limits(image, limits) is InvalidReason.TOO_MANY_PARTS


def test_a_format_that_is_not_allowed_is_opened_by_nobody() -> None:
    tiff = encoded(np.zeros((8, 8), np.uint8), "TIFF")
    allowed = Image.ID
    with opening_only(["PNG"]):
        assert diagnose(tiff) is InvalidReason.NOT_AN_IMAGE
        assert diagnose(GREY) is InvalidReason.UNREADABLE
    assert Image.ID is allowed
    assert diagnose(tiff) is InvalidReason.UNREADABLE
    assert (
        over_limits(encoded(np.zeros((11, 10), np.uint8), "TIFF"), Limits(max_pixels=100)) is None
    )


def test_chunks_of_a_png_are_counted_behind_its_pixels_too() -> None:
    image = png(8, 8, trailing=chunk(b"tEXt", b"") * 47)  # and header, pixels and end
    assert over_limits(image, Limits(max_parts=50)) is None
    assert over_limits(image, Limits(max_parts=49)) is InvalidReason.TOO_MANY_PARTS
