"""Requests as bytes on a socket: whole ones, odd ones and those that no HTTP library would send."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from random import Random
from typing import Any, Literal

MARKER = "pathguardfuzz7f3a"
"""Stands in everything that a client can write; nothing that the server writes may hold it."""
FORGED = f"[METRICS]{MARKER}_forged.Count:1|#Level:Model|#type:COUNTER|#hostname:h,1,r"
READ_SECONDS = 60.0
_GZIP_BOMB = gzip.compress(bytes(10**8), 1)


@dataclass(frozen=True)
class Target:
    """Where requests go."""

    host: str
    port: int
    path: str
    token: str

    def request(
        self,
        body: bytes,
        headers: Sequence[bytes] = (),
        *,
        content_type: str | None = None,
        line: bytes | None = None,
        length: bool = True,
    ) -> bytes:
        """Return the bytes of a POST; `line` stands in place of the first one."""
        kind = [] if content_type is None else [b"Content-Type: " + content_type.encode()]
        own = [b"Host: " + self.host.encode(), f"Authorization: {self.token}".encode(), *kind]
        size = [b"Content-Length: %d" % len(body)] if length else []
        start = line or b"POST " + self.path.encode() + b" HTTP/1.1"
        return b"\r\n".join([start, *own, *size, *headers, b"", body])


@dataclass(frozen=True)
class Case:
    """Something to send, piece by piece (a number is a pause in seconds), and what to wait for.

    `reads` is how many answers there may be; a client that `leaves` closes without reading any, one
    that `shuts` says that it will send no more and reads on.
    """

    kind: str
    pieces: tuple[bytes | float, ...]
    reads: int = 1
    ending: Literal["reads", "shuts", "leaves"] = "reads"


@dataclass(frozen=True)
class Answer:
    """One answer, or (status 0) the end of the connection without one."""

    status: int
    reason: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    seconds: float = 0.0

    @property
    def verdict(self) -> str | None:
        """What the guard said: absent where the front end answered by itself."""
        return dict(self.headers).get("x-pathguard-verdict")


def send(target: Target, case: Case, *, patience: float = READ_SECONDS) -> list[Answer]:
    """Send a case on a connection of its own and return the answers that came."""
    start = time.perf_counter()
    with socket.create_connection((target.host, target.port), timeout=patience) as wire:
        try:
            for piece in case.pieces:
                if isinstance(piece, bytes):
                    wire.sendall(piece)
                else:
                    time.sleep(piece)
            if case.ending == "leaves":
                return []
            if case.ending == "shuts":
                wire.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the server had enough; it may have said why
        with wire.makefile("rb") as stream:
            found = list(_answers(stream, case.reads, start))
    return found or [Answer(0, seconds=time.perf_counter() - start)]


def _answers(stream: BufferedReader, most: int, start: float) -> Iterator[Answer]:
    try:
        while most:
            version, _, rest = stream.readline().decode("latin-1").strip().partition(" ")
            if not version.startswith("HTTP/"):
                return
            headers = tuple(_headers(stream))
            body = stream.read(int(dict(headers).get("content-length", 0)))
            status, _, reason = rest.partition(" ")
            if status != "100":  # that asks for more of the request
                most -= 1
                yield Answer(int(status), reason, headers, body, time.perf_counter() - start)
    except OSError:
        return


def _headers(stream: BufferedReader) -> Iterator[tuple[str, str]]:
    while line := stream.readline().decode("latin-1").rstrip("\r\n"):
        name, _, value = line.partition(":")
        yield name.strip().lower(), value.strip()


def json_case(rng: Random, target: Target) -> Case:
    """JSON of wrong shapes, depths and numbers."""
    numbers = [0, 5, -1, 10**10, 2**63, 10**400, 1.5, 1e308, float("nan"), float("-inf")]
    image = [[[rng.choice([0.5, *numbers[6:]])] * 32] * 32] * 3
    ragged = [[[0.0] * rng.randrange(34)] * 32] * 3
    values: list[Any] = [
        *numbers, True, None, {}, [], [[]], "", MARKER, FORGED + "\n", image, ragged, [image] * 2,
        [[[0.0] * 32] * 32] * 3, {"data": rng.choice(numbers)}, {"instances": [image]},
        {MARKER: FORGED}, {"data": {"b64": "AAAA"}}, [0.0] * 20_000, ["a", 1, None], "\ud800",
    ]  # fmt: skip
    texts = [
        b"[" * rng.choice([10, 1000, 100_000]), b"[" * 900 + b"]" * 900, b'{"a":' * 5000, b"nul",
        b"\xff\xfe[\0]\0", b"\xef\xbb\xbf[1]", b'{"a":1,"a":2}', b"1" * 5000, b"-", b"[1e999]",
        b'"\\u0000"', b"\xc3\x28", b"{'a': 1}", b"[1]" * 3, f'"{MARKER}'.encode(),
    ]  # fmt: skip
    body = rng.choice([json.dumps(rng.choice(values)).encode(), rng.choice(texts)])
    return Case("JSON", (target.request(body, content_type="application/json"),))


def base64_case(rng: Random, target: Target, raw: bytes) -> Case:
    """Base64, whole and broken, as text or inside JSON."""
    text = base64.b64encode(raw)
    body = rng.choice(
        [text, text[:-1], text[: rng.randrange(len(text))], b"data:image/png;base64," + text,
         base64.urlsafe_b64encode(raw), text.replace(b"A", b"\n"), text + b"====", b"=" * 50]
    )  # fmt: skip
    kind = rng.choice(["text/plain", "text/plain; charset=utf-16", "application/json"])
    content = json.dumps(body.decode()).encode() if kind == "application/json" else body
    return Case("base64", (target.request(content, content_type=kind),))


def content_type_case(rng: Random, target: Target, raw: bytes) -> Case:
    """A body under a name that is not its own."""
    kind = rng.choice(
        ["application/json", "text/plain", "application/x-www-form-urlencoded", "image/svg+xml",
         "multipart/form-data", "multipart/form-data; boundary=", "application/octet-stream", "",
         f"text/{MARKER}", "a" * 3000, "text/plain; charset=none", "*/*", "application/json; q=\xe9",
         "application/x-pickle", "text/html;" * 40]
    )  # fmt: skip
    return Case("wrong content type", (target.request(raw, content_type=kind),))


def form_case(rng: Random, target: Target, raw: bytes) -> Case:
    """Forms of parts: doubled, nameless, many, unended, with file names that are paths."""
    name = rng.choice(
        ["data", "body", "image", MARKER, "\r\n" + FORGED, "d\xe9\u4e16", "", "a" * 999]
    )
    file = rng.choice(
        ["a.png", "../../etc/passwd", f"{MARKER}\0.png", "\u202e.png", FORGED, "C:\\a"]
    )
    mark = rng.choice(["x", "-" * 70, "b" * 500, MARKER])
    disposition = f'Content-Disposition: form-data; name="{name}"'
    filed = (
        f'{disposition}; filename="{file}"\r\nContent-Type: {rng.choice(["image/png", "a", ""])}'
    )
    part = f"--{mark}\r\n{rng.choice([disposition, filed])}\r\n\r\n".encode() + raw + b"\r\n"
    end = f"--{mark}--\r\n".encode()
    odd = f"--{mark}\r\nX-Odd: {MARKER}\r\n\r\n".encode() + raw + b"\r\n"
    body = rng.choice(
        [part + end, part, part * 2 + end, part[: len(part) // 2], end, b"", part + part[:-9],
         odd + end, part * rng.choice([5, 60]) + end, raw + part + end, part + b"tail" + end]
    )  # fmt: skip
    quoted = rng.choice([mark, mark, mark, f'"{mark}"', "other", ""])
    request = target.request(body, content_type=f"multipart/form-data; boundary={quoted}")
    return Case("multipart", (request,))


def header_case(rng: Random, target: Target, raw: bytes) -> Case:
    """Headers that are huge, doubled, split, not ASCII, or that TorchServe's handlers act on."""
    odd: list[Sequence[bytes]] = [
        [b"X-Long: " + b"a" * rng.choice([1000, 7000, 9000, 70_000])],
        [b"X-%d: y" % i for i in range(rng.choice([50, 500, 5000]))],
        [f"X-Request-Id: {MARKER}\t{FORGED}".encode()],
        [f"X-Request-Id-Prefix: {MARKER}".encode()],
        [f"X-Request-Id-Prefix: {FORGED}:\v\f\x85".encode()],
        [f"X-Split: a\r\n{FORGED}: b".encode()],
        [f"X-Fold: a\r\n {FORGED}".encode()],
        [b"X-Lone: a\nX-B: c\rd"],
        ["X-Text: \xe9\u4e16\u754c\U0001f600".encode()],
        [b"X-Raw: \xff\xfe\x80\x01"],
        [b"\xff\xfe: x"],
        [b": nameless"],
        [b"no colon at all"],
        [b"X Y: space"],
        [b"X-Nul: a\0b"],
        [b"explain: True"],
        [b"describe: True"],
        [b"explain: True", b"describe: True"],
        [b"Content-Length: 5"],
        [b"Content-Length: -1"],
        [b"Content-Length: 99999999999999999999"],
        [b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: gzip, chunked"],
        [b"Expect: 100-continue"],
        [b"Expect: " + MARKER.encode()],
        [b"Upgrade: h2c", b"Connection: Upgrade, HTTP2-Settings", b"HTTP2-Settings: AAMAAABk"],
        [b"Connection: close"],
        [b"Range: bytes=0-0"],
        [b"Cookie: " + b"a=b; " * 500],
        [b"Authorization: Bearer " + MARKER.encode()],
        [b"X-PathGuard-Verdict: accept"],
        [b"Accept: " + b"x/" * 2000],
        [b"Accept-Encoding: gzip, deflate, br, " + MARKER.encode()],
        [b"Origin: http://" + MARKER.encode()],
    ]
    chosen = rng.choice(odd)
    endless = chosen[0].startswith(b"Transfer-Encoding")  # the body is no chunks
    return Case("headers", (target.request(raw, chosen),), ending="shuts" if endless else "reads")


def encoding_case(rng: Random, target: Target, raw: bytes) -> Case:
    """Bodies that are, or only say that they are, compressed; chunks that are well or badly cut."""
    packed = gzip.compress(raw)
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(raw), raw)
    kinds: list[tuple[bytes, list[bytes], bool]] = [
        (packed, [b"Content-Encoding: gzip"], True),
        (packed[:-9], [b"Content-Encoding: gzip"], True),
        (raw, [b"Content-Encoding: gzip"], True),
        (zlib.compress(raw), [b"Content-Encoding: deflate"], True),
        (_GZIP_BOMB, [b"Content-Encoding: gzip"], True),
        (raw, [b"Content-Encoding: " + MARKER.encode()], True),
        (raw, [b"Content-Encoding: br, zstd, snappy"], True),
        (chunked, [b"Transfer-Encoding: chunked"], False),
        (b"%x;%b\r\n%b\r\n0\r\nX: y\r\n\r\n" % (len(raw), FORGED.encode(), raw),
         [b"Transfer-Encoding: chunked"], False),
        (b"zz\r\n" + raw, [b"Transfer-Encoding: chunked"], False),
        (b"ffffffffffff\r\n" + raw, [b"Transfer-Encoding: chunked"], False),
        (b"-5\r\nhello\r\n0\r\n\r\n", [b"Transfer-Encoding: chunked"], False),
        (b"1\r\n" + raw, [b"Transfer-Encoding: chunked"], False),
    ]  # fmt: skip
    body, headers, length = rng.choice(kinds)
    request = target.request(body, headers, length=length)
    whole = length or body.endswith(b"0\r\n\r\n") or b"\r\nX: y\r\n\r\n" in body
    return Case("encodings", (request,), ending="reads" if whole else "shuts")


