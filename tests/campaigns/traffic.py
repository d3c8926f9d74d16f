"""Mixed traffic for a guarded server, from many clients at once, and what became of each request."""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import torch
from PIL import Image

from defense.artifact import save_guard
from defense.offline.attacks import make_attack
from defense.offline.collect import backbone_inputs
from defense.offline.data import ImageSet, read_images
from defense.offline.demo.digits import pack_digits, train_digits, write_digits
from defense.offline.demo.digits_model import DigitsNet
from defense.offline.fit import FitOptions, fit_archive
from defense.offline.pixels import find_pixel_space
from defense.offline.progress import Progress, Silent
from defense.wrap import wrap_archive
from handlers.torchserve import HANDLER_SOURCE
from handlers.torchserve_inner import OpenArchive, open_archive
from tests.campaigns.harness import Guarded

MAX_BYTES = 60_000
"""What the server is told to take of a request."""
MIX = {"clean": 80, "attacked": 9, "garbage": 6, "oversized": 3, "describe": 2}
"""Kinds of requests, in percent."""
CALM, BURST = 12, 96
"""Clients at a time: enough to saturate two workers, and more than their queue holds."""
BLOCK, BURST_LENGTH = 1000, 200
"""Of so many requests, the last so many are a burst."""


def digits_archive(work: Path, *, seed: int, trained: bool) -> tuple[Path, dict[str, list[bytes]]]:
    """Return a guarded archive for digits, and bodies to send to it by their kind.

    Without training the network answers at random and noise stands in for attacks, which is enough
    to count.
    """
    folders = write_digits(work / "digits", seed=seed)
    torch.manual_seed(seed)
    network = train_digits(folders.train, seed=seed, progress=Silent()) if trained else DigitsNet()
    stock, target = work / "stock.mar", work / "guarded.mar"
    pack_digits(network, stock)
    images = read_images(folders.fit).shuffled(seed, None if trained else 240)
    attacks = [make_attack(name, eps=0.1) for name in ("fgsm", "pgd")] if trained else ()
    with open_archive(stock, work / "unpacked") as served:
        guard = fit_archive(served, images, options=FitOptions(seed=seed), attacks=attacks)
        clean = read_images(folders.test).shuffled(seed)
        attacked = _attacked(served, clean, seed) if trained else _noise(seed)
    save_guard(guard, work / "guard")
    wrap_archive(stock, target, guard_folder=work / "guard", handler_source=HANDLER_SOURCE)
    bodies = clean.payloads(range(len(clean)))
    return target, {
        "clean": bodies,
        "attacked": attacked,
        "garbage": [b"", b"no image", bodies[0][:60], b"\xff\xd8\xff" + bytes(100), b"{}"],
        "oversized": [_png(Image.new("1", (10_000, 6_000))), bytes(MAX_BYTES + 1)],
        "describe": [b""],
    }


def _attacked(served: OpenArchive, images: ImageSet, seed: int) -> list[bytes]:
    """Return held-back images after PGD."""
    payloads = images.payloads(range(128))
    space = find_pixel_space(served, payloads[0])
    pixels = space.to_pixels(backbone_inputs(served, payloads))
    labels = torch.tensor([int(images.class_names[i]) for i in (images.labels or ())[:128]])
    model = space.model(served.backbone)
    return space.pngs(make_attack("pgd", eps=0.1).run(model, pixels, labels, seed=seed))


def _noise(seed: int) -> list[bytes]:
    draw = Random(seed)  # noqa: S311 - a seed is what is wanted
    return [_png(Image.frombytes("L", (32, 32), draw.randbytes(1024))) for _ in range(16)]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Done:
    """One request that was answered. `burst`: it was sent among more than the queue holds."""

    at: float
    seconds: float
    kind: str
    status: int
    verdict: str
    burst: bool

    @property
    def overload(self) -> bool:
        """Say whether TorchServe refused it because its queue was full."""
        return self.status == 503 and not self.verdict


@dataclass
class Load:
    """All requests of a run: `BURST` clients share them out, `CALM` of which are always at work."""

    guarded: Guarded
    bodies: Mapping[str, Sequence[bytes]]
    requests: int
    seed: int
    progress: Progress
    done: list[Done] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    """Requests without an answer, by the error that came instead."""

    def run(self) -> None:
        """Return when every request has been answered or lost."""
        draw = Random(self.seed)  # noqa: S311 - a seed is what is wanted
        self._kinds = draw.choices(list(MIX), list(MIX.values()), k=self.requests)
        self._next = 0
        self._turn = threading.Condition()
        clients = [threading.Thread(target=self._client, args=(n,)) for n in range(BURST)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()

    def _client(self, number: int) -> None:
        with _connections(self.guarded) as ask:
            while (row := self._take(extra=number >= CALM)) is not None:
                kind = self._kinds[row]
                body = self.bodies[kind][row % len(self.bodies[kind])]
                begun = time.monotonic()
                try:
                    status, verdict = ask(kind == "describe", body)
                except (OSError, HTTPException) as error:
                    self.lost[type(error).__name__] += 1
                    continue
                took = time.monotonic() - begun
                self.done.append(Done(begun, took, kind, status, verdict, _in_burst(row)))
                self.progress.advance()

    def _take(self, *, extra: bool) -> int | None:
        """Return the number of the next request; clients beyond the calm ones wait for a burst."""
        with self._turn:
            while extra and self._next < self.requests and not _in_burst(self._next):
                self._turn.wait()
            row, self._next = self._next, self._next + 1
            if _in_burst(self._next) or self._next >= self.requests:
                self._turn.notify_all()
        return row if row < self.requests else None


def _in_burst(row: int) -> bool:
    return row % BLOCK >= BLOCK - BURST_LENGTH


class _Asker:
    """One client: its connections to the doors, made again where the server closed them."""

    def __init__(self, guarded: Guarded) -> None:
        self._guarded = guarded
        self._doors: dict[str, HTTPConnection] = {}
        # They last an hour, which is longer than a run.
        self._tokens = {
            "inference": guarded.server.token_header("inference"),
            "management": guarded.server.token_header("management"),
        }

    def __call__(self, describe: bool, body: bytes) -> tuple[int, str]:
        """Return the status and the verdict of one request."""
        model = self._guarded.model
        if describe:
            return self._ask("management", "GET", f"/models/{model}?customized=true", None)
        return self._ask("inference", "POST", f"/predictions/{model}", body)

    def close(self) -> None:
        for connection in self._doors.values():
            connection.close()

    def _ask(self, door: str, method: str, path: str, body: bytes | None) -> tuple[int, str]:
        server = self._guarded.server
        url = server.management_url if door == "management" else server.inference_url
        if door not in self._doors:
            self._doors[door] = HTTPConnection(urlsplit(url).netloc, timeout=60)
        connection = self._doors[door]
        try:
            connection.request(method, path, body, self._tokens[door])
            answer: HTTPResponse = connection.getresponse()
            answer.read()
        except (OSError, HTTPException):
            del self._doors[door]
            connection.close()
            raise
        return answer.status, answer.getheader("X-PathGuard-Verdict", "")


@contextmanager
def _connections(guarded: Guarded) -> Iterator[_Asker]:
    asker = _Asker(guarded)
    try:
        yield asker
    finally:
        asker.close()
