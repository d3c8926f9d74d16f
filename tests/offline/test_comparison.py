"""The comparison of routers: fair to every row, kept between runs, readable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from defense.errors import ConfigError
from defense.offline import comparison, costs
from defense.offline.backbones import train_backbone
from defense.offline.comparison import judges, networks, rows, steps_of
from defense.offline.comparison.backbones import Cache, digest_of, open_backbone
from defense.offline.comparison.judges import detect, few, halves, judge
from defense.offline.comparison.page import course, decoupling, render
from defense.offline.comparison.rows import Entry
from defense.offline.methods import METHODS
from defense.offline.progress import Silent
from defense.offline.training import read_split
from defense.types import Routed
from tests.cli import tiny_card
from tests.coloured import SETTINGS, TINY

__all__ = ["tiny_card"]  # a fixture that pytest finds here


def test_a_study_measures_every_entry_and_goes_on_where_it_stopped(
    tiny_card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = (
        Entry("activation", note="mean: the control"),
        Entry("contribution", slow=True),
        Entry("contribution", note="overlaps", class_paths=3),
    )
    monkeypatch.setattr(comparison, "ENTRIES", entries)
    monkeypatch.setattr(comparison, "PATHWAY_ROUTERS", ("generative",))
    monkeypatch.setattr(networks, "PATHWAY_IMAGES", 40)
    monkeypatch.setattr(judges, "TREES", 5)
    monkeypatch.setattr(costs, "ROUNDS", 1)
    monkeypatch.setattr(costs, "BATCHES", (1, 4))
    steps: list[int] = []

    class Bar:
        def advance(self, count: int = 1) -> None:
            steps.append(count)

    def run() -> dict[str, object]:
        return comparison.compare(
            {"plain": tiny_card},
            tiny_card.parent / "data",
            images=40,
            slow_images=20,
            cache=Cache(tmp_path / "kept"),
            progress=Bar(),
            command="pathguard compare",
        )

    result = run()
    assert sum(steps) == steps_of({"plain": tiny_card})
    found = result["rows"]
    assert isinstance(found, list)
    assert [row["router"] for row in found] == [
        "activation",
        "contribution",
        "contribution",
        "sorted softmax",
    ]
    assert [row["images"] for row in found] == [40, 20, 40, 40]
    assert all(len(row["auroc"]) == 5 for row in found)
    page = render(json.loads(json.dumps(result)))
    assert "| activation (mean: the control) | one |" in page
    assert "| contribution | more |" in page
    assert "| generative | random channels |" in page

    monkeypatch.setattr(rows, "route", lambda *_: pytest.fail("a path was taken again"))
    again = run()["rows"]
    assert isinstance(again, list)
    assert json.dumps([row["auroc"] for row in again]) == json.dumps(
        [row["auroc"] for row in found]
    )


def test_the_comparison_needs_the_plain_network(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the backbone 'plain'; name its card"):
        comparison.compare(
            {},
            tmp_path,
            images=1,
            slow_images=1,
            cache=Cache(tmp_path),
            progress=Silent(),
            command="",
        )


def test_a_backbone_that_no_row_is_measured_on_is_refused_before_any_work(tmp_path: Path) -> None:
    cards = {"plain": tmp_path / "a.json", "decopled": tmp_path / "b.json"}
    with pytest.raises(ConfigError, match=r"on a backbone 'decopled'; did you mean 'decoupled'\?"):
        comparison.compare(
            cards,
            tmp_path,
            images=1,
            slow_images=1,
            cache=Cache(tmp_path),
            progress=Silent(),
            command="",
        )


def test_what_is_kept_is_kept_for_these_weights_and_images_alone(tiny_card: Path) -> None:
    zeros, ones = torch.zeros(2, 3), torch.ones(2, 3)
    assert digest_of(tiny_card, zeros) == digest_of(tiny_card, zeros.clone())
    assert digest_of(tiny_card, zeros) != digest_of(tiny_card, ones)


def runs(count: int, gap: float) -> dict[str, Routed]:
    """Return clean runs and attacked ones whose paths lie `gap` away; every second attack wins."""
    draw = torch.Generator().manual_seed(0)
    clean = torch.randn(count, 4, generator=draw)
    attacked = torch.randn(count, 4, generator=draw) + gap
    right, wrong = torch.eye(2)[0].expand(count, 2), torch.eye(2)[1].expand(count, 2)
    won = (torch.arange(count) % 2 == 0)[:, None]
    return {
        "clean": Routed(right, clean),
        "CDRP": Routed(torch.where(won, wrong, right), attacked),
    }


def path_of(run: Routed) -> Tensor:
    return run.path


def test_what_differs_is_found_and_what_does_not_is_not() -> None:
    far, none = detect(runs(400, 5.0), path_of)["CDRP"], detect(runs(400, 0.0), path_of)["CDRP"]
    assert far["success"] == [0.5]
    for name in ("logistic", "forest"):
        assert min(far[name]) > 0.99
        assert 0.3 < np.mean(none[name]) < 0.7


def test_no_image_lies_on_both_sides_of_a_split() -> None:
    won = torch.ones(100, dtype=torch.bool)
    seen: list[set[float]] = []

    class Spy:
        def fit(self, x: np.ndarray, y: np.ndarray) -> Spy:
            seen.append(set(x.flatten()))
            return self

        def predict_proba(self, x: np.ndarray) -> np.ndarray:
            seen.append(set(x.flatten()))
            return np.zeros((len(x), 2))

    numbers = torch.arange(100.0)[:, None]
    assert judge(Spy(), numbers, numbers, won, halves(won, 0)) == 0.5
    fitted, judged = seen
    assert fitted.isdisjoint(judged)
    assert len(fitted | judged) == 100


def test_too_few_attacks_that_won_are_no_figure() -> None:
    won = torch.zeros(100, dtype=torch.bool)
    won[0] = True
    path = torch.zeros(100, 1)
    assert np.isnan(judge(None, path, path, won, halves(won, 0)))


def test_few_images_are_those_of_every_class_whose_attack_won() -> None:
    labels = torch.arange(40) % 4
    won = torch.arange(40) >= 8
    chosen = few(labels, won, 5, seed=1)
    assert labels[chosen].bincount().tolist() == [5, 5, 5, 5]
    assert bool(won[chosen].all())
    assert few(labels, won, 100, seed=1).sum() == 32


def test_a_course_shows_first_middle_and_last() -> None:
    assert course([0.1, 0.2, 0.3, 0.4]) == "0.10 → 0.30 → 0.40"
    assert course([0.5]) == "0.50"
    assert course([]) == "-"


def test_what_decoupling_saves_is_measured_and_shown(tiny_card: Path, tmp_path: Path) -> None:
    folder = tiny_card.parent
    images = read_split(folder / "data", "train")
    train_backbone(
        folder / "data",
        folder / "decoupled.safetensors",
        method=METHODS["decoupled"],
        architecture=TINY,
        settings=replace(SETTINGS, epochs=1, small_epochs=0),
        checkpoint=folder / "decoupled-checkpoint",
        command="",
        start=tiny_card,
    )
    test = read_split(folder / "data", "test")
    plain, decoupled = (
        open_backbone(
            name,
            tiny_card.parent / card,
            images,
            test,
            count=20,
            cache=Cache(tmp_path),
            progress=Silent(),
        )
        for name, card in (("plain", "tiny.json"), ("decoupled", "decoupled.json"))
    )
    found = networks.measure_decoupling(plain, decoupled)
    assert 0 < found["open_ratio"] <= 1
    assert found["effective_multiply_adds"] > 0
    assert len(found["controllers"]) == 6
    assert not decoupled.network.skip_closed
    assert "| skipping against masking, batch 1 |" in decoupling(found)
