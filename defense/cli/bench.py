"""`pathguard bench`: what being guarded costs, in a library call and over HTTP, in one run."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image
from rich.console import Console

from defense.artifact import save_guard
from defense.offline.archiver import make_archive
from defense.offline.bench import BATCHES, CLASSES, FIT_IMAGES, SIDE, bench_network, measure_library
from defense.offline.data import ImageSet, read_images
from defense.offline.fit import FitOptions, fit_archive, versions
from defense.offline.progress import Progress, bar
from defense.offline.statistics import ratio_row
from defense.wrap import wrap_archive
from handlers.torchserve import HANDLER_SOURCE, VERDICT_HEADER
from handlers.torchserve_inner import open_archive
from handlers.torchserve_server import TorchServe, free_port, on_free_ports
from handlers.torchserve_settings import ServedModel, ServerSettings

SEED = 0
REQUESTS = {1: 24, 8: 64}
"""Requests of one model in one round, by batch size."""
BATCH_DELAY_MS = 20
LIBRARY_BUDGET, THROUGHPUT_BUDGET, P99_BUDGET = 1.03, 0.97, 1.05
MODEL_SOURCE = f"""\
from torchvision.models.resnet import BasicBlock, ResNet


class BenchNet(ResNet):
    def __init__(self):
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes={CLASSES})
"""
# Nothing is refused, so that all kinds answer the same requests alike.
GUARD_YAML = (
    "defaults: {{flag: {{score: 1.0e+9}}, reject: {{score: 1.0e+9}}}}\nmetrics: {{port: {port}}}\n"
)


def run_bench(folder: Path, *, rounds: int, console: Console) -> dict[str, Any]:
    """Measure, and write `serving.json` and `serving.md` to `folder`."""
    with bar(console, "Library", rounds * len(BATCHES)) as progress:
        rows = measure_library(rounds, SEED, progress)
    for row in rows:
        row |= {"budget": LIBRARY_BUDGET, "met": row["ratio"] <= LIBRARY_BUDGET}
    with tempfile.TemporaryDirectory(prefix="pathguard-bench-") as work:
        with console.status("Fitting and wrapping a ResNet-18"):
            images = _prepare(Path(work))
        for batch in BATCHES:
            with (
                _server(Path(work), batch) as server,
                bar(console, f"HTTP, batch {batch}", rounds) as progress,
            ):
                rows += _measure_http(server, images, batch, rounds, progress)
    result = {
        "rows": rows,
        "seed": SEED,
        "rounds": rounds,
        "command": f"pathguard bench --rounds {rounds}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.is_available(),
        },
        "versions": versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "serving.json").write_text(json.dumps(result, indent=1) + "\n")
    table = render(result)
    (folder / "serving.md").write_text(table)
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    return result


def _prepare(work: Path) -> list[bytes]:
    """Write a stock and a guarded archive of a ResNet-18; return the images to send."""
    (work / "model.py").write_text(MODEL_SOURCE)
    torch.save(bench_network(SEED).state_dict(), work / "weights.pt")
    stock = work / "stock.mar"
    make_archive(
        stock,
        handler="image_classifier",
        model_file=work / "model.py",
        serialized_file=work / "weights.pt",
    )
    images = _images(work / "images")
    with open_archive(stock, work / "unpacked") as served:
        save_guard(fit_archive(served, images, options=FitOptions(seed=SEED)), work / "guard")
    target = work / "guarded.mar"
    wrap_archive(stock, target, guard_folder=work / "guard", handler_source=HANDLER_SOURCE)
    return images.payloads(range(32))


def _images(folder: Path) -> ImageSet:
    """Write smooth random JPEGs of 256x256 pixels."""
    folder.mkdir()
    generator = np.random.default_rng(SEED)
    for number in range(FIT_IMAGES):
        coarse = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((256, 256), Image.Resampling.BILINEAR)
        image.save(folder / f"{number}.jpg", quality=90)
    return read_images(folder)


def _server(work: Path, batch: int) -> TorchServe:
    config = work / "guard.yaml"
    config.write_text(GUARD_YAML.format(port=free_port()))
    models = tuple(
        ServedModel(name, work / archive, batch_size=batch, max_batch_delay_ms=BATCH_DELAY_MS)
        for name, archive in (
            ("stock", "stock.mar"),
            ("control", "stock.mar"),
            ("guarded", "guarded.mar"),
        )
    )
    return TorchServe(on_free_ports(ServerSettings(models=models, guard_config=config)))


def _measure_http(
    server: TorchServe, images: Sequence[bytes], batch: int, rounds: int, progress: Progress
) -> list[dict[str, Any]]:
    """Send rounds of requests to the three models in turn; return a row per figure."""
    names = ["stock", "control", "guarded"]
    _check_answers(server, images)
    for name in names:
        _load(server, name, images, batch, REQUESTS[batch])
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            for figure, value in _load(server, name, images, batch, REQUESTS[batch]).items():
                figures[name].setdefault(figure, []).append(value)
        progress.advance()
    budgets = {"throughput": THROUGHPUT_BUDGET, "p50": None, "p99": P99_BUDGET}
    rows = []
    for figure, budget in budgets.items():
        per_round = (figures[name][figure] for name in ("stock", "guarded", "control"))
        row = ratio_row(*per_round, seed=SEED)
        met = None
        if budget is not None:
            met = row["ratio"] >= budget if figure == "throughput" else row["ratio"] <= budget
        unit = "1/s" if figure == "throughput" else "ms"
        what = {"what": f"HTTP: {figure}", "batch": batch, "unit": unit, "budget": budget}
        rows.append({**what, "met": met, **row})
    return rows


def _check_answers(server: TorchServe, images: Sequence[bytes]) -> None:
    """See that the guarded model answers to the byte as the stock one, or stop."""
    for image in images[:4]:
        stock, guarded = (_post(server, name, image) for name in ("stock", "guarded"))
        if stock.content != guarded.content or guarded.headers.get(VERDICT_HEADER) != "accept":
            raise RuntimeError("the guarded archive answers differently; nothing was measured")


def _post(server: TorchServe, name: str, image: bytes) -> httpx.Response:
    url = f"{server.inference_url}/predictions/{name}"
    return httpx.post(url, content=image, headers=server.token_header(), timeout=120)


def _load(
    server: TorchServe, name: str, images: Sequence[bytes], batch: int, requests: int
) -> dict[str, float]:
    """Send requests, always `batch` of them under way; return throughput and latencies (ms)."""
    url, headers = f"{server.inference_url}/predictions/{name}", server.token_header()
    latencies: list[float] = []
    numbers = iter(range(requests))
    lock = threading.Lock()

    def client() -> None:
        with httpx.Client(headers=headers, timeout=120) as http:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                began = time.perf_counter()
                http.post(url, content=images[number % len(images)]).raise_for_status()
                latencies.append((time.perf_counter() - began) * 1000)

    threads = [threading.Thread(target=client) for _ in range(batch)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    return {
        "throughput": len(latencies) / seconds,
        "p50": float(np.quantile(latencies, 0.5)),
        "p99": float(np.quantile(latencies, 0.99)),
    }


def render(result: dict[str, Any]) -> str:
    """Return the results as a Markdown page."""
    machine, lines = result["machine"], []
    for row in result["rows"]:
        interval, control = row["interval"], row["control_interval"]
        budget = "" if row["budget"] is None else f"{row['budget']:.2f}"
        met = {None: "", True: "yes", False: "no"}[row["met"]]
        lines.append(
            f"| {row['what']} | {row['batch']} | {row['stock']:.1f} {row['unit']} | "
            f"{row['guarded']:.1f} {row['unit']} | **{row['ratio']:.3f}** "
            f"[{interval[0]:.3f}, {interval[1]:.3f}] | {row['control']:.3f} "
            f"[{control[0]:.3f}, {control[1]:.3f}] | {budget} | {met} |"
        )
    return "\n".join(
        [
            "# What being guarded costs",
            "",
            f"ResNet-18 at {SIDE}x{SIDE}, random weights, the built-in `image_classifier`, default "
            "guard; answers checked to be identical. Stock, control (stock once more) and guarded "
            "take turns within every round of one run; ratios are medians over "
            f"{result['rounds']} rounds of the ratio within a round, with 95 % bootstrap intervals. "
            "The control's interval is the noise of this machine.",
            "",
            f"`{result['command']}`, seed {result['seed']}, {result['date']}, {machine['cores']} "
            f"cores ({machine['processor']}), {machine['threads']} torch threads, "
            f"{'a' if machine['gpu'] else 'no'} GPU, "
            + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
            + ".",
            "",
            "| figure | batch | stock | guarded | guarded / stock | control / stock | budget | met |",
            "|---|---|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )
