"""`pathguard bench`: what being guarded costs, in a library call and over HTTP, cell by cell."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
import yaml
from rich.console import Console

from defense.artifact import load_guard, save_guard
from defense.errors import ServerError
from defense.offline.archived import pack_network
from defense.offline.archiver import make_archive
from defense.offline.cost.library import Rig, believed, held, measure_library, witness_row
from defense.offline.cost.page import render
from defense.offline.cost.subjects import (
    FIT_IMAGES,
    SETTINGS,
    SUBJECTS,
    Subject,
    bench_images,
    bench_network,
    jpegs,
    subject_named,
)
from defense.offline.cost.turns import rotated
from defense.offline.data import ImageSet, read_images
from defense.offline.fit import FitOptions, fit_archive, versions
from defense.offline.progress import Progress, Silent, bar
from defense.offline.statistics import ratio_row
from defense.offline.training import write_atomically
from defense.witness import Witness
from defense.wrap import wrap_archive
from handlers.torchserve import HANDLER_SOURCE, VERDICT_HEADER
from handlers.torchserve_inner import open_archive
from handlers.torchserve_server import TorchServe, free_port, on_free_ports
from handlers.torchserve_settings import ServedModel, ServerSettings

SEED = 0
BATCHES = (1, 8, 32)
POOL = 96
"""Images from which those to send are taken."""
SENT = 32
CLIENTS_PER_ROW = 2
"""Requests under way for every row of a batch: the next batch waits while one is answered."""
BATCH_DELAY_MS = 20
STARTUP_S = 300
"""Of six workers at once, one of which tries faster forms."""
THROUGHPUT_BUDGET, P99_BUDGET, OPTIMIZED_BUDGET = 0.97, 1.05, 1.2
STOCK = ("stock", "control")
Seen = Counter[tuple[int, bytes]]
"""How often an image (by number) got an answer."""


@dataclass(frozen=True)
class Prepared:
    """A subject's archives in a folder, and bodies (all of one batch) for it."""

    subject: Subject
    folder: Path
    images: Sequence[bytes]

    @property
    def stock(self) -> Path:
        return self.folder / "stock.mar"

    @property
    def guarded(self) -> Path:
        return self.folder / "guarded.mar"


def run_bench(
    folder: Path,
    *,
    networks: Sequence[str] = (),
    batches: Sequence[int] = (),
    rounds: int,
    console: Console,
) -> dict[str, Any]:
    """Measure cells, all of them where none is named, and merge them into `serving.*` of `folder`.

    What was measured before and is not measured now stays. Every cell is written as soon as it is
    there, so a run may be stopped.
    """
    subjects = [subject_named(name) for name in networks or SUBJECTS]
    page = folder / "serving.json"
    cells: dict[str, Any] = json.loads(page.read_text()).get("cells", {}) if page.is_file() else {}
    for subject in subjects:
        with tempfile.TemporaryDirectory(prefix="pathguard-bench-") as work:
            with console.status(f"Preparing {subject.title}"):
                prepared = prepare(subject, Path(work))
            for batch in batches or BATCHES:
                cells[f"{subject.name}/{batch}"] = measure_cell(prepared, batch, rounds, console)
                _write(folder, cells)
    console.print(f"Table written to {folder / 'serving.md'}.")
    return cells


def _write(folder: Path, cells: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"cells": cells}, indent=1) + "\n"
    write_atomically(folder / "serving.json", lambda unfinished: unfinished.write_text(content))
    (folder / "serving.md").write_text(render(cells))


def prepare(subject: Subject, work: Path) -> Prepared:
    """Write a stock and a guarded archive of `subject`; choose the images to send."""
    stock = work / "stock.mar"
    if subject.card is None:
        (work / "model.py").write_text(subject.model_source)
        torch.save(bench_network(subject.name, SEED).state_dict(), work / "weights.pt")
        make_archive(
            stock,
            handler="image_classifier",
            model_file=work / "model.py",
            serialized_file=work / "weights.pt",
        )
        images = _drawn(work / "images")
        with open_archive(stock, work / "fitted") as served:
            save_guard(fit_archive(served, images, options=FitOptions(seed=SEED)), work / "guard")
    else:
        assert subject.data is not None
        images = read_images(subject.data)
        pack_network(subject.card, stock)
    guard = (subject.guard or work / "guard").absolute()
    prepared = Prepared(subject, work, images.shuffled(SEED).payloads(range(POOL)))
    wrap_archive(stock, prepared.guarded, guard_folder=guard, handler_source=HANDLER_SOURCE)
    if guard.parent != work:
        (work / "guard").symlink_to(guard)
    return prepared


