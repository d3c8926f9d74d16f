"""Image files as nobody means well with them: damaged, built to be slow or huge, two things at once.

Everything is a function of a seed. Bombs stay below `MAX_BYTES`, what a server takes by default.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from random import Random

import numpy as np
from PIL import Image

MAX_BYTES = 6_000_000
SIDE = 32
_MODES = ("RGB", "L", "RGBA", "P", "CMYK", "1", "LA", "I;16", "F")
_VARIANTS: tuple[tuple[str, str, dict[str, object]], ...] = (
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "RGB", {"quality": 1, "comment": b"x" * 200}),
    ("PNG", "P", {"transparency": 0}),
    ("WEBP", "RGB", {"lossless": True}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "RGB", {"compression": "tiff_adobe_deflate"}),
    ("TIFF", "1", {"compression": "group4"}),
    ("PPM", "L", {}),
)
_ANIMATED = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")


def picture(seed: int, side: int = SIDE) -> Image.Image:
    """Return smooth random colours, about as photographs are when they are small."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return an image as a file of a format that Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def well_formed(seed: int) -> dict[str, bytes]:
    """Return a file of every format that Pillow writes and reads, in every mode that it has."""
    Image.init()
    base = picture(seed)
    found: dict[str, bytes] = {}
    kinds = sorted({*Image.SAVE} & {*Image.OPEN})
    plain = [(kind, mode, dict[str, object]()) for kind in kinds for mode in _MODES]
    for kind, mode, options in [*plain, *_VARIANTS]:
        try:
            content = encoded(base.convert(mode), kind, **options)
            with Image.open(io.BytesIO(content)) as image:
                image.load()
        except Exception:  # noqa: S112 - the format has no such mode, or needs a program to be read
            continue
        name = " ".join([kind, mode, *options])
        found[name] = content
    for kind in _ANIMATED:
        first, *others = (picture(seed + number) for number in range(4))
        found[f"{kind} animated"] = encoded(first, kind, save_all=True, append_images=others)
    return found