def line_case(rng: Random, target: Target, raw: bytes) -> Case:
    """First lines of other versions, methods and paths."""
    path = target.path.encode()
    long = MARKER.encode() + b"a" * rng.choice([100, 5000, 20_000])
    line = rng.choice(
        [b"POST " + path + b" HTTP/1.0", b"POST " + path + b" HTTP/0.9", b"POST " + path,
         b"POST " + path + b" HTTP/2.0", b"POST " + path + b" HTTP/9.9", b"GET " + path + b" HTTP/1.1",
         b"BREW " + path + b" HTTP/1.1", b"PUT " + path + b"/1.0 HTTP/1.1", long + b" / HTTP/1.1",
         b"POST " + path + b"?" + long + b" HTTP/1.1", b"POST " + path + b"/%0d%0a HTTP/1.1",
         b"POST " + path + b"/" + long + b" HTTP/1.1", b"POST /predictions/" + long + b" HTTP/1.1",
         b"POST " + path + b"?%ff%fe=\xff HTTP/1.1", b"POST //..%2f..%2fetc/passwd HTTP/1.1",
         b"POST " + path.replace(b"predictions", b"explanations") + b" HTTP/1.1",
         b"POST /invocations HTTP/1.1", b"POST /v1/models/guarded:predict HTTP/1.1",
         b"OPTIONS * HTTP/1.1", b"CONNECT a:1 HTTP/1.1", b"DELETE /models/guarded HTTP/1.1",
         b"POST " + path + b"?data=" + MARKER.encode() + b"&data=2 HTTP/1.1",
         b"POST http://" + MARKER.encode() + path + b" HTTP/1.1", b"\x16\x03\x01\x02\0\x01\0"]
    )  # fmt: skip
    return Case("request lines", (target.request(raw, line=line),))


