"""Every router that takes one forward, from `pathguard fit --router NAME` to a TorchServe."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from defense.cli.app import main
from defense.offline.demo.digits import DigitFolders, pack_digits
from defense.routers import ROUTERS
from defense.wrap import wrap_archive
from handlers.torchserve import HANDLER_SOURCE
from handlers.torchserve_server import TorchServe, free_port, on_free_ports
from handlers.torchserve_settings import ServedModel, ServerSettings
from tests.archives import build_archive
from tests.decoupled_net import DecoupledNet, decoupled_net
from tests.e2e import kinds
from tests.e2e.conftest import Running, guard_yaml
from tests.e2e.requests import post, total

pytestmark = pytest.mark.server

IMPORTS = """
from torch import Tensor, nn

from defense.offline.networks import Controller


"""
SERVING = [name for name, kind in ROUTERS.items() if kind.fitted.one_forward]


def fit(stock: Path, router: str, data: Path, out: Path) -> None:
    """Run `pathguard fit`."""
    words = ["pathguard", "fit", "--router", router, "--archive", stock, "--data", data]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*map(str, words), "--out", str(out)])
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code


@pytest.fixture(scope="module")
def served(
    network: nn.Module, folders: DigitFolders, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """One TorchServe with a guarded model per router, named after it."""
    work = tmp_path_factory.mktemp("routers")
    plain = work / "digits.mar"
    pack_digits(network, plain)
    handler = work / "own_handler.py"
    handler.write_text(kinds.CLASS_HANDLER.replace("self.model.forwards", "0"))
    decoupled = build_archive(
        work,
        handler=handler,
        model_file_source=IMPORTS + inspect.getsource(DecoupledNet),
        state_dict=decoupled_net().state_dict(),
        name="decoupled",
    )
    models = []
    for router in SERVING:
        stock = decoupled if router == "decoupled" else plain
        fit(stock, router, folders.fit, work / router)
        guarded = work / f"{router}-guarded.mar"
        wrap_archive(stock, guarded, guard_folder=work / router, handler_source=HANDLER_SOURCE)
        models.append(ServedModel(router, guarded, batch_size=4, max_batch_delay_ms=50))
    config, port = work / "guard.yaml", free_port()
    config.write_text(guard_yaml(port))
    settings = on_free_ports(ServerSettings(models=tuple(models), guard_config=config))
    with TorchServe(settings) as server:
        yield Running(server, config, port)


@pytest.mark.parametrize("router", SERVING)
def test_a_guard_of_every_router_serves_and_scores(
    router: str, served: Running, clean: list[bytes]
) -> None:
    answers = post(served.server, router, clean[:8])
    assert {answer.status_code for answer in answers} <= {200, 403}
    assert [answer.status_code for answer in answers].count(200) >= 6
    counted = [
        total(served.metrics_url, "pathguard_requests_total", model=router, verdict=verdict)
        for verdict in ("accept", "flag", "reject")
    ]
    assert sum(counted) == 8
    assert total(served.metrics_url, "pathguard_guard_info", model=router, router=router) == 1
