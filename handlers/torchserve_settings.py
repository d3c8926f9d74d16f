"""What a TorchServe serves, and where; and the `config.properties` that says so."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from defense.archive import read_archive
from defense.errors import ServerError
from defense.folders import is_tar


@dataclass(frozen=True)
class ServedModel:
    """One archive and how it is served; what its own `model-config.yaml` says goes first."""

    name: str
    archive: Path
    batch_size: int = 8
    max_batch_delay_ms: int = 10
    workers: int = 1
    response_timeout_s: int = 120
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
    model_api: bool = False
    job_queue_size: int = 100
    max_request_bytes: int = 6_553_500
    guard_config: Path | None = None
    log_file: Path | None = None
    service_envelope: str = ""
    """What unpacks and packs the requests of all models: kserve, kservev2, or nothing."""
    install_requirements: bool = False
    """Let TorchServe install what an archive's requirements file names, as it registers it."""

    def __post_init__(self) -> None:
        ports: list[object] = list(self.ports.values())
        for value in ports:
            if ports.count(value) > 1:
                raise ServerError(f"Two interfaces listen on {value}, and only one can.")
        for model in self.models:
            if [(m.name, m.archive) for m in self.models].count((model.name, model.archive)) > 1:
                raise ServerError(f"Two models are called {model.name}, and only one can.")

    @property
    def ports(self) -> dict[str, int]:
        names = ("inference", "management", "metrics", "grpc_inference", "grpc_management")
        return {f"{name}_port": getattr(self, f"{name}_port") for name in names}


def stored_models(settings: ServerSettings) -> dict[str, tuple[ServedModel, str]]:
    """Return every model and its version by the name of its archive in the model store.

    ServerError where two archives say that they are one version of one model.
    """
    stored: dict[str, tuple[ServedModel, str]] = {}
    for model in settings.models:
        version = read_archive(model.archive).model_version
        names = [other.name for other in settings.models]
        stem = model.name if names.count(model.name) == 1 else f"{model.name}-{version}"
        suffix = "" if model.archive.is_dir() else ".tar.gz" if is_tar(model.archive) else ".mar"
        if stem + suffix in stored:
            raise ServerError(
                f"Two archives hold version {version} of the model '{model.name}'; "
                "give one of them another version or name."
            )
        stored[stem + suffix] = model, version
    return stored


def render_properties(settings: ServerSettings) -> str:
    """Write the `config.properties` that TorchServe is started with."""
    stored = stored_models(settings)
    models: dict[str, dict[str, object]] = {}
    for file, (model, version) in stored.items():
        models.setdefault(model.name, {})[version] = {
            "defaultVersion": model.name not in models,
            "marName": file,
            "minWorkers": model.workers,
            "maxWorkers": model.workers,
            "batchSize": model.batch_size,
            "maxBatchDelay": model.max_batch_delay_ms,
            "responseTimeout": model.response_timeout_s,
            "startupTimeout": model.startup_timeout_s,
        }
    return _PROPERTIES.format(
        settings=settings,
        no_token="false" if settings.token_auth else "true",
        model_api="true" if settings.model_api else "false",
        load=",".join(f"{model.name}={file}" for file, (model, _) in stored.items()),
        install="true" if settings.install_requirements else "false",
        envelope=f"service_envelope={settings.service_envelope}\n"
        * bool(settings.service_envelope),
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
# added or replaced while the server runs unless its operator wants that, and archives come from the
# model store alone: the pattern allows no URL.
disable_token_authorization={no_token}
enable_model_api={model_api}
allowed_urls=^$
install_py_dep_per_model={install}
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
{envelope}"""