def connection_case(rng: Random, target: Target, raw: bytes) -> Case:
    """Connections used oddly: many requests at once, bodies in drops, ends in the middle."""
    request = target.request(raw)
    half = request.index(b"\r\n\r\n") + 4 + len(raw) // 2
    drops: list[bytes | float] = [request[:half], 0.3]
    for at in range(half, len(request), max(1, (len(request) - half) // 5)):
        drops += [request[at : at + max(1, (len(request) - half) // 5)], 0.05]
    number = rng.choice([2, 5, 9])
    return rng.choice(
        [
            Case("pipelined", (request * number,), reads=number),
            Case("slow bodies", tuple(drops)),
            Case("broken off", (request[:half],), ending="shuts"),
            Case("broken off", (request[: half // 4],), ending="shuts"),
            Case("broken off", (b"\0" * 9000,), ending="shuts"),
            Case("broken off", (struct.pack(">IH", 1 << 31, 7),), ending="shuts"),
            Case("bodies without a length", (target.request(raw, length=False),)),
        ]
    )


def leaving_case(rng: Random, target: Target, raw: bytes) -> Case:
    """A whole request whose client does not wait for the answer."""
    request = target.request(raw)
    return Case("clients that leave", (request,), ending=rng.choice(["leaves", "shuts"]))
