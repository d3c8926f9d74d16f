"""What a TorchServe serves, and where; and the `config.properties` that says so."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from defense.archive import read_archive
from defense.errors import ServerError


@dataclass(frozen=True)
class ServedModel:
    """One archive and how it is served; what its own `model-config.yaml` says goes first."""

    name: str
    archive: Path
    batch_size: int = 8
    max_batch_delay_ms: int = 10
    workers: int = 1
    response_timeout_s: int = 60
    startup_timeout_s: int = 120

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise ServerError(
                f"A served model cannot be called '{self.name}': "
                "a name has letters, digits, '_', '.' and '-', and begins with a letter or digit."
            )
        for field in ("batch_size", "workers", "response_timeout_s", "startup_timeout_s"):
            if getattr(self, field) < 1:
                raise ServerError(
                    f"Model '{self.name}' has {field} {getattr(self, field)}, which must be >= 1."
                )


@dataclass(frozen=True)
class ServerSettings:
    """What one TorchServe serves, and where."""

    models: tuple[ServedModel, ...] = ()
    host: str = "127.0.0.1"
    inference_port: int = 8080
    management_port: int = 8081
    metrics_port: int = 8082
    grpc_inference_port: int = 7070
    grpc_management_port: int = 7071
    token_auth: bool = True
    job_queue_size: int = 100
    max_request_bytes: int = 6_553_500
    guard_config: Path | None = None
    log_file: Path | None = None

    def __post_init__(self) -> None:
        names: list[object] = [model.name for model in self.models]
        ports: list[object] = list(self.ports.values())
        for kind, values in (("models are called", names), ("interfaces listen on", ports)):
            for value in values:
                if values.count(value) > 1:
                    raise ServerError(f"Two {kind} {value}, and only one can.")

    @property
    def ports(self) -> dict[str, int]:
        names = ("inference", "management", "metrics", "grpc_inference", "grpc_management")
        return {f"{name}_port": getattr(self, f"{name}_port") for name in names}


def render_properties(settings: ServerSettings) -> str:
    """Write the `config.properties` that TorchServe is started with."""
    models = {
        model.name: {
            read_archive(model.archive).model_version: {
                "defaultVersion": True,
                "marName": f"{model.name}.mar",
                "minWorkers": model.workers,
                "maxWorkers": model.workers,
                "batchSize": model.batch_size,
                "maxBatchDelay": model.max_batch_delay_ms,
                "responseTimeout": model.response_timeout_s,
                "startupTimeout": model.startup_timeout_s,
            }
        }
        for model in settings.models
    }
    return _PROPERTIES.format(
        settings=settings,
        no_token="false" if settings.token_auth else "true",
        load=",".join(f"{name}={name}.mar" for name in models),
        models=json.dumps(models).replace("\\", "\\\\"),
    )


_PROPERTIES = """\
# What PathGuard starts TorchServe with (handlers.torchserve_settings.render_properties).

# One address for everything; what the world may see of it is a proxy's business.
inference_address=http://{settings.host}:{settings.inference_port}
management_address=http://{settings.host}:{settings.management_port}
metrics_address=http://{settings.host}:{settings.metrics_port}
grpc_inference_address={settings.host}
grpc_inference_port={settings.grpc_inference_port}
grpc_management_address={settings.host}
grpc_management_port={settings.grpc_management_port}

# An archive runs whatever code it contains. So calls need a token of key_file.json, no model is
# added or replaced while the server runs, and archives come from the model store alone: the
# pattern allows no URL.
disable_token_authorization={no_token}
enable_model_api=false
allowed_urls=^$
install_py_dep_per_model=false
enable_envvars_config=false

# Handlers' metrics are read at metrics_address. TorchServe's own view of the machine would cost
# one more Python process every minute, and a node exporter knows more.
metrics_mode=prometheus
model_metrics_auto_detect=false
disable_system_metrics=true

# 0 threads: as many as TorchServe finds right for the machine.
number_of_netty_threads=0
job_queue_size={settings.job_queue_size}
max_request_size={settings.max_request_bytes}
limit_max_image_pixels=true

# Workers, batch size, batch delay (ms) and time limits (s) of every model.
default_workers_per_model=1
load_models={load}
models={models}
"""
