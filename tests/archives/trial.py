"""Guard archives, serve them beside their originals on real TorchServes, and compare answers."""

from __future__ import annotations

import base64
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import torch

from defense.archive import read_archive
from defense.artifact import save_guard
from defense.errors import ArchiveError, PathGuardError
from defense.folders import folder_sizes
from defense.obstacles import archive_obstacles
from defense.offline.collect import describe_backbone
from defense.offline.data import ImageSet, read_images
from defense.offline.fit import FitOptions, fit_archive
from defense.wrap import unwrap_archive, wrap_archive
from handlers.torchserve import HANDLER_SOURCE, VERDICT_HEADER
from handlers.torchserve_inner import open_archive
from handlers.torchserve_server import TorchServe, free_port, on_free_ports
from handlers.torchserve_settings import ServedModel, ServerSettings
from tests.archives.kinds import Kind, Refused, digits, write_wheel
from tests.e2e.requests import scrape
from tests.served import encoded

FIRST, FIT, CLEAN = 600, 240, 24
"""The first digit that no network has seen, how many guards are fitted to, how many are sent."""
SENT = 3
TOGETHER = 1
"""Kinds in one server, with two workers each: TorchServe gives a worker two minutes to begin."""
BATCH, DELAY_MS, STAGGER = 8, 200, 0.02
CONFIG = """\
version: 1
defaults:
  flag: {{target_fpr: 0.05}}
  reject: {{target_fpr: 0.02}}
metrics: {{port: {port}}}
"""
GARBAGE = b"no image"


@dataclass(frozen=True)
class Guarded:
    """An archive and what was made of it, before anything is served."""

    kind: Kind
    stock: Path
    guarded: Path
    doctor: str
    views: int
    unwraps: bool
    """Whether unwrapping gives back the original, byte for byte."""


@dataclass(frozen=True)
class Requests:
    """What is sent: digits that no guard has seen, and noise as no digit is."""

    clean: tuple[bytes, ...]
    noise: tuple[bytes, ...]


@dataclass(frozen=True)
class Result:
    """What became of one kind: how many of how many answers were as promised."""

    kind: Kind
    guarded: Guarded
    accepted: int
    identical: int
    noise: tuple[int, ...]
    garbage: int
    batch: tuple[int, ...]
    """Statuses of one batch: accepted digits, noise, garbage, a digit."""
    counted: bool

    @property
    def kept(self) -> bool:
        """Whether all that is promised held."""
        return (
            self.accepted == self.identical == SENT
            and all(status == 403 for status in self.noise)
            and 400 <= self.garbage < 500
            and self.batch in ((), (200, 403, self.garbage, 200))
            and self.guarded.unwraps
            and self.guarded.views == self.kind.views
            and self.counted
        )


def write_images(folder: Path) -> tuple[ImageSet, Requests]:
    """Write the digits that guards are fitted to, and return them with what is sent."""
    images, labels = digits()
    for row in range(FIRST, FIRST + FIT):
        path = folder / str(int(labels[row])) / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png(images[row]))
    clean = images[FIRST + FIT :][:CLEAN]
    noise = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return read_images(folder), Requests(tuple(map(_png, clean)), tuple(map(_png, noise)))


def _png(image: torch.Tensor) -> bytes:
    return encoded((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def guard(kind: Kind, folder: Path, images: ImageSet) -> Guarded:
    """Build an archive, examine it, fit a guard to it, wrap and unwrap it."""
    folder.mkdir()
    stock = kind.build(folder, kind.served_as)
    if obstacles := archive_obstacles(read_archive(stock)):
        raise ArchiveError(obstacles[0])
    with _installed(folder), open_archive(stock, folder / "open") as served:
        found = describe_backbone(served)
        fitted = fit_archive(served, images, options=FitOptions(detector="density"))
    save_guard(fitted, folder / "guard")
    wrapped, back = folder / "guarded" / stock.name, folder / "unwrapped" / stock.name
    for target in (wrapped, back):
        target.parent.mkdir()
    wrap_archive(stock, wrapped, guard_folder=folder / "guard", handler_source=HANDLER_SOURCE)
    unwrap_archive(wrapped, back)
    same = _contents(back) == _contents(stock)
    return Guarded(kind, stock, wrapped, found, fitted.inputs.views.number, same)


@contextmanager
def _installed(folder: Path) -> Iterator[None]:
    """Have installed what the archive requires, as who fits a guard has."""
    with tempfile.TemporaryDirectory() as packages:
        Path(packages, write_wheel(Path(packages)).name).rename(Path(packages, "wheel.zip"))
        sys.path.append(str(Path(packages, "wheel.zip")))
        try:
            yield
        finally:
            sys.path.remove(str(Path(packages, "wheel.zip")))


def _contents(path: Path) -> dict[str, bytes]:
    if path.is_dir():
        return {name: (path / name).read_bytes() for name in folder_sizes(path)}
    return {"": path.read_bytes()}


def refusal(refused: Refused, folder: Path) -> str:
    """Return why an archive is not guarded, as `doctor` says; '' where it would be."""
    folder.mkdir()
    path = refused.build(folder, refused.name)
    if obstacles := archive_obstacles(read_archive(path)):
        return obstacles[0]
    try:
        with open_archive(path, folder / "open") as served:
            describe_backbone(served)
    except PathGuardError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Server:
    """A running server with guarded models, each beside its original `<model>-stock`."""

    server: TorchServe
    metrics_port: int

    def send(self, kind: Kind, model: str, images: Sequence[bytes]) -> httpx.Response:
        """Ask for one prediction: of one image, or of several in an envelope."""
        url = f"{self.server.inference_url}/{_door(kind, model)}"
        return httpx.post(
            url, content=_body(kind, images), headers=self._headers(kind), timeout=120
        )

    def send_raw(self, kind: Kind, model: str, content: bytes) -> httpx.Response:
        """Send a body as it is."""
        url = f"{self.server.inference_url}/{_door(kind, model)}"
        return httpx.post(url, content=content, headers=self._headers(kind), timeout=120)

    def batch(self, kind: Kind, images: Sequence[bytes]) -> list[httpx.Response]:
        """Send requests one shortly after the other, so that they share a batch."""

        def one(row: int) -> httpx.Response:
            time.sleep(row * STAGGER)
            return self.send(kind, kind.served_as, [images[row]])

        with ThreadPoolExecutor(len(images)) as pool:
            return list(pool.map(one, range(len(images))))

    @cached_property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.metrics_port}/metrics"

    def counted(self, kind: Kind) -> float:
        """Return how many requests the metrics know of, of this version where it was scored."""
        return sum(
            value
            for (sample, labels), value in scrape(self.metrics_url).items()
            if dict(labels).get("model") == kind.served_as
            and (sample == "pathguard_requests_total" and dict(labels)["version"] == kind.version)
        )

    def _headers(self, kind: Kind) -> dict[str, str]:
        kinds = {} if not kind.envelope else {"content-type": "application/json"}
        return {**self.server.token_header(), **kinds}


def _door(kind: Kind, model: str) -> str:
    if kind.envelope == "kserve":
        return f"v1/models/{model}:predict"
    if kind.envelope == "kservev2":
        return f"v2/models/{model}/infer"
    return f"predictions/{model}/{kind.version}"


def _body(kind: Kind, images: Sequence[bytes]) -> bytes:
    if not kind.envelope:
        return images[0]
    texts = [base64.b64encode(image).decode() for image in images]
    content: dict[str, Any] = {"instances": [{"data": text} for text in texts]}
    if kind.envelope == "kservev2":
        inputs = [
            {"name": f"image-{row}", "shape": [1], "datatype": "BYTES", "data": [text]}
            for row, text in enumerate(texts)
        ]
        content = {"id": "a-request", "inputs": inputs}
    return httpx.Request("POST", "http://x", json=content).content


@contextmanager
def served(found: Sequence[Guarded], folder: Path) -> Iterator[Server]:
    """Serve guarded archives of one envelope, each beside its original."""
    port = free_port()
    config = folder / f"guard-{port}.yaml"
    config.write_text(CONFIG.format(port=port))
    models = [
        ServedModel(
            name,
            path,
            batch_size=1 if one.kind.single else BATCH,
            max_batch_delay_ms=DELAY_MS,
            startup_timeout_s=600,
            response_timeout_s=300,
        )
        for one in found
        for name, path in (
            (one.kind.served_as, one.guarded),
            (f"{one.kind.served_as}-stock", one.stock),
        )
    ]
    settings = ServerSettings(
        models=tuple(models),
        guard_config=config,
        service_envelope=found[0].kind.envelope,
        install_requirements=any("requirementsFile" in str(_model(one)) for one in found),
    )
    with TorchServe(on_free_ports(settings)) as server:
        yield Server(server, port)


def _model(found: Guarded) -> object:
    return read_archive(found.stock).manifest["model"]


def try_out(server: Server, one: Guarded, requests: Requests) -> Result:
    """Send requests to a guarded archive and to its original, and compare."""
    kind, model = one.kind, one.kind.served_as
    before = server.counted(kind)
    accepted, identical, sent = [], 0, 0
    for image in requests.clean:
        answer, sent = server.send(kind, model, [image]), sent + 1
        if answer.headers.get(VERDICT_HEADER) == "accept":
            original = server.send(kind, f"{model}-stock", [image])
            identical += answer.content == original.content and answer.status_code == 200
            accepted.append(image)
        if len(accepted) == SENT:
            break
    noise = tuple(server.send(kind, model, [image]).status_code for image in requests.noise)
    garbage = server.send(kind, model, [GARBAGE]).status_code
    statuses: tuple[int, ...] = ()
    if not kind.single and accepted:
        images = [accepted[0], requests.noise[0], GARBAGE, accepted[-1]]
        statuses = tuple(answer.status_code for answer in server.batch(kind, images))
    scored = sent + len(noise) + 3 * bool(statuses)
    counted = server.counted(kind) == before + scored
    return Result(kind, one, len(accepted), identical, noise, garbage, statuses, counted)


def servers(kinds: Sequence[Kind]) -> list[list[Kind]]:
    """Part kinds into those that one server serves: of one envelope, and not too many workers."""
    groups: list[list[Kind]] = []
    for kind in kinds:
        last = groups[-1] if groups else []
        full = len(last) >= TOGETHER and kind.served_as != last[-1].served_as
        if not last or full or last[-1].envelope != kind.envelope:
            groups.append([])
        groups[-1].append(kind)
    return groups