def damaged(rng: Random, raw: bytes, other: bytes) -> tuple[str, bytes]:
    """Damage a file in one of several ways; `other` is where spliced parts come from."""
    content = bytearray(raw)
    how = rng.choice(("flips", "cut", "splice", "header", "double", "zeros", "insert", "length"))
    place = rng.randrange(len(content))
    part = 1 + rng.randrange(64)
    if how == "flips":
        for _ in range(1 + rng.randrange(16)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[place:]
    elif how == "splice":
        content[place:] = other[rng.randrange(len(other)) :]
    elif how == "header":
        for _ in range(1 + rng.randrange(6)):
            content[rng.randrange(min(48, len(content)))] = rng.choice((0, 1, 127, 128, 255))
    elif how == "double":
        content[place:place] = content[place : place + 4 * part] * (1 + rng.randrange(20))
    elif how == "zeros":
        content[place : place + part] = bytes(part)
    elif how == "insert":
        content[place:place] = rng.randbytes(part)
    else:  # what may be a length or a count becomes the largest there is
        content[place : place + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"))
    return how, bytes(content)


def png(width: int, height: int, *chunks: bytes, trailing: bytes = b"") -> bytes:
    """Return a grey PNG whose header says this size, with chunks before or behind its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(72)))
    return b"".join((b"\x89PNG\r\n\x1a\n", header, *chunks, pixels, trailing, chunk(b"IEND", b"")))


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return one chunk of a PNG."""
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def flood(piece: bytes, size: int = MAX_BYTES - 10_000) -> bytes:
    """Repeat a piece up to a size."""
    return piece * (size // len(piece))


def jpeg_of_scans(side: int, scans: int) -> bytes:
    """Return a progressive JPEG (side, side) whose last scan is there `scans` more times."""
    content = encoded(Image.new("RGB", (side, side), (100, 50, 20)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xc4", 0, content.rindex(b"\xff\xda"))
    scan = content[last:-2]
    return content[:-2] + scan * min(scans, (MAX_BYTES - len(content)) // len(scan)) + b"\xff\xd9"


def jpeg_of_size(width: int, height: int) -> bytes:
    """Return a small JPEG whose header says another size."""
    content = bytearray(encoded(picture(0), "JPEG"))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def gif(extension: bytes = b"", *, width: int = SIDE, height: int = SIDE) -> bytes:
    """Return a GIF with an extension before its first frame, and a screen of any size."""
    content = bytearray(encoded(picture(0).convert("P"), "GIF"))
    content[6:10] = struct.pack("<HH", width, height)
    palette = 3 << ((content[10] & 7) + 1) if content[10] & 128 else 0
    content[13 + palette : 13 + palette] = extension
    return bytes(content)


def gif_of_frames(frames: int) -> bytes:
    """Return a GIF of many frames of one pixel."""
    content = encoded(Image.new("P", (1, 1)), "GIF")
    frame = content[content.index(b",") : -1]
    return content[:-1] + frame * min(frames, (MAX_BYTES - len(content)) // len(frame)) + b";"


def tiff_of_strips(strips: int) -> bytes:
    """Return a TIFF one pixel wide with a strip for every row."""
    place = 16
    tags = [
        (256, 4, 1, 1), (257, 4, 1, strips), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
        (273, 4, strips, place), (277, 3, 1, 1), (278, 4, 1, 1), (279, 4, strips, place),
    ]  # fmt: skip
    offset = place + 4 * strips
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    start = b"II*\0" + struct.pack("<I", offset) + bytes(8)
    return start + struct.pack("<I", 8) * strips + directory


def bmp_of_runs(width: int, height: int, runs: bytes) -> bytes:
    """Return a run-length encoded BMP."""
    offset = 14 + 40 + 1024
    head = struct.pack("<IHHI", offset + len(runs), 0, 0, offset)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + head + info + bytes(1024) + runs


def ico_around(inner: bytes) -> bytes:
    """Return an icon of 32 by 32 that holds another PNG than it says."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 32, 32, 0, 0, 1, 32, len(inner), 22) + inner


def _deflated(size: int) -> bytes:
    return b"key\0\0" + zlib.compress(bytes(size), 9)


def _blank(kind: str, side: int, mode: str = "RGB", **options: object) -> bytes:
    return encoded(Image.new(mode, (side, side)), kind, **options)


_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n(/etc/passwd)(r)file\n"
BOMBS: dict[str, Callable[[], bytes]] = {
    "png of 60000x60000": partial(png, 60_000, 60_000),
    "png of 2^31 columns": partial(png, 2**31 - 1, 1),
    "png of no columns": partial(png, 0, 0),
    "png, 26 million pixels": partial(_blank, "PNG", 5100, "L"),
    "png, flood of texts": lambda: png(8, 8, flood(chunk(b"tEXt", b""))),
    "png, flood of texts behind": lambda: png(8, 8, trailing=flood(chunk(b"tEXt", b""))),
    "png, flood of pixel chunks": lambda: png(8, 8, flood(chunk(b"IDAT", b""))),
    "png, deflated texts": lambda: png(8, 8, flood(chunk(b"zTXt", _deflated(1_000_000)))),
    "png, one text of 100 megabytes": lambda: png(8, 8, chunk(b"zTXt", _deflated(10**8))),
    "png, colour profiles": lambda: png(8, 8, flood(chunk(b"iCCP", _deflated(1_000_000)))),
    "png, a few colour profiles": lambda: png(8, 8, chunk(b"iCCP", _deflated(10**6)) * 30),
    "jpeg of 65535x65535": partial(jpeg_of_size, 65_535, 65_535),
    "jpeg of 4900x4900, cut": partial(jpeg_of_size, 4_900, 4_900),
    "jpeg, thousands of scans": partial(jpeg_of_scans, 1_000, 10**6),
    "jpeg, flood of segments": lambda: b"\xff\xd8" + flood(b"\xff\xfe\0\2"),
    "gif of 65535x65535": partial(gif, width=65_535, height=65_535),
    "gif, flood of blocks": lambda: gif(b"!\xfe" + flood(b"\1x") + b"\0"),
    "gif, flood of extensions": lambda: gif(flood(b"!\xfe\1x\0")),
    "gif of many frames": partial(gif_of_frames, 10**6),
    "webp, 26 million pixels": partial(_blank, "WEBP", 5_100, method=0, quality=1),
    "tiff of many strips": partial(tiff_of_strips, 300_000),
    "bmp, a jump of gigabytes": partial(bmp_of_runs, 2**24, 1, b"\0\2\0\xff"),
    "bmp, run lengths of one": lambda: bmp_of_runs(1_500, 1_500, flood(b"\1\0", 4_500_000)),
    "ppm of digits": lambda: b"P2 2000 1400 255\n" + flood(b"1 "),
    "ico around a larger png": lambda: ico_around(_blank("PNG", 5_000, "L")),
    "eps": lambda: _EPS,
}


def _zip_of(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("handler.py", content)
    return buffer.getvalue()


@cache
def polyglots(seed: int) -> dict[str, bytes]:
    """Return files that are an image and something else."""
    good = encoded(picture(seed), "PNG")
    photo = encoded(picture(seed), "JPEG")
    pickle = b"cos\nsystem\n(S'touch /tmp/pathguard-was-here'\ntR."
    return {
        "png and zip": good + _zip_of(b"import os"),
        "jpeg and pickle": photo + pickle,
        "pickle and jpeg": pickle + photo,
        "gif and script": b"GIF89a/*\0" + gif()[9:] + b"*/=1;alert(1)",
        "html and jpeg": b"<html><!--" + photo + b"--></html>",
        "pdf and jpeg": b"%PDF-1.4\n" + photo + b"\n%%EOF",
        "png in jpeg comment": photo[:2] + b"\xff\xfe" + struct.pack(">H", len(good) + 2) + good,
        "two pngs": good + encoded(picture(seed + 1), "PNG"),
        "png as text": good.hex().encode(),
        "shell script": b"#!/bin/sh\ntouch /tmp/pathguard-was-here\n",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    }


def slowest_within_limits() -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield the slowest files known that the default limits let through."""
    side = 5_000
    rows = np.repeat(np.arange(side, dtype=np.int64)[:, None] % 251, side, axis=1)
    slanted = Image.fromarray((rows * 7 % 256).astype(np.uint8)).convert("RGB")
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    yield "png, 25 million pixels, alpha", partial(_blank, "PNG", side, "RGBA")
    yield "png, 25 million pixels, slanted", partial(encoded, slanted, "PNG")
    yield "png, 3,997 texts behind", lambda: png(8, 8, trailing=chunk(b"tEXt", b"a\0b") * 3_997)
    yield "png, 20 colour profiles", lambda: png(8, 8, chunk(b"iCCP", _deflated(10**6)) * 20)
    yield "png, deflated texts", lambda: png(8, 8, chunk(b"zTXt", _deflated(10**6)) * 63)
    yield "png, 999 texts", lambda: png(8, 8, chunk(b"tEXt", b"a\0b") * 999)
    yield "jpeg, 20 scans, 25 million pixels", partial(jpeg_of_scans, side, 10)
    yield (
        "jpeg, noise, progressive",
        partial(encoded, Image.fromarray(noise), "JPEG", quality=3, progressive=True),
    )
    yield "webp, noise", partial(encoded, Image.fromarray(noise), "WEBP", quality=1, method=0)
    yield "webp, slanted, without loss", partial(encoded, slanted, "WEBP", lossless=True)
    yield "gif, 25 million pixels", partial(encoded, slanted.convert("P"), "GIF")
    yield "gif, 1,999 blocks", lambda: gif(b"!\xfe" + b"\xff" + bytes(255) + b"\1x" * 1990 + b"\0")
