"""What a client sent, as a picture that a browser may be shown: decoded here, encoded anew."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image
from torch import Tensor

from defense.config import Limits
from defense.errors import DataError
from defense.payload import as_bytes, diagnose, opening_only, over_limits

LONGEST = 640
"""Pixels of the longer side; larger pictures are shrunk to it."""
HEAT = {True: (204, 85, 0), False: (0, 90, 181)}
"""For and against the class: told apart by people who do not tell red and green apart."""
_PILLOW = threading.Lock()
"""What Pillow may open is set for the whole process."""


@contextmanager
def opening(payload: bytes, limits: Limits) -> Iterator[bytes]:
    """Return a payload's bytes where a server with these limits would open them; one at a time.

    Inside, Pillow opens what that server's would, whoever asks it to. DataError says why it would not.
    """
    raw = as_bytes(payload)
    assert raw is not None
    with _PILLOW, opening_only(limits.formats):
        if reason := over_limits(raw, limits):
            raise DataError(f"the payload cannot be shown: {reason.replace('_', ' ')}")
        yield raw


def as_png(payload: bytes, limits: Limits) -> bytes:
    """Decode a payload within the limits of a server and encode its pixels as a PNG, and nothing else.

    DataError says why it cannot be shown.
    """
    with opening(payload, limits) as raw:
        try:
            with Image.open(io.BytesIO(raw)) as image:
                pixels = image.convert("RGB")
        except Exception as error:  # Pillow has no common error for damaged data
            raise DataError(
                f"the payload cannot be shown: {diagnose(raw).replace('_', ' ')}"
            ) from error
    pixels.thumbnail((LONGEST, LONGEST))
    # Pixels alone: what else a file carries (a profile, a text) would travel on with `pixels`.
    return encoded(Image.frombytes("RGB", pixels.size, pixels.tobytes()))


def heat_map(values: Tensor, inputs: Tensor) -> bytes:
    """Draw an attribution over what the network saw, as a PNG.

    values: (H, W), above 0 for the class. inputs: (C, H, W). Colours are full from the 99th
    percentile on.
    """
    total = values.float().nan_to_num(0.0).numpy()
    share = np.clip(total / max(float(np.quantile(np.abs(total), 0.99)), 1e-12), -1, 1)
    grey = inputs.float().mean(0).nan_to_num(0.0).numpy()
    spread = max(float(np.ptp(grey)), 1e-12)
    paper = (200 + 55 * (grey - grey.min()) / spread)[..., None]
    colour = np.where(share[..., None] > 0, HEAT[True], HEAT[False])
    weight = np.abs(share)[..., None]
    drawn = (1 - weight) * paper + weight * colour
    return encoded(Image.fromarray(drawn.astype(np.uint8)))


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
