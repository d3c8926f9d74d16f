"""`pathguard bench`: what being guarded costs, in a library call and over HTTP, in one run."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image
from rich.console import Console

from defense.artifact import save_guard
from defense.errors import ServerError
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
REQUESTS = {1: 100, 8: 128}
"""Requests of one model in one round, by batch size."""
CLIENTS_PER_ROW = 2
"""Requests under way for every row of a batch: the next batch waits while one is answered."""
BATCH_DELAY_MS = 20
LIBRARY_BUDGET, THROUGHPUT_BUDGET, P99_BUDGET = 1.03, 0.97, 1.05
NAMES = ("stock", "control", "guarded")
Seen = Counter[tuple[int, bytes]]
"""How often an image (by number) got an answer."""
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
    answers = {}
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
                found, answers[str(batch)] = _measure_http(server, images, batch, rounds, progress)
                rows += found
    result = {
        "rows": rows,
        "answers": answers,
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
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Send rounds of requests to the three models in turn; return figures, and answers compared."""
    _check_answers(server, images)
    seen: dict[str, Seen] = {name: Counter() for name in NAMES}
    for name in NAMES:
        _load(server, name, images, batch, seen[name])
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    order = np.random.default_rng(SEED)
    for _ in range(rounds):
        for name in order.permutation(NAMES).tolist():
            figures[name].append(_load(server, name, images, batch, seen[name]))
        progress.advance()
    return _rows(figures, batch), compare_answers(seen)


def _rows(figures: dict[str, list[dict[str, float]]], batch: int) -> list[dict[str, Any]]:
    """Return one row per figure; `figures` holds those of every model's rounds."""
    budgets = {"throughput": THROUGHPUT_BUDGET, "p50": None, "p99": P99_BUDGET}
    rows = []
    for figure, budget in budgets.items():
        stock, control, guarded = ([one[figure] for one in figures[name]] for name in NAMES)
        row = ratio_row(stock, guarded, control, seed=SEED)
        met = None
        if budget is not None:
            met = row["ratio"] >= budget if figure == "throughput" else row["ratio"] <= budget
        unit = "1/s" if figure == "throughput" else "ms"
        what = {"what": f"HTTP: {figure}", "batch": batch, "unit": unit, "budget": budget}
        rows.append({**what, "met": met, **row})
    return rows


def compare_answers(seen: dict[str, Seen]) -> dict[str, int]:
    """Count the guarded answers that the unguarded archive gave, to the byte, for the same image.

    It may have several: sums over a batch of another size are rounded otherwise, guarded or not.
    """
    unguarded = seen["stock"].keys() | seen["control"].keys()
    identical = sum(count for pair, count in seen["guarded"].items() if pair in unguarded)
    return {"compared": seen["guarded"].total(), "identical": identical}


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
    server: TorchServe, name: str, images: Sequence[bytes], batch: int, seen: Seen
) -> dict[str, float]:
    """Send a round of requests; return throughput (1/s) and latencies (ms), note answers in `seen`."""
    url = f"{server.inference_url}/predictions/{name}"
    clients = CLIENTS_PER_ROW * batch
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
        answers = list(pool.map(one, range(REQUESTS[batch])))
        seconds = time.perf_counter() - start
    seen.update(pair for _, pair in answers)
    latencies = [took for took, _ in answers]
    p50, p99 = np.quantile(latencies, [0.5, 0.99]).tolist()
    return {"throughput": len(answers) / seconds, "p50": p50, "p99": p99}


def render(result: dict[str, Any]) -> str:
    """Return the results as a Markdown page."""
    machine, lines = result["machine"], []
    identical = ", ".join(
        f"{found['identical']} of {found['compared']} at batch {batch}"
        for batch, found in result["answers"].items()
    )
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
            "guard that refuses nothing. Guarded answers that the stock archive gave for the same "
            f"image, to the byte: {identical}. Stock, control (stock once more) and guarded "
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
