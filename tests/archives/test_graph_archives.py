"""TorchScript and torch.export archives on a real TorchServe, and why some of them are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.archives.kinds import KINDS, Kind
from tests.archives.trial import Guarded, Requests, Server, guard, served, try_out, write_images

GRAPHS = [kind for kind in KINDS if kind.name in ("scripted", "traced", "exported")]


@dataclass(frozen=True)
class Running:
    """Guarded graphs by the name of their kind, on one server."""

    guarded: dict[str, Guarded]
    server: Server
    requests: Requests


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("graphs")
    images, requests = write_images(folder / "images")
    guarded = {kind.name: guard(kind, folder / kind.name, images) for kind in GRAPHS}
    with served(list(guarded.values()), folder) as server:
        yield Running(guarded, server, requests)


@pytest.mark.server
@pytest.mark.parametrize("kind", GRAPHS, ids=lambda kind: kind.name)
def test_a_served_graph_keeps_every_promise(running: Running, kind: Kind) -> None:
    result = try_out(running.server, running.guarded[kind.name], running.requests)
    assert result.kept, result
    assert "3 sites, 36 channels" in result.guarded.doctor
