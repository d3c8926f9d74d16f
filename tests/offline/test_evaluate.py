"""The report: right images alone, attacks that succeed alone, and every number recomputed by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

import defense.guard
from defense.backbone import GatedBackbone
from defense.calibration import Calibration
from defense.config import ModelSettings
from defense.errors import ArtifactError, DataError
from defense.guard import Guard, Looked
from defense.looks import Extras
from defense.offline.attacks import make_attack
from defense.offline.benchmark.shifts import SHIFTS
from defense.offline.collect import collect_inputs
from defense.offline.data import ImageSet, read_images
from defense.offline.evaluate import BASELINES, evaluate, evaluation_steps, suspicion
from defense.types import Routed, Scored
from tests.conftest import TRAINED_ON, Digits
from tests.looks import ECHO, small_witness, with_extras
from tests.served import PngHandler, SmallNet, hook_count, png

COUNT, EPS = 60, 0.15


@pytest.fixture(scope="module")
def images(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """The first sixty digits that the network was not trained on, in folders 0 to 9."""
    root = tmp_path_factory.mktemp("evaluation")
    for row in range(TRAINED_ON, TRAINED_ON + COUNT):
        target = root / str(int(digits.labels[row]))
        target.mkdir(exist_ok=True)
        (target / f"{row}.png").write_bytes(png(digits.images[row]))
    return read_images(root)


@pytest.fixture(scope="module")
def tensors(digits: Digits, images: ImageSet) -> tuple[Tensor, Tensor]:
    """The same images and labels in the order of the files."""
    rows = torch.tensor([int(Path(name).stem) for name in images.names])
    return digits.images[rows], digits.labels[rows]


@pytest.fixture(scope="module")
def report(trained: SmallNet, guard: Guard, images: ImageSet) -> dict[str, Any]:
    attacks = [make_attack("fgsm", eps=EPS), make_attack("bim", eps=EPS)]
    return evaluate(
        PngHandler(trained), guard, images, attacks, seed=5, command="pathguard evaluate x"
    )


def test_the_report_is_json_with_everything_that_the_design_names(
    report: dict[str, Any], guard: Guard
) -> None:
    assert json.loads(json.dumps(report)) == report
    assert {"clean", "attacks", "baselines", "seed", "versions", "fingerprint", "command"} <= set(
        report
    )
    assert (report["seed"], report["command"]) == (5, "pathguard evaluate x")
    assert report["fingerprint"] == guard.fingerprint
    assert set(report["clean"]) >= {"n", "accuracy", "realised_fpr"}
    assert set(report["clean"]["realised_fpr"]) == {"0.05", "0.01", "0.001"}
    for row in report["attacks"].values():
        assert {"eps", "n", "success_rate", "auroc", "tpr", "guarded_success_rate"} <= set(row)
        assert set(row["tpr"]) == {"0.05", "0.01", "0.001"}
    for baseline in report["baselines"].values():
        assert set(baseline) == {"fgsm", "bim"}
    assert report["delivery"] == "PNG through the archive's preprocessing"
    assert report["calibration"] == {"n": guard.calibration.count}


def test_the_clean_part_is_that_of_all_images(
    report: dict[str, Any], trained: SmallNet, guard: Guard, tensors: tuple[Tensor, Tensor]
) -> None:
    x, y = tensors
    with guard.attach(trained) as attached, torch.inference_mode():
        p_value = attached(x).scored.p_value
    accuracy = float((trained(x).argmax(1) == y).double().mean())
    assert report["clean"]["n"] == COUNT
    assert report["clean"]["accuracy"] == pytest.approx(accuracy, abs=1e-4)
    for target, rate in report["clean"]["realised_fpr"].items():
        assert rate == pytest.approx(float((p_value <= float(target)).double().mean()), abs=1e-4)


def test_the_rows_of_an_attack_are_those_of_an_attack_made_by_hand(
    report: dict[str, Any], trained: SmallNet, guard: Guard, tensors: tuple[Tensor, Tensor]
) -> None:
    x, y = tensors
    right = trained(x).argmax(1) == y
    x, y = x[right], y[right]
    changed = make_attack("fgsm", eps=EPS).run(trained, x, y, seed=5)
    won = trained(changed).argmax(1) != y
    with GatedBackbone(trained, guard.router) as gated:
        clean, attacked = (guard.score(collect_inputs(trained, gated, z)) for z in (x, changed))
    row = report["attacks"]["fgsm"]
    truth = [0] * len(x) + [1] * int(won.sum())
    scores = torch.cat([clean.score, attacked.score[won]]).numpy()
    assert row["n"] == len(x)
    assert row["eps"] == EPS
    assert row["success_rate"] == pytest.approx(float(won.double().mean()), abs=1e-4)
    assert row["auroc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-3)
    tpr = float((attacked.p_value[won] <= 0.01).double().mean())
    assert row["tpr"]["0.01"] == pytest.approx(tpr, abs=1e-4)
    through = won & (attacked.p_value > 0.01)
    assert row["guarded_success_rate"] == pytest.approx(float(through.double().mean()), abs=1e-4)
    assert row["failed"]["n"] == int((~won).sum())
    size = float((changed - x).abs().amax((1, 2, 3)).mean())
    assert row["mean_linf"] == pytest.approx(size, abs=1e-4)


def test_noise_of_the_attacks_size_is_the_control(report: dict[str, Any]) -> None:
    control = report["controls"]["noise of fgsm's size"]
    assert control["n"] == report["attacks"]["fgsm"]["n"]
    assert set(control["fpr"]) == {"0.05", "0.01", "0.001"}


def test_the_same_seed_gives_the_same_report(
    report: dict[str, Any], trained: SmallNet, guard: Guard, images: ImageSet
) -> None:
    attacks = [make_attack("fgsm", eps=EPS), make_attack("bim", eps=EPS)]
    again = evaluate(
        PngHandler(trained), guard, images, attacks, seed=5, command="pathguard evaluate x"
    )
    assert again == report
    assert hook_count(trained) == 0


def test_without_attacks_the_report_is_about_clean_images(
    net: SmallNet, guard: Guard, images: ImageSet
) -> None:
    report = evaluate(PngHandler(net), guard, images, [], seed=0, command="")
    assert report["clean"]["n"] == COUNT
    assert report["attacks"] == report["controls"] == {}
    assert "delivery" not in report


def test_a_rate_below_what_calibration_can_promise_is_no_number(
    net: SmallNet, guard: Guard, images: ImageSet
) -> None:
    few = Calibration(guard.calibration.score[:100], guard.calibration.predicted[:100])
    report = evaluate(
        PngHandler(net), replace(guard, calibrations={"path": few}), images, [], seed=0, command=""
    )
    realised = report["clean"]["realised_fpr"]
    assert realised["0.001"] is None
    assert realised["0.01"] is not None


class Cropping(PngHandler):
    """Enlarges what it decodes and takes the middle, so that no PNG arrives as it was."""

    def decode(self, payload: object) -> Tensor:
        image = super().decode(payload)[None]
        large = torch.nn.functional.interpolate(image, (10, 10), mode="bilinear")
        return large[0, :, 1:9, 1:9]


def test_attacks_that_no_png_can_deliver_are_judged_at_the_backbones_input(
    net: SmallNet, guard: Guard, images: ImageSet
) -> None:
    attacks = [make_attack("fgsm", eps=EPS)]
    report = evaluate(Cropping(net), guard, images, attacks, seed=0, command="")
    assert report["delivery"] == "backbone input"
    assert report["attacks"]["fgsm"]["success_rate"] > 0


def test_harmless_shifts_are_controls(
    report: dict[str, Any], trained: SmallNet, guard: Guard, tensors: tuple[Tensor, Tensor]
) -> None:
    shifts = {name: row for name, row in report["controls"].items() if "level" in name}
    assert list(shifts)[:3] == ["noise level 1", "noise level 2", "blur level 1"]
    assert len(shifts) == 10
    x, y = tensors
    x = x[trained(x).argmax(1) == y]
    darker = SHIFTS["contrast"](x, 2, 5)
    with guard.attach(trained) as attached:
        hits = (attached(darker).scored.p_value <= 0.05).double().mean().item()
    found = shifts["contrast level 2"]
    assert (found["n"], found["fpr"]["0.05"]) == (len(x), pytest.approx(hits, abs=1e-4))


def test_a_guard_with_a_second_look_is_judged_as_it_is_served(
    trained: SmallNet,
    guard: Guard,
    images: ImageSet,
    tensors: tuple[Tensor, Tensor],
    digits: Digits,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    often = ModelSettings.model_validate({"second_look": {"below_p": 0.5}})
    monkeypatch.setattr(defense.guard, "ModelSettings", lambda: often)
    extras, (x, y) = Extras(small_witness(), ECHO), tensors
    with GatedBackbone(trained, guard.router) as gated:
        calibration = collect_inputs(trained, gated, digits.images[:TRAINED_ON], extras)
        clean = collect_inputs(trained, gated, x, extras)
    seeing = with_extras(guard, extras, calibration)
    attack = make_attack("fgsm", eps=EPS)
    steps = Steps()
    report = evaluate(
        PngHandler(trained), seeing, images, [attack], seed=5, command="", progress=steps
    )
    judged = seeing.judge(clean)
    again = judged.taken / COUNT
    assert 0 < again < 1
    assert report["clean"]["second_look"] == pytest.approx(again, abs=1e-4)
    assert report["clean"]["extra_passes"] == pytest.approx(3 * again, abs=1e-4)
    hits = float((judged.scored.p_value <= 0.05).double().mean())
    assert report["clean"]["realised_fpr"]["0.05"] == pytest.approx(hits, abs=1e-4)
    right = clean.predicted == y
    changed = attack.run(trained, x[right], y[right], seed=5)
    with GatedBackbone(trained, guard.router) as gated:
        attacked = seeing.judge(collect_inputs(trained, gated, changed, extras)).scored
    won = attacked.predicted != y[right]
    p = torch.cat([judged.scored.p_value[right], attacked.p_value[won]])
    truth = [0] * int(right.sum()) + [1] * int(won.sum())
    # P-values that tie are told apart by the score, which moves the area a little.
    assert report["attacks"]["fgsm"]["auroc"] == pytest.approx(roc_auc_score(truth, -p), abs=0.03)
    assert 0 < steps.done <= evaluation_steps(COUNT, 1)


class Steps:
    """Adds up how far it was advanced."""

    done = 0

    def advance(self, steps: int = 1) -> None:
        self.done += steps


def test_requests_are_ordered_by_p_value_and_where_that_ties_by_score(
    guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opinion(_self: Guard, run: Routed) -> Scored:
        return Scored(run.path[:, 1].double(), run.path[:, 0].double(), *[run.predicted] * 2)

    monkeypatch.setattr(Guard, "score", opinion)
    monkeypatch.setattr(Guard, "judge", lambda guard, run: Looked(guard.score(run)))

    def run(*pairs: tuple[float, float]) -> Routed:
        return Routed(torch.zeros(len(pairs), 2), torch.tensor(pairs))

    first, second = suspicion(guard, run((0.5, 9), (0.1, 2)), run((0.1, 1), (0.1, 2), (0.01, -3)))
    assert (first.tolist(), second.tolist()) == ([0, 2], [1, 2, 3])


def test_unlabelled_images_are_an_error(net: SmallNet, guard: Guard, images: ImageSet) -> None:
    unlabelled = ImageSet(images.root, images.names, None, ())
    with pytest.raises(
        DataError, match="evaluation needs labels and these images have none; give one"
    ):
        evaluate(PngHandler(net), guard, unlabelled, [], seed=0, command="")


def test_a_class_that_the_guard_does_not_know_is_an_error(
    net: SmallNet, guard: Guard, images: ImageSet
) -> None:
    renamed = ImageSet(images.root, images.names, images.labels, (*images.class_names[:-1], "ten"))
    folders = replace(guard, facts={"labels": "folders"})
    with pytest.raises(
        DataError, match=r"knows no class 'ten' \(its classes are 0, 1, .*as at the fit"
    ):
        evaluate(PngHandler(net), folders, renamed, [], seed=0, command="")


def test_folders_are_matched_by_the_networks_answers_where_the_guard_was_fitted_without_labels(
    net: SmallNet, guard: Guard, images: ImageSet
) -> None:
    assert images.labels is not None
    few = images.take([row for row, label in enumerate(images.labels) if label in (0, 2, 6)])
    renamed = replace(few, class_names=tuple(f"the {name}s" for name in few.class_names))
    unnamed = replace(guard, facts={"labels": "the network's own answers"})
    found = evaluate(PngHandler(net), unnamed, renamed, [], seed=0, command="")
    assert found == evaluate(PngHandler(net), guard, few, [], seed=0, command="")
    assert found["clean"]["accuracy"] > 0.8


def test_a_network_that_gets_nothing_right_cannot_be_attacked(
    net: SmallNet, guard: Guard, images: ImageSet
) -> None:
    assert images.labels is not None
    wrong = tuple((label + 1) % 10 for label in images.labels)
    hard = ImageSet(images.root, images.names, wrong, images.class_names)
    rows = [
        i for i, p in enumerate(images.payloads(range(COUNT))) if _right(net, p, images.labels[i])
    ]
    with pytest.raises(DataError, match="gets none of these images right; nothing to attack"):
        evaluate(
            PngHandler(net),
            guard,
            hard.take(rows),
            [make_attack("fgsm", eps=EPS)],
            seed=0,
            command="",
        )


def _right(net: SmallNet, payload: bytes, label: int) -> bool:
    (answer,) = PngHandler(net).answer([payload])
    assert isinstance(answer, dict)
    return bool(answer["class"] == label)


def test_a_guard_for_other_weights_is_refused(
    net: SmallNet, guard: Guard, images: ImageSet
) -> None:
    net.head.bias[0] += 1
    with pytest.raises(ArtifactError, match="was fitted for the backbone"):
        evaluate(PngHandler(net), guard, images, [], seed=0, command="")


def test_baselines_call_a_hesitant_answer_more_suspicious_than_a_sure_one() -> None:
    run = Routed(torch.tensor([[9.0, 0.0, 0.0], [1.0, 0.9, 0.0]]), torch.zeros(2, 1))
    for baseline in BASELINES.values():
        sure, hesitant = baseline(run).tolist()
        assert sure < hesitant
    softmax = np.exp(9) / (np.exp(9) + 2)
    assert BASELINES["max_softmax"](run)[0].item() == pytest.approx(-softmax)
    assert BASELINES["margin"](run)[1].item() == pytest.approx(-0.1)
