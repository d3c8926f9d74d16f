"""A model and its guarded forms on one TorchServe, as oracles for attacks by queries."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from defense.offline.attacks.queries.oracle import HttpOracle
from handlers.torchserve_server import TorchServe, free_port, on_free_ports
from handlers.torchserve_settings import ServedModel, ServerSettings

CONCURRENCY = 32
BATCH_DELAY_MS = 5
FORGETFUL = "forgetful"
STARTUP_SECONDS = 300
"""Studies run on busy machines."""
GUARD_YAML = """\
version: 1
defaults:
  flag: {{target_fpr: {fpr}}}
  reject: {{target_fpr: {fpr}}}
models:
  {forgetful}: {{probing: off}}
metrics: {{port: {port}}}
"""


@dataclass(frozen=True)
class Served:
    """The oracles, and where the guard's metrics are read. forgetful: guarded, without a memory."""

    stock: HttpOracle
    guarded: HttpOracle
    forgetful: HttpOracle
    metrics_url: str


@contextmanager
def served_forms(
    stock: Path, guarded: Path, class_names: Sequence[str], *, reject_fpr: float, batch: int = 8
) -> Iterator[Served]:
    """Serve two archives on 127.0.0.1, the guarded one also without its memory of requests.

    They run until the block ends. The guard refuses what it gives a p-value of `reject_fpr` or
    less, in (0, 1). class_names: what both archives answer with. batch: requests that a worker takes
    at once.
    """
    with tempfile.TemporaryDirectory(prefix="pathguard-queries-") as folder:
        config, port = Path(folder) / "guard.yaml", free_port()
        config.write_text(GUARD_YAML.format(fpr=reject_fpr, port=port, forgetful=FORGETFUL))
        models = tuple(
            ServedModel(
                name,
                archive,
                batch_size=batch,
                max_batch_delay_ms=BATCH_DELAY_MS,
                startup_timeout_s=STARTUP_SECONDS,
            )
            for name, archive in (("stock", stock), ("guarded", guarded), (FORGETFUL, guarded))
        )
        settings = on_free_ports(ServerSettings(models=models, guard_config=config))
        with (
            TorchServe(settings) as server,
            _oracle(server, "stock", class_names) as first,
            _oracle(server, "guarded", class_names) as second,
            _oracle(server, FORGETFUL, class_names) as third,
        ):
            yield Served(first, second, third, f"http://127.0.0.1:{port}/metrics")


def _oracle(server: TorchServe, model: str, class_names: Sequence[str]) -> HttpOracle:
    """Return an oracle of one model of a running server; its token is renewed as time goes by."""
    return HttpOracle(
        server.inference_url,
        model,
        class_names,
        headers=server.token_header,
        concurrency=CONCURRENCY,
    )
