"""How cost grows, and what the GPU benchmark measures, as far as a CPU can tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from defense.offline.cost import gpu, scaling
from defense.offline.cost.gpu import compiled, eager, gpu_cells, measure_gpu
from defense.offline.cost.scaling import Size, exponent, network, write_scaling
from defense.offline.cost.turns import milliseconds
from defense.offline.progress import Silent
from defense.sites import discover_sites
from tests.cli import Run, run
from tests.served import images_like_noise, seeded_net

__all__ = ["run"]  # a fixture that pytest finds here


@pytest.mark.parametrize(("power", "fixed"), [(1, 0), (2, 0), (1, 5)])
def test_an_exponent_tells_a_line_from_a_square(power: int, fixed: float) -> None:
    sizes = [8.0, 16.0, 32.0, 64.0, 128.0]
    found = exponent(sizes, [fixed + size**power for size in sizes])
    assert found == pytest.approx(power, abs=0.1)


def test_a_synthetic_network_has_the_sites_channels_and_classes_it_is_asked_for() -> None:
    net = network(Size(sites=5, channels=8, classes=7))
    seen = discover_sites(net, torch.zeros(1, 3, 16, 16))
    assert [site.channels for site in seen] == [8] * 5
    logits = net(torch.randn(2, 3, 16, 16))
    assert logits.shape == (2, 7)
    assert not torch.equal(logits[0], logits[1])


def test_the_study_writes_a_table_and_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "AXES", {"sites": (2, 4)})
    monkeypatch.setattr(scaling, "FIT_IMAGES", 100)
    write_scaling(tmp_path, rounds=1, progress=Silent())

    page = (tmp_path / "scaling.md").read_text()
    assert "## Sites" in page
    assert "Exponents: taking the path" in page
    assert (tmp_path / "scaling.svg").read_text().count('<g id="axes_') == 1


def test_without_a_gpu_the_benchmark_says_so_in_a_sentence(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, said = run("bench-gpu", "--out", tmp_path)
    assert code == 0
    assert "no CUDA device here, so nothing was measured" in " ".join(said.split())
    assert list(tmp_path.iterdir()) == []


def test_a_cell_of_the_gpu_benchmark_is_a_ratio_of_passes_with_and_without_the_path() -> None:
    row = measure_gpu(seeded_net(), images_like_noise(2, 1), eager, 5, Silent(), clock=milliseconds)
    assert row["rounds"] == 5
    assert row["ratio"] > 0


def test_the_bare_graph_gives_the_same_logits_and_computes_no_path() -> None:
    with gpu.observed_graph(seeded_net(), images_like_noise(2, 1)) as graph:
        bare = gpu.without_path(graph)
        x = images_like_noise(3, 2)
        assert torch.equal(bare(x), graph(x)[0])
    assert sum("mean" in str(node.target) for node in graph.graph.nodes) == 3
    assert sum("mean" in str(node.target) for node in bare.graph.nodes) == 0


def test_modes_run_the_function_that_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda run: run)
    x = torch.ones(2)
    for mode in (eager, compiled):
        assert mode(torch.neg, x)().tolist() == [-1, -1]  # type: ignore[attr-defined]
    assert len(gpu_cells()) == 18


def test_the_page_of_the_gpu_benchmark_judges_by_its_budget() -> None:
    row: dict[str, object] = {"stock": 1.0, "guarded": 1.03, "ratio": 1.03, "control": 1.0}
    row |= {"interval": (1.02, 1.04), "control_interval": (0.99, 1.01)}
    known = {"network": "resnet18", "batch": 8, "mode": "CUDA graph"}
    facts = {"device": "a device", "rounds": 5, "versions": {"torch": "2"}}
    page = gpu.page(facts, [known | row, known | row | {"ratio": 1.01}])
    assert "| resnet18 | 8 | CUDA graph | 1.000 ms | 1.030 ms | **1.030** [1.020, 1.040] |" in page
    assert page.count("| no |") == page.count("| yes |") == 1
