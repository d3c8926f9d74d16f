"""What hardening buys: measures against closed forms, guards on the benchmark's splits, one table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from defense.errors import ArtifactError, ConfigError
from defense.offline.attacks import Attack, make_attack
from defense.offline.benchmark.splits import make_split
from defense.offline.benchmark.store import Store
from defense.offline.benchmark.subject import Subject
from defense.offline.comparison.backbones import OnPixels
from defense.offline.data import ImageSet
from defense.offline.hardening import withstand as measures
from defense.offline.hardening.detection import detection, prepare
from defense.offline.hardening.recipe import Recipe
from defense.offline.hardening.table import by_descent, read_rows, render, write_rows
from defense.offline.hardening.withstand import Trial, autoattack, pgd_50, withstand
from defense.offline.methods import METHODS
from defense.offline.methods.consistent import ConsistentObjective
from defense.offline.networks import Architecture, Network, Normalisation
from defense.offline.progress import Silent
from tests.cli import Run, run
from tests.coloured import write_folder
from tests.offline.conftest import shrink
from tests.offline.studied import COUNT, rows_run, serve, studied, weak_images

__all__ = ["run"]  # a fixture that pytest finds here

GAPS = (2, 10, 30)
"""By how many levels an image's class is brighter: too little for any attack, for 8/255, enough."""


def test_the_recipe_is_that_of_the_shipped_witness_until_something_is_asked_for() -> None:
    assert Recipe().method() == METHODS["consistent"]
    asked = Recipe(inner="pgd", eps=16 / 255, epochs=2, learning_rate=0.05, seed=4).method()
    usual = METHODS["consistent"]
    assert asked.objective == ConsistentObjective(eps=64 / 255, steps=3)
    assert asked.settings == replace(usual.settings, epochs=2, learning_rate=0.05, seed=4)
    assert (asked.network, asked.half) == (usual.network, usual.half)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"inner": "pdg"}, "no inner attack 'pdg'; did you mean 'pgd'.*; give fgsm or pgd"),
        ({"steps": 3}, "the inner attack fgsm has one step, not 3; take pgd for more"),
    ],
)
def test_inner_attacks_that_there_are_none_of_are_refused(
    wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**wrong)


class Brightest(Network):
    """Answers the channel that is brightest on average: every robust accuracy is known."""

    def __init__(self) -> None:
        super().__init__(Architecture())
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(3)[:, :, None, None])
            self.head.weight.copy_(torch.eye(3) * 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.pool(self.relu(self.conv(x))).flatten(1))
        return out


