"""Start, watch and stop a TorchServe of which everything lives in one private folder."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from defense.errors import ServerError
from handlers.torchserve_process import (
    LOG_NAME,
    command,
    environment,
    find_java,
    find_torchserve,
    furnish,
    private_folder,
    running,
    terminated_as_exception,
)
from handlers.torchserve_settings import ServerSettings, render_properties, stored_models

_SPEECHLESS = "its worker ended without an exception"
_LAST_WORDS_SECONDS = 10.0


class TorchServe:
    """One running TorchServe: `with TorchServe(settings) as server: ...`."""

    def __init__(
        self, settings: ServerSettings, *, progress: Callable[[str], None] | None = None
    ) -> None:
        self.settings = settings
        self._progress = progress
        self._versions: list[tuple[str, str]] = []
        self._folder = Path()
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._resources.__exit__(kind, error, traceback)

    def start(self) -> None:
        """Return when every model has all its workers ready; otherwise leave nothing behind."""
        java, home = find_java(), find_torchserve()
        _check_ports(self.settings)
        properties = render_properties(self.settings)
        self._versions = [
            (model.name, version) for model, version in stored_models(self.settings).values()
        ]
        with ExitStack() as resources:
            resources.enter_context(terminated_as_exception())
            self._folder = resources.enter_context(private_folder())
            furnish(self._folder, self.settings, properties)
            self._log_start = self.log_file.stat().st_size if self.log_file.is_file() else 0
            line = command(java, home, self._folder, self.log_file)
            variables = environment(self._folder, self.settings.guard_config)
            self._process = resources.enter_context(
                running(line, self._folder, variables, self.log_file)
            )
            self._wait_until_ready()
            self._resources = resources.pop_all()

    def stop(self) -> None:
        """End the server and its workers and remove what they left; a second call does nothing."""
        self._resources.close()

    def wait(self) -> None:
        """Stay until the server ends, which by itself it should not."""
        if self._process is not None:
            status = self._process.wait()
            raise self._error(f"TorchServe ended by itself with status {status}{self._reason()}")

    @property
    def log_file(self) -> Path:
        return (self.settings.log_file or self._folder / LOG_NAME).absolute()

    @property
    def key_file(self) -> Path:
        return self._folder / "key_file.json"

    @property
    def model_store(self) -> Path:
        """The folder from which models can be registered while the server runs."""
        return self._folder / "model_store"

    @property
    def inference_url(self) -> str:
        return self._url(self.settings.inference_port)

    @property
    def management_url(self) -> str:
        return self._url(self.settings.management_port)

    @property
    def metrics_url(self) -> str:
        return self._url(self.settings.metrics_port)

    def token_header(self, api: Literal["inference", "management"] = "inference") -> dict[str, str]:
        """Return the header that a call needs; an expired token is renewed first."""
        if not self.settings.token_auth:
            return {}
        keys = self._keys()
        expires = datetime.fromisoformat(keys[api]["expiration time"])
        if expires < datetime.now(UTC) + timedelta(minutes=1):
            self._get(f"/token?type={api}", _bearer(keys["API"]["key"]))
            keys = self._keys()
        return _bearer(keys[api]["key"])

    def worker_pids(self, model: str) -> list[int]:
        """Return the process ids of a model's workers."""
        return [worker["pid"] for worker in self._describe(model)["workers"]]

    def log_tail(self, lines: int = 40) -> str:
        """Return the end of the log."""
        return "\n".join(self._log().splitlines()[-lines:])

    def _wait_until_ready(self) -> None:
        limit = max([model.startup_timeout_s for model in self.settings.models], default=60)
        deadline = time.monotonic() + limit
        said = ""
        while True:
            self._raise_if_failed()
            state, ready = self._readiness()
            if self._progress is not None and state != said:
                self._progress(state)
                said = state
            if ready:
                return
            if time.monotonic() > deadline:
                raise self._error(f"TorchServe was not ready after {limit} s ({state})")
            time.sleep(0.5)

    def _readiness(self) -> tuple[str, bool]:
        states = []
        complete = "Model server started." in self._log()  # said when every port is bound
        try:
            for name, version in self._versions:
                described = self._describe(f"{name}/{version}")
                ready = [one for one in described["workers"] if one["status"] == "READY"]
                states.append(f"{name}: {len(ready)}/{described['minWorkers']} workers ready")
                complete &= len(ready) >= max(described["minWorkers"], 1)
        except (OSError, ValueError, KeyError, HTTPException, ServerError):
            return "waiting for TorchServe", False
        return ", ".join(states) or "no model", complete

    def _raise_if_failed(self) -> None:
        """Recognise in the log, or in the end of the process, that waiting is in vain."""
        for name, version in self._versions:
            if reason := self._load_failure(name, version):
                raise self._error(f"Model '{name}' did not load: {reason}")
        if self._process is not None and self._process.poll() is not None:
            raise self._error(f"TorchServe did not start{self._reason()}")

    def _load_failure(self, name: str, version: str) -> str | None:
        """Return why a model cannot be loaded, None where nothing says that it cannot.

        TorchServe may kill a worker before it has read all of its output: then the exception is in
        the log a little later, or when the next attempt has failed.
        """
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while True:
            reason = _load_failure(self._log(), name, version)
            speechless = reason is not None and reason.startswith(_SPEECHLESS)
            if not speechless or time.monotonic() > deadline:
                return reason
            time.sleep(0.2)

    def _reason(self) -> str:
        error = r"(?:Caused by: )?[\w.$]+(?:Exception|Error)\b.*"
        telling = re.findall(
            rf"^(?:{error}|Invalid configuration: .+|Unrecognized .+)", self._log(), re.MULTILINE
        )
        bind = [line for line in telling if "Failed to bind" in line]
        return f": {(bind or telling)[-1].rstrip('.')}" if telling else ""

    def _error(self, sentence: str) -> ServerError:
        return ServerError(f"{sentence} (log: {self.log_file}).")

    def _log(self) -> str:
        """Return what this start has logged; a given log file may go back further."""
        content = self.log_file.read_bytes() if self.log_file.is_file() else b""
        start = self._log_start if len(content) >= self._log_start else 0  # it was rolled over
        return content[start:].decode(errors="replace")

    def _url(self, port: int) -> str:
        return f"http://{_reachable(self.settings.host)}:{port}"

    def _keys(self) -> dict[str, Any]:
        keys: dict[str, Any] = json.loads(self.key_file.read_bytes())
        return keys

    def _describe(self, model: str) -> dict[str, Any]:
        try:
            answer = self._get(f"/models/{model}", self.token_header("management"))
            described: dict[str, Any] = json.loads(answer)[0]
        except (OSError, HTTPException, ValueError) as error:
            raise ServerError(
                f"TorchServe does not describe model '{model}' at {self.management_url} ({error})."
            ) from error
        return described

    def _get(self, path: str, headers: dict[str, str]) -> bytes:
        port = self.settings.management_port
        connection = HTTPConnection(_reachable(self.settings.host), port, timeout=10)
        try:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise ServerError(f"TorchServe answered GET {path} with status {answer.status}.")
        return body


