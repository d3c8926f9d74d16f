"""What the campaigns share: a guarded server, what its counters say, and where results go."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import psutil
import yaml
from PIL import __version__ as pillow_version

from defense.offline.archived import pack_network
from defense.offline.fit import versions
from defense.wrap import wrap_archive
from handlers.torchserve import HANDLER_SOURCE
from handlers.torchserve_server import TorchServe, free_port, on_free_ports
from handlers.torchserve_settings import ServedModel, ServerSettings
from tests.e2e.requests import scrape

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks"
STORE = ROOT / "model_store"
MODEL = "guarded"


@dataclass(frozen=True)
class Guarded:
    """A running server with one guarded model. trail: the folder of its audit trail, where kept."""

    server: TorchServe
    config: Path
    metrics_port: int
    trail: Path
    model: str = MODEL

    @property
    def url(self) -> str:
        return f"{self.server.inference_url}/predictions/{self.model}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.metrics_port}/metrics"

    def workers(self) -> list[int]:
        """Return the process ids of the model's workers."""
        return self.server.worker_pids(self.model)

    def log(self) -> str:
        """Return all that the server and its workers have logged."""
        return self.server.log_file.read_text(errors="replace")


@dataclass(frozen=True)
class Counts:
    """How many requests the guard's metrics know of; every request is in exactly one of them."""

    accept: int = 0
    flag: int = 0
    reject: int = 0
    error: int = 0
    invalid: int = 0
    failed: int = 0
    passed: int = 0

    @classmethod
    def read(cls, guarded: Guarded) -> Self:
        """Read the counters of a running server."""
        found = dict.fromkeys((field.name for field in fields(cls)), 0)
        for (sample, labels), value in scrape(guarded.metrics_url).items():
            own = dict(labels)
            if own.get("model") != guarded.model:
                continue
            if sample == "pathguard_requests_total":
                found[own["verdict"]] += int(value)
            elif sample == "pathguard_invalid_inputs_total":
                found["invalid"] += int(value)
            elif sample == "pathguard_errors_total" and own["stage"] == "handler":
                found["failed"] += int(value)
            elif sample == "pathguard_passed_total":
                found["passed"] += int(value)
        return cls(**found)

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def since(self, before: Counts) -> Counts:
        """Return what was counted after `before`."""
        return Counts(
            **{f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)}
        )


@contextmanager
def serving(
    archive: Path,
    *,
    defaults: Mapping[str, Any] | None = None,
    audit: Mapping[str, Any] | None = None,
    workers: int = 1,
    queue: int = 100,
    **model: int,
) -> Iterator[Guarded]:
    """Serve a guarded archive until the block ends, on free ports and with `defaults` in guard.yaml.

    `audit` holds settings of an audit trail, None for none; `queue` is how many requests may wait;
    `model` holds further settings of a `ServedModel`, such as `batch_size`.
    """
    port = free_port()
    with TemporaryDirectory() as folder:
        config, trail = Path(folder) / "guard.yaml", Path(folder) / "trail"
        document = {"version": 1, "defaults": dict(defaults or {}), "metrics": {"port": port}}
        if audit is not None:
            document["audit"] = {"folder": str(trail), **audit}
        config.write_text(yaml.safe_dump(document))
        served = ServedModel(MODEL, archive, workers=workers, **model)
        settings = on_free_ports(
            ServerSettings(models=(served,), guard_config=config, job_queue_size=queue)
        )
        with TorchServe(settings) as server:
            yield Guarded(server, config, port, trail)


@contextmanager
def shipped_archive(handler_source: str = HANDLER_SOURCE) -> Iterator[Path]:
    """Pack the shipped CIFAR-10 network and wrap it around the shipped guard, in a private folder."""
    with TemporaryDirectory() as folder:
        stock, guarded = Path(folder) / "stock.mar", Path(folder) / "guarded.mar"
        pack_network(STORE / "cifar10.json", stock)
        wrap_archive(
            stock, guarded, guard_folder=STORE / "cifar10-guard", handler_source=handler_source
        )
        yield guarded


def about(command: str, seed: int) -> dict[str, Any]:
    """Return what another run needs to know of this one."""
    return {
        "command": command,
        "seed": seed,
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "machine": platform.machine(),
        "versions": versions() | {"pillow": pillow_version},
    }


def write_results(name: str, results: Mapping[str, Any], page: str) -> None:
    """Write `benchmarks/<name>.json` and the page about it."""
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(page)
