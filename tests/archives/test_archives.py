"""Archives of many kinds: built, fitted, wrapped, served beside their originals, unwrapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from handlers.torchserve import PROBLEM, VERDICT_HEADER
from tests.archives.__main__ import described, page
from tests.archives.kinds import KINDS, REFUSED, Kind, Refused
from tests.archives.trial import (
    GARBAGE,
    Guarded,
    Requests,
    Server,
    guard,
    refusal,
    served,
    try_out,
    write_images,
)
from tests.e2e.requests import total

SERVED = ("mirrored-batch", "version-1", "version-2", "kserve-v1")
"""The kinds that the ordinary tests serve; `make archives` serves all."""
UNSERVED = ("crops-by-request", "folder", "tar", "single")
"""The kinds that they fit, wrap and unwrap."""
V1 = next(kind for kind in KINDS if kind.name == "kserve-v1")


def named(*names: str) -> list[Kind]:
    return [kind for kind in KINDS if kind.name in names]


@dataclass(frozen=True)
class Running:
    """Guarded archives by the name of their kind, and the servers that serve them."""

    guarded: dict[str, Guarded]
    servers: dict[str, Server]
    requests: Requests


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("archives")
    images, requests = write_images(folder / "images")
    guarded = {kind.name: guard(kind, folder / kind.name, images) for kind in named(*SERVED)}
    with ExitStack() as started:
        found: dict[str, Server] = {}
        for envelope in ("", "kserve"):
            group = [one for one in guarded.values() if one.kind.envelope == envelope]
            server = started.enter_context(served(group, folder))
            found |= {one.kind.name: server for one in group}
        yield Running(guarded, found, requests)


@pytest.mark.server
@pytest.mark.parametrize("kind", named(*SERVED), ids=lambda kind: kind.name)
def test_a_served_archive_keeps_every_promise(running: Running, kind: Kind) -> None:
    result = try_out(running.servers[kind.name], running.guarded[kind.name], running.requests)
    assert result.kept, result
    assert "**no**" not in page([described(result)], {})


@pytest.mark.server
def test_versions_of_a_model_have_guards_of_their_own(running: Running) -> None:
    url = running.servers["version-1"].metrics_url
    for kind in named("version-1", "version-2"):
        server, name = running.servers[kind.name], kind.served_as
        before = total(url, "pathguard_requests_total", model=name, version=kind.version)
        server.send(kind, name, [running.requests.noise[0]])
        after = total(url, "pathguard_requests_total", model=name, version=kind.version)
        assert after == before + 1
    assert total(url, "pathguard_guard_info", model="versions") == 2


@pytest.mark.server
def test_one_rejected_instance_refuses_the_whole_request(running: Running) -> None:
    server, requests = running.servers["kserve-v1"], running.requests
    calm = [
        image
        for image in requests.clean
        if server.send(V1, V1.name, [image]).headers[VERDICT_HEADER] == "accept"
    ][:2]

    accepted = server.send(V1, V1.name, calm)
    original = server.send(V1, f"{V1.name}-stock", calm)
    refused = server.send(V1, V1.name, [*calm, requests.noise[0]])
    broken = server.send(V1, V1.name, [*calm, GARBAGE])

    assert accepted.content == original.content
    assert len(accepted.json()["predictions"]) == 2
    assert (refused.status_code, broken.status_code) == (403, 400)
    assert refused.headers["content-type"] == PROBLEM
    assert refused.json() == {
        "title": "The request was refused.",
        "status": 403,
        "guard": {"verdict": "reject"},
    }
    assert broken.json()["guard"] == {"verdict": "invalid", "reason": "not_an_image"}


@pytest.mark.server
@pytest.mark.parametrize(
    "body", [b"no json", b"{}", b"[]", b"7", b'{"instances": []}', b'{"instances": 3}']
)
def test_an_envelope_that_cannot_be_opened_is_the_clients_fault(
    running: Running, body: bytes
) -> None:
    server = running.servers["kserve-v1"]
    name = {"model": V1.name, "reason": "unreadable"}
    before = total(server.metrics_url, "pathguard_invalid_inputs_total", **name)
    answer = server.send_raw(V1, V1.name, body)
    assert answer.status_code == 400
    assert answer.json()["guard"] == {"verdict": "invalid", "reason": "unreadable"}
    assert total(server.metrics_url, "pathguard_invalid_inputs_total", **name) == before + 1


@pytest.mark.parametrize("kind", named(*UNSERVED), ids=lambda kind: kind.name)
def test_an_archive_is_fitted_wrapped_and_given_back(kind: Kind, tmp_path: Path) -> None:
    images, _ = write_images(tmp_path / "images")
    found = guard(kind, tmp_path / kind.name, images)
    assert (found.views, found.unwraps) == (kind.views, True)
    assert "3 sites, 36 channels" in found.doctor


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.name)
def test_what_cannot_be_guarded_is_refused_with_the_reason(
    refused: Refused, tmp_path: Path
) -> None:
    reason = refusal(refused, tmp_path / "refused")
    assert refused.reason in reason
    assert "\n" not in reason