def free_port(host: str = "127.0.0.1") -> int:
    """Find a port on which nothing listens at the moment."""
    with socket.create_server((host, 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


def on_free_ports(settings: ServerSettings) -> ServerSettings:
    """Replace every port by a free one."""
    with ExitStack() as together:
        sockets = [
            together.enter_context(socket.create_server((settings.host, 0))) for _ in settings.ports
        ]
        ports = [taken.getsockname()[1] for taken in sockets]
    return replace(settings, **dict(zip(settings.ports, ports, strict=True)))


def _load_failure(log: str, name: str, version: str) -> str | None:
    """Return why a model cannot be loaded, as soon as the log says so: its worker has ended."""
    if refused := re.search(rf"Failed to load model: {re.escape(name)}\S*\n(.+)", log):
        return refused[1].rstrip(".")
    thread = rf"W-\d+-{re.escape(name)}_{re.escape(version)}"
    for worker in re.findall(rf"Stopped Scanner - ({thread})-stdout", log):
        if f"Stopped Scanner - {worker}-stderr" in log:
            output = rf"{re.escape(worker)}-std(?:out|err) MODEL_LOG - (.*)"
            return _last_error(re.findall(output, log))
    return None


def _last_error(output: list[str]) -> str:
    """Find the line of a worker's output that says what went wrong in it."""
    errors, in_traceback = [], False
    for line in output:
        if line.startswith("Traceback"):
            in_traceback = True
        elif in_traceback and line and not line.startswith(" "):
            errors.append(line)
            in_traceback = False
    # TorchServe wraps a RuntimeError into its own, and looks among its handlers for one that
    # could not be imported: the error before is the telling one.
    relayed = re.compile(r"RuntimeError: \d{3} - |ModuleNotFoundError: .*'ts\.torch_handler\.")
    telling = [line for line in errors if not relayed.match(line)] or errors
    if not telling:
        return f"{_SPEECHLESS}, and said {(output or [''])[-1]!r} last"
    return re.sub(r"^defense\.errors\.\w+: ", "", telling[-1]).rstrip(".")


def _check_ports(settings: ServerSettings) -> None:
    for name, port in settings.ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((settings.host, port))
            except OSError as error:
                raise ServerError(
                    f"Port {port} of {settings.host} ({name}) cannot be used: {error.strerror}."
                ) from error


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _reachable(host: str) -> str:
    return "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104