def _drawn(folder: Path) -> ImageSet:
    """Write smooth random images to `folder`, and read them."""
    folder.mkdir()
    for number, content in enumerate(jpegs(FIT_IMAGES, SEED)):
        (folder / f"{number}.jpg").write_bytes(content)
    return read_images(folder)


def measure_cell(prepared: Prepared, batch: int, rounds: int, console: Console) -> dict[str, Any]:
    """Measure one network at one batch size."""
    subject, title = prepared.subject, f"{prepared.subject.name}, batch {batch}"
    with bar(console, f"{title}: library", rounds) as progress:
        cell = _measure_library(prepared, batch, rounds, progress)
    with (
        _served(prepared, batch) as server,
        bar(console, f"{title}: HTTP", rounds) as progress,
    ):
        found = _measure_http(server, prepared, batch, rounds, progress)
    cell["rows"] += found.pop("rows")
    words = f"pathguard bench --network {subject.name} --batch {batch} --rounds {rounds}"
    return {
        "network": subject.name,
        "batch": batch,
        "rounds": rounds,
        "seed": SEED,
        **cell,
        **found,
        "command": words,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.is_available(),
        },
        "versions": versions(),
    }


def processor() -> str:
    """Name the processor's kind and what it has for half precision, which decides about `optimize`."""
    cpuinfo = Path("/proc/cpuinfo")
    known = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    found = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in known]
    return " ".join([platform.machine(), *found])


def _measure_library(
    prepared: Prepared, batch: int, rounds: int, progress: Progress
) -> dict[str, Any]:
    subject = prepared.subject
    guard = load_guard(prepared.folder / "guard")
    witness = None if guard.witness else _shipped_witness()
    with open_archive(prepared.stock, prepared.folder / f"unpacked-{batch}") as served:
        rig = Rig(served.backbone, guard, served.answer, prepared.images)
        cell = measure_library(subject, believed(subject, rig, batch), rounds, SEED, progress)
        if witness is not None:
            images = bench_images(batch, SEED)
            row = witness_row(witness, served.backbone, images, rounds, SEED, Silent())
            cell["rows"].append(row)
    return cell


def _shipped_witness() -> Witness | None:
    """Return the witness of the guard that PathGuard ships, where that is at hand."""
    folder = SUBJECTS["cifar10"].guard
    return load_guard(folder).witness if folder is not None and folder.is_dir() else None


@contextmanager
def _served(prepared: Prepared, batch: int) -> Iterator[TorchServe]:
    """Start a server of all kinds; every kind has a worker of its own."""
    kinds = prepared.subject.kinds
    config = prepared.folder / "guard.yaml"
    settings = {
        "defaults": SETTINGS,
        "models": kinds,
        "metrics": {"port": free_port()},
        "audit": {"folder": str(prepared.folder.absolute() / f"trail-{uuid.uuid4().hex}")},
    }
    config.write_text(yaml.safe_dump(settings))
    archives = dict.fromkeys(STOCK, prepared.stock) | dict.fromkeys(kinds, prepared.guarded)
    models = tuple(
        ServedModel(
            name,
            archive,
            batch_size=batch,
            max_batch_delay_ms=BATCH_DELAY_MS,
            startup_timeout_s=STARTUP_S,
        )
        for name, archive in archives.items()
    )
    with TorchServe(on_free_ports(ServerSettings(models=models, guard_config=config))) as server:
        yield server


def _measure_http(
    server: TorchServe, prepared: Prepared, batch: int, rounds: int, progress: Progress
) -> dict[str, Any]:
    """Send rounds of requests to all kinds in turn; return figures, and answers compared."""
    images = prepared.images[:SENT]
    _check_answers(server, images)
    names = [*STOCK, *prepared.subject.kinds]
    requests = max(prepared.subject.requests, CLIENTS_PER_ROW * batch)
    seen: dict[str, Seen] = {name: Counter() for name in names}
    for name in names:
        _load(server, name, images, batch, requests, seen[name])
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in rotated(names, number):
            figures[name].append(_load(server, name, images, batch, requests, seen[name]))
        progress.advance()
    rows = [
        _http_row(prepared.subject, kind, figure, figures)
        for kind in prepared.subject.kinds
        for figure in ("throughput", "p50", "p99")
    ]
    resident = {name: _resident_mib(server, name) for name in names}
    return {"rows": rows, "answers": compare_answers(seen), "resident_mib": resident}


