"""Nothing that a client sends is written down: marks are planted everywhere and looked for."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import Literal

import grpc
import httpx
import pytest

from handlers.torchserve_server import TorchServe
from tests.e2e.conftest import Running
from tests.e2e.grpc import predictions, stream_predictions
from tests.e2e.requests import scrape

pytestmark = pytest.mark.server

FORGED = "[METRICS]Forged.Count:1000|#Level:Host|#hostname:here,1"
PREFIX = "x-request-id-prefix"


class Planter:
    """Sends requests with marks in them, and remembers what came back."""

    def __init__(self, server: TorchServe) -> None:
        self.server = server
        self.heads: dict[str, list[str]] = {}

    def send(
        self,
        name: str,
        line: bytes,
        headers: bytes = b"",
        body: bytes = b"",
        *,
        api: Literal["inference", "management"] = "inference",
    ) -> None:
        """Send a request as it is, and keep the head of what comes back under its mark."""
        own = {"Host": "here", "Content-Length": str(len(body)), **self.server.token_header(api)}
        known = "".join(f"{key}: {value}\r\n" for key, value in own.items()).encode()
        request = line + b"\r\n" + known + headers + b"\r\n" + body
        address = ("127.0.0.1", self.server.settings.ports[f"{api}_port"])
        with socket.create_connection(address, timeout=60) as connection:
            connection.sendall(request)
            answer = HTTPResponse(connection)
            answer.begin()
            answer.read()
        self.heads[name] = [
            answer.reason,
            *(f"{key}: {value}" for key, value in answer.getheaders()),
        ]


def mark(name: str) -> str:
    return f"planted7f3a{name}"


def plant_in_urls(planter: Planter, image: bytes) -> None:
    post = {
        "model": "/predictions/{}",
        "version": "/predictions/counting/{}",
        "urlpath": "/predictions/counting/1.0/{}",
        "query": "/predictions/counting?{0}={0}",
        "invoked": "/invocations?model_name=counting&data={}",
        "legacy": "/{}/predict",
        "kserve": "/v1/models/{}:predict",
        "workflow": "/wfpredict/{}",
        "door": "/{}",
        "asdoor": "/predictions{}",
        "escape": "/predictions/{}%zz",
        "cutescape": "/predictions/counting?x={}%f",
        "quoted": '/predictions/counting"{}" 200 0',
        "linefeed": "/predictions/counting/%0a%c2%85{}",
    }
    for name, path in post.items():
        planter.send(name, f"POST {path.format(mark(name))} HTTP/1.1".encode(), body=image)
    planter.send("method", f"{mark('method')} /predictions/counting HTTP/1.1".encode())
    planter.send("grpcmethod", f"gRPC {mark('grpcmethod')}/Ping HTTP/1.1".encode())
    planter.send("protocol", f"POST /predictions/counting {mark('protocol')}/1.1".encode())
    planter.send(
        "managed",
        f"GET /models/{mark('managed')} HTTP/1.1".encode(),
        api="management",
    )


def plant_in_headers(planter: Planter, image: bytes) -> None:
    line = b"POST /predictions/counting HTTP/1.1"
    headers = {
        "name": "{}: 1",
        "value": "X-Any: {}",
        "nonascii": "X-Any: \x85\xff{}",
        "contenttype": "Content-Type: application/{}",
        "charset": "Content-Type: application/json; charset={}",
        "expect": "Expect: {}",
        "noname": ": {}",
        "explain": "explain: {}",
        "sequence": "ts_request_sequence_id: {}",
        "prefix": PREFIX + ": {}",
        "forging": PREFIX + ": \x85" + FORGED + ",{}",
        "breaking": PREFIX + ": {0},|#{0}:1",
        "started": PREFIX + ": {}\x85Torch worker started.",
    }
    for name, header in headers.items():
        content = f"{header.format(mark(name))}\r\n".encode("latin-1")
        planter.send(name, line, content, image)
        planter.send(name, line, content, b"no image")
    planter.send("token", line, f"Authorization: Bearer {mark('token')}\r\n".encode(), image)


def plant_in_bodies(planter: Planter, image: bytes) -> None:
    line = b"POST /predictions/counting HTTP/1.1"
    planter.send("body", line, body=mark("body").encode())
    planter.send("tail", line, body=image + mark("tail").encode())
    planter.send("cut", line, body=image[:60] + mark("cut").encode())
    planter.send("forgedbody", line, body=f"\n{FORGED},{mark('forgedbody')}\n".encode())
    json = b"Content-Type: application/json\r\n"
    planter.send("json", line, json, f'{{"{mark("json")}": '.encode())
    planter.send("jsonvalue", line, json, f'{{"data": "{mark("jsonvalue")}"}}'.encode())
    form = b"Content-Type: application/x-www-form-urlencoded\r\n"
    planter.send("form", line, form, f"{mark('form')}=%zz".encode())
    parts = {
        "partname": 'Content-Disposition: form-data; name="{}"',
        "filename": 'Content-Disposition: form-data; name="data"; filename="{}.png"',
        "parttype": 'Content-Disposition: form-data; name="data"; filename="a"\r\nContent-Type: {}',
        "partcharset": 'Content-Disposition: form-data; name="a"\r\nContent-Type: text/a; charset={}',
        "transfer": 'Content-Disposition: form-data; name="data"; filename="a"\r\n'
        "Content-Transfer-Encoding: {}",
        "disposition": "Content-Disposition: {}",
        "noparts": "{}",
    }
    multipart = b"Content-Type: multipart/form-data; boundary=edge\r\n"
    for name, head in parts.items():
        content = f"--edge\r\n{head.format(mark(name))}\r\n\r\n".encode() + image
        planter.send(name, line, multipart, content + b"\r\n--edge--\r\n")
    boundary = f"Content-Type: multipart/form-data; boundary={mark('boundary')}\r\n"
    planter.send("boundary", line, boundary.encode(), b"no parts at all")
    nothing = f"Content-Type: multipart/form-data; {mark('nothing')}\r\n"
    planter.send("nothing", line, nothing.encode(), image)


def plant_over_grpc(server: TorchServe, image: bytes) -> None:
    calls: tuple[tuple[str, str, Mapping[str, bytes]], ...] = (
        ("counting", "", {mark("input"): image}),
        ("counting", "", {"data": mark("value").encode()}),
        ("counting", mark("grpcversion"), {"data": image}),
        (mark("grpcmodel"), "", {"data": image}),
    )
    for model, version, inputs in calls:
        with suppress(grpc.RpcError):
            predictions(server, model, inputs, version=version)
        with suppress(grpc.RpcError):
            stream_predictions(server, model, inputs)


@pytest.fixture(scope="module")
def planted(doors: Running, clean: list[bytes]) -> Planter:
    """Every mark has been sent, and the server works as before."""
    planter = Planter(doors.server)
    before = [doors.server.worker_pids(model) for model in ("counting", "function")]
    plant_in_urls(planter, clean[0])
    plant_in_headers(planter, clean[0])
    plant_in_bodies(planter, clean[0])
    plant_over_grpc(doors.server, clean[0])
    assert [doors.server.worker_pids(model) for model in ("counting", "function")] == before
    return planter


def written(server: TorchServe) -> dict[Path, str]:
    """Return everything that the server has written, archives and unpacked models aside."""
    folder = server.log_file.parent
    aside = (folder / "model_store", folder / "tmp" / "models")
    return {
        path: path.read_text(errors="replace")
        for path in folder.rglob("*")
        if path.is_file() and not any(path.is_relative_to(other) for other in aside)
    }


def test_no_file_of_the_server_holds_what_a_client_sent(planted: Planter) -> None:
    files = written(planted.server)
    found = {
        line[line.index("planted7f3a") :][:40]: line
        for text in files.values()
        for line in text.splitlines()
        if "planted7f3a" in line
    }

    assert any("ACCESS_LOG" in text for text in files.values())
    assert found == {}
    assert not any("Forged" in text for text in files.values())


def test_no_head_of_an_answer_repeats_what_a_client_sent(planted: Planter) -> None:
    for name, lines in planted.heads.items():
        assert not [line for line in lines if "planted7f3a" in line], name


def test_no_metric_holds_what_a_client_sent(doors: Running, planted: Planter) -> None:
    for url in (doors.metrics_url, f"{planted.server.metrics_url}/metrics"):
        text = httpx.get(url, timeout=10).text
        assert "planted7f3a" not in text
        assert "forged" not in text.lower()
    models = {
        dict(labels)["model"] for _, labels in scrape(doors.metrics_url) if "model" in dict(labels)
    }
    assert models <= {"counting", "function", "classifier", "late"} | {
        f"then-{second}__{node}" for second in ("echo", "function") for node in ("first", "second")
    }


def test_the_log_still_says_what_was_asked_and_how_it_ended(planted: Planter) -> None:
    log = planted.server.log_file.read_text()

    for line in (" POST /predictions 200 ", " POST /predictions 404 ", " GET /models 404 "):
        assert line in log
    assert " gRPC org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions 0 " in log
    assert "io.netty.util.internal.StringUtil decodeHexByte" in log