@pytest.fixture
def brightest() -> OnPixels:
    network = Brightest().eval().requires_grad_(False)
    return OnPixels(network, Normalisation((0.0,) * 3, (1.0,) * 3))


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    """Even images, a third of them of each gap, and one that no network of brightness gets right."""
    labels = torch.arange(90) % 3
    pixels = torch.full((90, 3, 4, 4), 120.0)
    pixels[torch.arange(90), labels] += torch.tensor(GAPS).repeat_interleave(30)[:, None, None]
    pixels[0, (labels[0] + 1) % 3] += 50
    return Trial(
        pixels=pixels / 255,
        labels=labels,
        eps=(2 / 255, 8 / 255),
        seed=0,
        store=Store(tmp_path / "kept", "brightest"),
        progress=Silent(),
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put ten steps in the place of AutoAttack, which asks 5000 times."""

    def attack(eps: float) -> Attack:
        return replace(make_attack("apgd", eps=eps), name=autoattack(eps).name)

    monkeypatch.setattr(measures, "autoattack", attack)


def test_a_network_withstands_the_share_of_attacks_that_its_margins_say(
    brightest: OnPixels, trial: Trial, quick: None
) -> None:
    found = withstand("brightest", brightest, trial)
    assert found["n"] == 90
    assert found["clean"]["mean"] == pytest.approx(89 / 90)
    shares = {name: robust["mean"] for name, robust in found["robust"].items()}
    assert shares == pytest.approx(
        # A radius moves the own channel down and another up: a gap withstands below half of it.
        {"pgd50_2": 60 / 90, "pgd50_8": 30 / 90, "autoattack_8": 30 / 90}
    )
    assert found["clean"]["low"] < 89 / 90 < found["clean"]["high"]
    json.dumps(found, allow_nan=False)


def test_features_are_compared_with_class_means_as_the_formulas_say(
    brightest: OnPixels, trial: Trial, quick: None
) -> None:
    found = withstand("brightest", brightest, trial)["units"]["consistency"]
    right = torch.arange(1, 90)
    changed = trial.attacked(pgd_50(8 / 255), brightest, right)
    features, clean = (x.double().mean((2, 3)).numpy() for x in (changed, trial.pixels))
    labels = trial.labels.numpy()
    centres = np.stack([clean[labels == c].mean(0) for c in range(3)])
    own = labels[1:]
    answered = features.argmax(1)
    won = np.flatnonzero(answered != own)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        return float(((a * b).sum(1) / norms).mean())

    rows, true, target = features[won], centres[own[won]], centres[answered[won]]
    far = [np.linalg.norm(rows - centre, axis=1) for centre in (true, target)]
    assert found["images"] == len(won) == 59
    assert found["true"] == pytest.approx(cosine(rows, true), abs=1e-5)
    assert found["target"] == pytest.approx(cosine(rows, target), abs=1e-5)
    assert found["ratio"] == pytest.approx(float((far[0] / far[1]).mean()), rel=1e-3)
    assert found["ratio"] > 1


def test_autoattack_is_tried_on_what_pgd_left_and_a_network_without_a_right_answer_is_not_attacked(
    brightest: OnPixels, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def brighter(images: Tensor, labels: Tensor) -> Tensor:
        seen.append(len(images))
        turned = images.clone()
        turned[:, :, :, :] = nn.functional.one_hot((labels + 1) % 3, 3)[:, :, None, None].float()
        return torch.where(labels[:, None, None, None] == 0, turned, images)

    attack = Attack("autoattack_8", None, lambda _model: brighter, norm="l2")
    monkeypatch.setattr(measures, "autoattack", lambda _eps: attack)
    found = withstand("brightest", brightest, trial)["robust"]
    assert sum(seen) == 30
    assert found["autoattack_8"]["mean"] == pytest.approx(20 / 90)
    wrong = replace(trial, labels=(trial.labels + 1) % 3, store=replace(trial.store, about="wrong"))
    assert withstand("wrong", brightest, wrong)["robust"]["autoattack_8"]["mean"] <= 1 / 90
    assert sum(seen) <= 31


def test_what_was_attacked_is_not_attacked_again_by_another_run(
    brightest: OnPixels, trial: Trial, quick: None
) -> None:
    first = withstand("brightest", brightest, trial)
    with rows_run(brightest.network) as sizes:
        again = withstand("brightest", brightest, trial)
    assert again == first
    assert sum(sizes) < 50 * 90, "PGD-50 alone takes as many rows"


def test_pgd_takes_fifty_steps_and_autoattack_goes_by_its_radius(
    brightest: OnPixels, trial: Trial
) -> None:
    with rows_run(brightest.network) as sizes:
        changed = pgd_50(8 / 255).run(brightest, trial.pixels[:2], trial.labels[:2], seed=0)
    assert sizes == [2] * 51
    assert float((changed - trial.pixels[:2]).abs().max()) <= 8 / 255 + 1e-6


def test_autoattack_asks_on_where_gradients_find_nothing_and_stays_in_its_ball(
    brightest: OnPixels, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "QUERIES", 20)
    attack = autoattack(6 / 255)
    assert (attack.name, attack.eps) == ("autoattack_6", 6 / 255)
    few = torch.tensor(
        [30, 33, 60, 63]
    )  # of the gap that 6/255 closes, and of the one that it does not
    with rows_run(brightest.network) as sizes:
        changed = attack.run(brightest, trial.pixels[few], trial.labels[few], seed=0)
    assert float((changed - trial.pixels[few]).abs().max()) <= 6 / 255 + 1e-6
    won = brightest.answers(changed).argmax(1) != trial.labels[few]
    assert won.tolist() == [True, True, False, False]
    assert sizes[0] == 1
    assert sizes[-20:] == [2] * 20, "the last ones are queries about what is left"


@pytest.fixture
def subject(
    weak_card: Path, weak_set: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Subject]:
    shrink(monkeypatch)
    with studied(serve(weak_card), weak_set, tmp_path / "kept", weak_card) as opened:
        yield opened


SEALED = torch.arange(COUNT) % 5 == 0


def test_no_sealed_image_is_attacked_learnt_from_or_judged(subject: Subject) -> None:
    material = prepare(subject, SEALED, [make_attack("fgsm_8")], 40)
    split = make_split(material.pools, 0)
    used = [
        *split.parts().values(),
        *(kind.rows for kind in material.harmless.values()),
        *(assault.rows for assault in material.open.assaults.values()),
    ]
    assert not bool(SEALED[torch.cat(used)].any())
    assert len(material.open.assaults["fgsm_8"].rows) == 40
    assert not material.sealed.assaults
    assert bool(subject.right[material.open.assaults["fgsm_8"].rows].all())


def test_guards_are_judged_whole_and_in_parts(subject: Subject) -> None:
    found = detection(subject, SEALED, [make_attack("fgsm_8")], count=60, seeds=(0,))
    assert list(found) == ["pathguard", "path alone", "witness alone"]
    for told in found.values():
        assert 0 <= told["seen"]["fgsm_8"]["auroc"]["mean"] <= 1
        assert told["summary"]["seen"]["mean"]["mean"] == pytest.approx(
            told["seen"]["fgsm_8"]["auroc"]["mean"]
        )


def test_without_a_witness_none_is_judged(
    weak_card: Path, weak_set: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    with studied(serve(weak_card), weak_set, tmp_path) as opened:
        found = detection(opened, SEALED, [make_attack("fgsm_8")], count=60, seeds=(0,))
    assert list(found) == ["pathguard", "path alone"]


def spread(mean: float) -> dict[str, float]:
    return {"mean": mean, "sd": 0.0, "low": mean - 0.01, "high": mean + 0.01}


def row(name: str, clean: float = 0.9, **changed: Any) -> dict[str, Any]:
    """Return a made-up row of the table."""
    units = {"consistency": None, "selectivity": 0.31, "last_selectivity": 0.71}
    cell = {"n": 40, "auroc": spread(0.93), "tpr": {"0.01": spread(0.42)}}
    seen = {"mean": spread(0.93), "tpr_1": spread(0.42)}
    return {
        "name": name,
        "role": "backbone",
        "beside": None,
        "made_by": "plain",
        "weights": f"digest of {name}",
        "started_from": None,
        "witness": None,
        "fingerprint": "f00",
        "network": {
            "n": 500,
            "clean": spread(clean),
            "robust": {"pgd50_8": spread(0.25), "autoattack_8": spread(0.2)},
            "units": units,
        },
        "attacks": ["fgsm_8", "patch"],
        "guard_images": 500,
        "guard_seeds": [0, 1],
        "detection": {
            "pathguard": {
                "seen": {"fgsm_8": cell},
                "summary": {"seen": seen, "realised_fpr_1": spread(0.011)},
            }
        },
        "seed": 0,
        "threads": 2,
        "versions": {"torch": "2"},
        "command": "pathguard harden",
    } | changed


def test_a_row_takes_the_place_of_the_older_one_of_the_same_network(tmp_path: Path) -> None:
    write_rows(tmp_path, [row("one"), row("two")])
    write_rows(tmp_path, [row("one", 0.8)])
    write_rows(tmp_path, [row("one", 0.7, role="witness", beside="two")])
    rows = read_rows(tmp_path / "hardening.json")
    assert [(r["name"], r["role"], r["network"]["clean"]["mean"]) for r in rows] == [
        ("one", "backbone", 0.8),
        ("two", "backbone", 0.9),
        ("one", "witness", 0.7),
    ]
    assert (tmp_path / "hardening.md").read_text() == render(rows)


def test_below_a_network_stands_what_was_made_of_it_whenever_it_was_measured() -> None:
    child = row("child", started_from="digest of one")
    grandchild = row("grandchild", started_from="digest of child", role="witness", beside="one")
    lost = row("lost", started_from="digest of nobody")
    rows = [child, row("two"), grandchild, row("one"), lost]

    assert [one["name"] for one in by_descent(rows)] == [
        *("two", "one", "child", "grandchild", "lost"),
    ]


def test_the_page_shows_every_figure_and_a_dash_for_what_was_not_measured() -> None:
    page = render([row("one"), row("two", role="witness", beside="one", detection={})])
    table = page.split("\n\n")[1].splitlines()
    head, _, one, two = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table)
    found, other = (dict(zip(head, line, strict=True)) for line in (one, two))
    assert found["PGD-50 8/255"] == "25.0 % (24.0 % to 26.0 %)"
    assert found["guard: AUROC"] == "0.930 (0.920 to 0.940)"
    assert found["cosine, own"] == other["guard: AUROC"] == "-"
    assert (found["role"], other["role"]) == ("backbone", "witness of one")
    assert "| one | pathguard | 0.930, 42% of 40 | - | 0.930, 42% |" in page
    assert "digest of two" in page


@pytest.mark.parametrize("content", ["no table", "[]", '{"rows": [{"name": "x"}]}'])
def test_a_file_that_is_no_table_is_not_written_over(tmp_path: Path, content: str) -> None:
    path = tmp_path / "hardening.json"
    path.write_text(content)
    with pytest.raises(ArtifactError, match=r"no table of hardening .*; move it away to begin"):
        write_rows(tmp_path, [row("one")])
    assert path.read_text() == content


@pytest.fixture
def images(weak_card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Training images that the weak network knows, and enough test images for a study."""
    shrink(monkeypatch)
    folder = tmp_path / "images"
    (folder).mkdir()
    (folder / "train").symlink_to(weak_card.parent / "data" / "train")
    write_folder(folder, "test", weak_images(COUNT, seed=3))
    return folder


def test_a_witness_is_hardened_and_both_networks_become_rows(
    run: Run, quick: None, weak_card: Path, images: Path, tmp_path: Path
) -> None:
    common = ("harden", "--data", images, "--start", weak_card, "--beside", weak_card)
    asked = (*common, "--inner", "pgd", "--steps", 2, "--eps", "4/255", "--epochs", 1)
    words = (*asked, "--small-epochs", 0, "--rate", 0.01, "--batch-size", 50, "--attacks", "fgsm_8")
    limits = ("--images", 100, "--radii", "1/255", "--tables", "told", "--kept", "kept")
    code, _, said = run(*words, *limits, "--out", "hard/weak-hard.safetensors")
    assert code == 0, said
    assert "Table written to told/hardening.md" in said
    card = json.loads((tmp_path / "hard/weak-hard.json").read_text())
    assert card["objective"]["steps"] == 2
    assert card["command"].startswith("pathguard harden --data")
    assert card["started_from"] == json.loads(weak_card.read_text())["sha256"]
    before, after = json.loads((tmp_path / "told/hardening.json").read_text())["rows"]
    assert (before["name"], after["name"]) == ("weak", "weak-hard")
    assert after["role"] == "witness"
    assert after["witness"] == after["weights"] == card["sha256"] != before["weights"]
    assert after["fingerprint"] == before["fingerprint"]
    assert list(after["detection"]) == ["pathguard", "path alone", "witness alone"]
    path_alone = [each["detection"]["path alone"]["seen"] for each in (before, after)]
    assert path_alone[0] == path_alone[1], "the guarded network is the same one"
    assert (
        "consistent, PGD-2 up to 4/255, 1 epochs at 0.01"
        in (tmp_path / "told/hardening.md").read_text()
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--beside", "CARD", "--witness", "CARD"), "leave one of them out"),
        (("--out", "SAME"), "would write over the network that training goes on from"),
        (("--attacks", "fgsm"), "attack 'fgsm' needs a size"),
        (("--start", "nowhere.json"), "cannot be read"),
        (("--eps", "8"), "is no change of a pixel"),
        (("--inner", "pgd", "--steps", "0"), "an attacked twin takes at least 1 step, got 0"),
    ],
)
def test_what_could_only_fail_after_the_training_fails_before(
    run: Run, weak_card: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    known = {"CARD": weak_card, "SAME": weak_card.with_suffix(".safetensors")}
    given = ("--start", weak_card, "--out", "x.safetensors")
    data = weak_card.parent / "data"
    code, _, said = run("harden", "--data", data, *given, *(known.get(w, w) for w in words))
    assert code == 1
    assert message in said
    assert not list(tmp_path.iterdir())


def test_more_images_than_there_are_is_told(
    run: Run, quick: None, weak_card: Path, images: Path
) -> None:
    words = ("harden", "--data", images, "--start", weak_card, "--out", "x.safetensors")
    code, _, said = run(*words, "--images", 200)
    assert code == 1
    assert "there are 108 test images to attack, and 200 were asked for" in said
