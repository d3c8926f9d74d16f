"""`pathguard benchmark` from archive and images to results, report and card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from defense.artifact import load_guard
from defense.cli import benchmark
from defense.cli.benchmark import Asked, BenchmarkRequest, sealed_rows, write
from defense.errors import DataError
from defense.offline.archived import pack_network
from defense.offline.attacks.adaptive import ADAPTIVE
from defense.offline.attacks.queries.boundary import HopSkipJump
from defense.offline.attacks.queries.oracle import ModelOracle
from defense.offline.attacks.queries.scattered import Scattered
from defense.offline.attacks.queries.square import Square
from defense.offline.benchmark import arsenal, study, whitebox
from defense.offline.benchmark.contestants import contestants
from defense.offline.benchmark.trials import Material
from defense.offline.benchmark.whitebox import make_guard
from defense.offline.data import ImageSet
from tests.cli import Run, run
from tests.offline.benchmark_results import make_results
from tests.offline.conftest import shrink
from tests.offline.studied import COUNT, serve

__all__ = ["run"]  # a fixture that pytest finds here

TOLD = {
    *("command", "seeds", "versions", "fingerprint", "artefacts", "data", "attacks"),
    *("contestants", "sealed", "roc", "adaptive", "queries", "sanity"),
}


@pytest.fixture
def small_study(monkeypatch: pytest.MonkeyPatch, weak_card: Path) -> None:
    """Let the command make do with a few images, attacks, steps and queries."""
    shrink(monkeypatch)
    monkeypatch.setattr(arsenal, "ATTACKS", ("fgsm_8", "pgd_4"))
    for name, value in (("RADII", (4,)), ("IMAGES", 10), ("BANK_IMAGES", 30)):
        monkeypatch.setattr(whitebox, name, value)
    effort = {name: {"steps": 2, "restarts": 1} for name in (*ADAPTIVE, "bare")}
    monkeypatch.setattr(whitebox, "EFFORT", effort | {"joint": {"steps": 2, "rounds": 1}})
    wanted = ("pathguard", "path alone", "max_softmax", "pooled_activations")
    few = [each for each in contestants() if each.name in wanted]
    monkeypatch.setattr(benchmark, "contestants", lambda: few)
    asked = {
        "square": Asked(Square(budget=10), 4),
        "scattered": Asked(Scattered(budget=10), 4, "forgetful"),
        "boundary": Asked(HopSkipJump(budget=20, probes=4), 2),
    }
    monkeypatch.setattr(benchmark, "ASKED", asked)
    monkeypatch.setattr(study, "FEW", 30)
    monkeypatch.setattr(benchmark, "served_forms", partial(in_process, weak_card))


@contextmanager
def in_process(
    card: Path, _stock: Path, guarded: Path, names: Sequence[str], *, reject_fpr: float
) -> Iterator[SimpleNamespace]:
    """Stand in for a server with both archives."""
    assert guarded.stat().st_size > 0
    assert load_guard(guarded.parent / "guard").class_names == tuple(names)
    assert reject_fpr == 0.01
    network = serve(card).backbone
    forms = ("stock", "guarded", "forgetful")
    yield SimpleNamespace(**{form: ModelOracle(network) for form in forms})


def refuse(constant: str) -> None:
    raise AssertionError(constant)


def test_a_benchmark_is_measured_and_written(
    run: Run,
    small_study: None,
    weak_card: Path,
    weak_folder: Path,
    tmp_path: Path,
) -> None:
    pack_network(weak_card, tmp_path / "weak.mar")
    words = ("benchmark", "--archive", "weak.mar", "--data", weak_folder, "--witness", weak_card)
    code, _, said = run(*words, "--out", "told", "--kept", "kept")
    assert code == 0, said
    assert "Report written to told/detection.html" in said
    told = tmp_path / "told"
    text = (told / "detection.json").read_text()
    results: dict[str, Any] = json.loads(text, parse_constant=refuse)
    assert results.keys() == TOLD
    assert results["command"].startswith("pathguard benchmark --archive weak.mar")
    assert results["data"]["images"] == COUNT
    assert results["attacks"].keys() == {"fgsm_8", "pgd_4", "cdrp"}
    assert results["seeds"] == [0, 1, 2]
    assert results["contestants"]["pathguard"]["seen"]["fgsm_8"]["auroc"]["mean"] > 0.5
    assert results["queries"]["attack"].keys() == {"square", "scattered", "boundary"}
    assert results["queries"]["attack"]["square"]["ratio"] in (None, 1.0)
    assert results["adaptive"]["eps_255"] == [4]
    assert {"splits apart", "twins together", "null test"} <= results["sanity"].keys()
    assert all(check["says"] for check in results["sanity"].values())
    card = json.loads((told / "detection-card.json").read_text(), parse_constant=refuse)
    assert card["network"] == results["fingerprint"]
    for page in ("detection.html", "detection.md"):
        assert "pathguard" in (told / page).read_text()
    kept = sorted(path.name for path in (tmp_path / "kept").iterdir())
    again, _, said = run(*words, "--out", "again", "--kept", "kept")
    assert again == 0, said
    second = json.loads((tmp_path / "again" / "detection.json").read_text())
    assert second | {"command": ""} == results | {"command": ""}
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == kept
    assert any(name.startswith("attack-pgd_4") for name in kept)


def test_another_guard_is_asked_anew_and_the_same_one_is_not(
    material: Material,
    small_study: None,
    weak_card: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served: list[Path] = []

    def serving(*given: Any, **how: Any) -> AbstractContextManager[SimpleNamespace]:
        served.append(given[2])
        return in_process(*given, **how)

    monkeypatch.setattr(benchmark, "served_forms", partial(serving, weak_card))
    monkeypatch.setattr(benchmark, "wrap_archive", lambda _from, to, **_how: to.write_text("mar"))
    request = BenchmarkRequest(tmp_path / "x.mar", tmp_path, None, (), tmp_path, tmp_path, "")
    first, again, other = (
        benchmark._ask(request, material, make_guard(material, seed)) for seed in (0, 0, 1)
    )
    assert len(served) == 2
    assert first == again
    assert first.keys() == other.keys()


def test_what_is_sealed_depends_on_the_names_of_images_alone() -> None:
    names = tuple(f"{kind}/{number:03}.png" for kind in ("a", "b") for number in range(200))
    first = sealed_rows(ImageSet(Path("here"), names, None, ()))
    moved = tuple(f"test/{name}" for name in reversed(names))
    other = sealed_rows(ImageSet(Path("there"), moved, None, ()))
    assert torch.equal(first, other.flip(0))
    assert 0.1 < first.double().mean() < 0.3


def test_figures_that_are_no_numbers_are_not_written(tmp_path: Path) -> None:
    results = make_results() | {"roc": {"pathguard": {"all": [[0.1, float("nan")]]}}}
    with pytest.raises(DataError, match="a figure of the benchmark is no number"):
        write(results, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
