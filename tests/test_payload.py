"""Payloads are judged by size and header before decoding, and diagnosed after it failed."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from defense.config import Limits
from defense.payload import InvalidReason, as_bytes, diagnose, over_limits
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