def _http_row(
    subject: Subject, kind: str, figure: str, figures: dict[str, list[dict[str, float]]]
) -> dict[str, Any]:
    stock, control, own = ([r[figure] for r in figures[n]] for n in (*STOCK, kind))
    row = ratio_row(stock, own, control, seed=SEED)
    budget = {"throughput": THROUGHPUT_BUDGET, "p99": P99_BUDGET}.get(figure)
    if kind == "optimized":
        budget = OPTIMIZED_BUDGET if figure == "throughput" else None
    known = {"what": f"HTTP: {figure}", "kind": kind}
    unit = "1/s" if figure == "throughput" else "ms"
    budget = budget if subject.budgeted else None
    return {**known, "unit": unit, **row, **held(row, budget, least=figure == "throughput")}


def _resident_mib(server: TorchServe, name: str) -> float:
    return sum(psutil.Process(pid).memory_info().rss for pid in server.worker_pids(name)) / 2**20


def compare_answers(seen: dict[str, Seen]) -> dict[str, int]:
    """Count guarded answers that the unguarded archive gave, to the byte, for the same image.

    It may have several: sums over a batch of another size are rounded otherwise, guarded or not. Of
    the optimized answers only the first class counts.
    """
    unguarded = seen["stock"].keys() | seen["control"].keys()
    classes = {(image, first_class(answer)) for image, answer in unguarded}
    guarded = [counts for name, counts in seen.items() if name not in (*STOCK, "optimized")]
    quick = seen.get("optimized", Counter())
    return {
        "compared": sum(counts.total() for counts in guarded),
        "identical": sum(
            count for counts in guarded for pair, count in counts.items() if pair in unguarded
        ),
        "optimized": quick.total(),
        "same_class": sum(
            count for (image, a), count in quick.items() if (image, first_class(a)) in classes
        ),
    }


def first_class(answer: bytes) -> str:
    """Return the class that an answer names first, or that it is."""
    found = json.loads(answer)
    return str(next(iter(found)) if isinstance(found, dict) else found)


def _check_answers(server: TorchServe, images: Sequence[bytes]) -> None:
    """See that the guarded model answers single requests as the stock one, to the byte, or stop."""
    for image in images[:4]:
        stock, guarded = (_post(server, name, image) for name in ("stock", "guarded"))
        if stock.content != guarded.content or guarded.headers.get(VERDICT_HEADER) != "accept":
            raise ServerError("the guarded archive answers differently, so nothing was measured")


def _post(server: TorchServe, name: str, image: bytes) -> httpx.Response:
    url = f"{server.inference_url}/predictions/{name}"
    return httpx.post(url, content=image, headers=server.token_header(), timeout=120)


def _load(
    server: TorchServe, name: str, images: Sequence[bytes], batch: int, requests: int, seen: Seen
) -> dict[str, float]:
    """Send a round of requests; return throughput (1/s) and latencies (ms), note answers in `seen`."""
    url = f"{server.inference_url}/predictions/{name}"
    clients = min(CLIENTS_PER_ROW * batch, requests)
    with (
        httpx.Client(headers=server.token_header(), timeout=120) as http,
        ThreadPoolExecutor(clients) as pool,
    ):

        def one(number: int) -> tuple[float, tuple[int, bytes]]:
            image = number % len(images)
            began = time.perf_counter()
            answer = http.post(url, content=images[image])
            took = (time.perf_counter() - began) * 1000
            if answer.status_code != 200:
                raise ServerError(f"'{name}' answered an image with status {answer.status_code}")
            return took, (image, answer.content)

        start = time.perf_counter()
        answers = list(pool.map(one, range(requests)))
        seconds = time.perf_counter() - start
    seen.update(pair for _, pair in answers)
    p50, p99 = np.quantile([took for took, _ in answers], [0.5, 0.99]).tolist()
    return {"throughput": len(answers) / seconds, "p50": p50, "p99": p99}
