"""What one sees from inside a running container, as JSON: run there by its own Python.

Arguments: the model's name, and a folder of request bodies.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path

import httpx

PLACES = ("/", "/etc", "/usr", "/opt/pathguard", "/models", "/config", "/dev", "/tmp")
ELSEWHERE = (("192.0.2.1", 80), ("1.1.1.1", 53))
LISTENING = "0A"


def answers(model: str, folder: Path) -> dict[str, tuple[int, str | None]]:
    """Post every body with the server's token, and one without; return statuses and verdicts."""
    (keys,) = Path("/tmp").glob("pathguard-*/key_file.json")
    token = json.loads(keys.read_text())["inference"]["key"]
    bodies = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    url = f"http://127.0.0.1:8080/predictions/{model}"
    found = {}
    for name, body in {**bodies, "unauthorised": b""}.items():
        headers = {} if name == "unauthorised" else {"Authorization": f"Bearer {token}"}
        answer = httpx.post(url, content=body, headers=headers, timeout=60)
        found[name] = answer.status_code, answer.headers.get("x-pathguard-verdict")
    return found


def written() -> list[str]:
    """Return the places that take a file."""
    found = []
    for place in PLACES:
        with suppress(OSError):
            (Path(place) / "written").touch()
            found.append(place)
    return found


def reached() -> list[str]:
    """Return the addresses elsewhere that can be connected to."""
    found = []
    for address in ELSEWHERE:
        with suppress(OSError), socket.create_connection(address, timeout=2):
            found.append(address[0])
    return found


def listening() -> Iterator[tuple[int, bool]]:
    """Yield the ports that something listens on, and whether on every address."""
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state = line.split()[:4]
            address, port = local.split(":")
            if state == LISTENING:
                yield int(port, 16), int(address, 16) == 0


def processes() -> list[dict[str, str]]:
    """Return program, user and rights of every process."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        lines = [line.split(":", 1) for line in status.read_text().splitlines()]
        facts = {name: value.strip() for name, value in lines}
        wanted = {name: facts[name] for name in ("Uid", "CapEff", "CapBnd", "NoNewPrivs")}
        found.append({"program": os.readlink(status.parent / "exe"), **wanted})
    return found


if __name__ == "__main__":
    seen = {
        "answers": answers(sys.argv[1], Path(sys.argv[2])),
        "metrics": httpx.get("http://127.0.0.1:8083/metrics", timeout=10).text,
        "written": written(),
        "reached": reached(),
        "processes": processes(),
        "listening": sorted(listening()),
        "packages": {part.name: part.version for part in distributions()},
    }
    sys.stdout.write(json.dumps(seen))
