"""What a request carries, looked at before anything decodes it, and after decoding it failed."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from enum import StrEnum

from PIL import Image, UnidentifiedImageError

from defense.config import Limits


class InvalidReason(StrEnum):
    """Why a request could not be answered: the whole list that clients and metrics see."""

    EMPTY = "empty"
    TOO_MANY_BYTES = "too_many_bytes"
    TOO_MANY_PIXELS = "too_many_pixels"
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED_IMAGE = "truncated_image"
    WRONG_SHAPE = "wrong_shape"
    NOT_FINITE = "not_finite"
    UNREADABLE = "unreadable"


def over_limits(payload: object, limits: Limits) -> InvalidReason | None:
    """Return what a payload breaks of `limits`, from its size and its image header alone.

    A payload that is no image passes: only the archive's own handler knows what else it reads.
    """
    raw = as_bytes(payload)
    if raw is None:
        return None
    if len(raw) > limits.max_bytes:
        return InvalidReason.TOO_MANY_BYTES
    if not raw:
        return InvalidReason.EMPTY
    try:
        with _opened(raw) as image:
            pixels = image.width * image.height
    except Image.DecompressionBombError:
        return InvalidReason.TOO_MANY_PIXELS
    except Exception:
        return None
    return InvalidReason.TOO_MANY_PIXELS if pixels > limits.max_pixels else None


def diagnose(payload: object) -> InvalidReason:
    """Return why the archive's handler could not read a payload."""
    raw = as_bytes(payload)
    if raw is None:
        return InvalidReason.UNREADABLE
    if not raw:
        return InvalidReason.EMPTY
    try:
        with _opened(raw) as image:
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


def _opened(raw: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(raw))
