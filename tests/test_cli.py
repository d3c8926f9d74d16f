"""The commands as a person types them: results, advice, and one sentence where something is wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from defense.archive import read_archive
from defense.artifact import load_guard
from defense.offline.data import read_images
from defense.offline.demo import digits as demo_digits
from defense.offline.demo.digits import WITNESS, DigitFolders, pack_digits, train_witness
from defense.offline.demo.digits_model import DigitsNet
from defense.trail import write_call
from tests.archives import build_archive
from tests.cli import ATTACKED, Run, archive, digits, guard, run
from tests.trails import incident, write

__all__ = ["archive", "digits", "guard", "run"]  # fixtures that pytest finds here


def test_a_guard_goes_from_fit_to_a_wrapped_archive_and_back(
    run: Run, archive: Path, guard: Path, tmp_path: Path
) -> None:
    wrapped, original = tmp_path / "store" / "digits.mar", tmp_path / "original.mar"
    wrapped.parent.mkdir()

    code, _, said = run("wrap", archive, "--guard", guard, "--out", wrapped)
    assert code == 0
    assert f"Next: pathguard serve {wrapped}" in said
    assert "will not start with the default thresholds" in said
    assert read_archive(wrapped).is_wrapped

    code, shown, _ = run("inspect", wrapped, "--json")
    facts = json.loads(shown)
    assert code == 0
    assert facts["model"] == "digits"
    assert facts["labels"] == "folders"
    assert (facts["attacks"], facts["witness"], facts["echo"]) == (["fgsm"], None, ["shift 1"])
    assert facts["thresholds"]["flag"] == "p-value <= 0.01"
    assert "needs at least 1000 calibration images" in facts["thresholds"]["reject"]

    assert run("unwrap", wrapped, "--out", original)[0] == 0
    assert original.read_bytes() == archive.read_bytes()


def test_clean_images_are_named_anew_and_nothing_is_decided_otherwise(
    run: Run, archive: Path, digits: DigitFolders, guard: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(guard, tmp_path / "copied")
    (tmp_path / "model_store").mkdir()
    served = Path(shutil.copy(archive, tmp_path / "model_store"))
    before = load_guard(copied)
    words = ("exemplars", copied, "--archive", served, "--data", digits.test, "--limit", 150)

    code, _, said = run(*words)
    after = load_guard(copied)

    assert code == 0, said
    assert before.exemplars is not None
    assert after.exemplars is not None
    assert f"{len(after.exemplars.images)} clean images are named in" in said
    assert "--out model_store/digits-guarded.mar" in said  # and not over the original
    assert after.exemplars.images != before.exemplars.images
    assert all((digits.test / image).is_file() for image in after.exemplars.images)
    assert after.calibrations.keys() == before.calibrations.keys()
    assert torch.equal(after.calibration.score, before.calibration.score)
    assert after.facts == before.facts


def test_images_of_other_classes_are_not_named(
    run: Run, archive: Path, digits: DigitFolders, guard: Path, tmp_path: Path
) -> None:
    others = tmp_path / "others"
    for name in ("cat", "dog"):
        shutil.copytree(digits.test / "3", others / name)

    code, _, said = run("exemplars", guard, "--archive", archive, "--data", others)

    assert code == 1
    assert "the guard has no class 'cat'; give images in folders" in said


def test_inspect_prints_a_table_for_people(run: Run, guard: Path) -> None:
    code, shown, _ = run("inspect", guard)

    assert code == 0
    assert "fused" in shown
    assert "layers.3#0 (16)" in shown


def test_the_same_seed_gives_the_same_artefact(
    run: Run, archive: Path, digits: DigitFolders, guard: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    words = ("--archive", archive, "--data", digits.fit, *ATTACKED)
    assert run("fit", *words, "--out", again)[0] == 0

    for name in ("guard.json", "tensors.safetensors"):
        assert (again / name).read_bytes() == (guard / name).read_bytes()


def test_relative_paths_mean_what_they_say(
    run: Run, archive: Path, digits: DigitFolders, tmp_path: Path
) -> None:
    (tmp_path / "digits.mar").write_bytes(archive.read_bytes())
    (tmp_path / "images").symlink_to(digits.fit)
    options = ("--archive", "digits.mar", "--data", "images", "--limit", 240)

    assert run("fit", *options, "--out", "guard")[0] == 0
    code, _, said = run(
        "evaluate",
        *options,
        "--guard",
        "guard",
        "--attacks",
        "fgsm",
        "--out",
        "reports/report.json",
    )

    assert (code, said.splitlines()[-1]) == (0, "Report written to reports/report.json.")
    assert (tmp_path / "reports" / "report.json").is_file()


def test_evaluate_writes_a_report_with_every_promised_key(
    run: Run, archive: Path, guard: Path, digits: DigitFolders, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    words = ("--data", digits.test, "--attacks", "fgsm", "--eps", "0.1", "--limit", 120)
    code, shown, _ = run(
        "evaluate", "--archive", archive, "--guard", guard, *words, "--out", report
    )

    found = json.loads(report.read_text())
    assert code == 0
    assert "fgsm" in shown
    assert found["clean"]["n"] == 120
    assert found["clean"]["accuracy"] > 0.9
    assert set(found["clean"]["realised_fpr"]) == {"0.05", "0.01", "0.001"}
    fgsm = found["attacks"]["fgsm"]
    assert {"eps", "n", "success_rate", "auroc", "tpr", "guarded_success_rate"} <= set(fgsm)
    assert fgsm["auroc"] > 0.9
    assert found["baselines"]["max_softmax"]["fgsm"] < fgsm["auroc"]
    assert {"seed", "versions", "fingerprint", "command"} <= set(found)


def test_a_supervised_guard_is_fitted_with_the_attacks_that_are_named(
    run: Run, archive: Path, digits: DigitFolders, tmp_path: Path
) -> None:
    words = ("--archive", archive, "--data", digits.fit, "--limit", 300, "--detector", "supervised")

    refused = run("fit", *words, "--out", tmp_path / "none")
    fitted = run("fit", *words, "--attacks", "fgsm", "--eps", "0.1", "--out", tmp_path / "guard")

    assert refused[0] == 1
    assert "name some with --attacks" in refused[2]
    assert not (tmp_path / "none").exists()
    assert fitted[0] == 0
    assert (
        json.loads((tmp_path / "guard" / "guard.json").read_text())["facts"]["attacked_images"] > 50
    )


def test_a_fit_learns_from_quick_attacks_unless_it_is_told_not_to(
    run: Run, archive: Path, digits: DigitFolders, tmp_path: Path
) -> None:
    words = ("--archive", archive, "--data", digits.fit, "--limit", 200, "--eps", "0.1")
    usual, none = (
        run("fit", *words, *more, "--out", tmp_path / f"guard-{len(more)}")
        for more in ((), ("--attacks", "none"))
    )
    assert "successful attacks (fgsm, bim), no witness" in usual[2]
    assert "no attacks, no witness" in none[2]


def test_a_witness_is_named_by_its_card_and_asked_for_in_the_guard(
    run: Run, archive: Path, digits: DigitFolders, tmp_path: Path
) -> None:
    card = tmp_path / "witness.json"
    settings = replace(WITNESS.settings, epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_digits, "WITNESS", replace(WITNESS, settings=settings))
        train_witness(digits, card, seed=0)
    words = ("--archive", archive, "--data", digits.fit, "--limit", 200, "--witness", card.name)

    refused = run("fit", *words, "--detector", "density", "--out", tmp_path / "none")
    code, _, said = run("fit", *words, "--out", tmp_path / "guard")
    shown = json.loads(run("inspect", tmp_path / "guard", "--json")[1])

    assert (refused[0], "'density' does not look at a witness" in refused[2]) == (1, True)
    assert code == 0
    assert "witness witness.json, second look by shift 1" in said
    assert shown["witness"]["card"] == "witness.json"


def test_unlabelled_images_will_do_and_the_output_says_so(
    run: Run, archive: Path, digits: DigitFolders, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, image in enumerate(sorted(digits.fit.glob("*/*.png"))[:240]):
        (flat / f"{number}.png").write_bytes(image.read_bytes())

    code, _, said = run("fit", "--archive", archive, "--data", flat, "--out", tmp_path / "guard")

    assert code == 0
    assert "labels: the network's own answers" in said


def test_doctor_says_what_it_found(run: Run, archive: Path) -> None:
    code, shown, said = run("doctor", archive)

    assert code == 0
    assert "can be guarded: DigitsNet, 7 sites" in shown
    assert "Next: pathguard fit" in said


def test_doctor_and_wrap_refuse_frozen_torchscript_in_a_clear_sentence(
    run: Run, guard: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "model.pt"
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    torch.jit.freeze(torch.jit.script(network)).save(str(weights))
    scripted = build_archive(tmp_path, serialized_file=weights, name="scripted")

    code, shown, _ = run("doctor", scripted)
    refused = run("wrap", scripted, "--guard", guard, "--out", tmp_path / "out.mar")

    assert code == 1
    assert "it calls no modules, as after torch.jit.freeze" in shown
    assert refused[0] == 1
    assert "it calls no modules, as after torch.jit.freeze" in refused[2]
    assert not (tmp_path / "out.mar").exists()


def test_a_guard_for_other_weights_is_refused_and_names_both_fingerprints(
    run: Run, guard: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    other = tmp_path / "other.mar"
    pack_digits(DigitsNet(), other)

    code, _, said = run("wrap", other, "--guard", guard, "--out", tmp_path / "out.mar")

    assert code == 1
    assert "the guard was fitted for the backbone" in said
    assert "fit a guard for these weights" in said
    assert not (tmp_path / "out.mar").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--data", "{one}"), "are of one class"),
        (("--data", "{missing}"), "there is no data at"),
        (("--data", "{empty}"), "no images under"),
        (("--detector", "densty"), "did you mean 'density'?"),
        (("--router", "activatio"), "did you mean 'activation'?"),
        (("--sites", "layers.33"), "did you mean 'layers.3'?"),
        (("--statistics", "median"), "no statistic 'median'"),
        (("--detector", "supervised", "--attacks", "pdg"), "did you mean 'pgd'?"),
        (
            ("--detector", "supervised", "--attacks", "pgd", "--eps", "8/0"),
            "is no change of a pixel",
        ),
    ],
)
def test_a_fit_that_cannot_be_done_is_one_sentence_and_leaves_nothing(
    run: Run,
    archive: Path,
    digits: DigitFolders,
    tmp_path: Path,
    words: tuple[str, ...],
    sentence: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "one" / "only").mkdir(parents=True)
    image = next(digits.fit.glob("*/*.png"))
    (tmp_path / "one" / "only" / "1.png").write_bytes(image.read_bytes())
    places = {name: tmp_path / name for name in ("one", "missing", "empty")}
    given = [word.format(**places) for word in words]
    data = () if "--data" in words else ("--data", digits.fit)

    code, _, said = run(
        "fit", "--archive", archive, *data, *given, "--out", tmp_path / "guard", "--limit", 150
    )

    assert code == 1
    assert sentence in said
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "guard").exists()


def test_a_mistake_in_the_configuration_is_one_sentence(
    run: Run, archive: Path, guard: Path, tmp_path: Path
) -> None:
    config = tmp_path / "guard.yaml"
    config.write_text("defaults: {rejekt: {target_fpr: 0.01}}")

    code, _, said = run(
        "wrap", archive, "--guard", guard, "--config", config, "--out", tmp_path / "out.mar"
    )

    assert code == 1
    assert "unknown key 'defaults.rejekt'; did you mean 'reject'?" in said


def test_a_training_writes_weights_and_their_card(
    run: Run, digits: DigitFolders, tmp_path: Path
) -> None:
    for split, folder in (("train", digits.fit), ("test", digits.test)):
        for image in sorted(folder.glob("[01]/*.png"))[::4]:
            target = tmp_path / "data" / split / image.parent.name / image.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(image.read_bytes())
    words = ("train", "--data", "data", "--out", "runs/net.safetensors")

    code, _, said = run(*words, "--epochs", 1, "--small-epochs", 1, "--batch-size", 40)
    refused = run(*words, "--epochs", 0)

    assert code == 0, said
    card = json.loads((tmp_path / "runs" / "net.json").read_text())
    assert "Accuracy on the test images" in said
    assert card["architecture"]["classes"] == 2
    assert card["command"].startswith("pathguard train --data data")
    assert (refused[0], "epochs must be above 0" in refused[2]) == (1, True)


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "fit",
        "exemplars",
        "wrap",
        "unwrap",
        "serve",
        "doctor",
        "evaluate",
        "train",
        "pack",
        "compare",
        "units",
        "attributions",
        "bench",
    ],
)
def test_every_command_teaches_with_an_example(run: Run, command: str) -> None:
    code, shown, _ = run(command, "--help")

    assert code == 0
    assert f"Example: pathguard {command}" in shown.replace("`", "")


def test_kept_payloads_are_judged_by_another_guard(
    run: Run, tmp_path: Path, archive: Path, guard: Path, digits: DigitFolders
) -> None:
    folder = tmp_path / "trail"
    (folder / "payloads").mkdir(parents=True)
    sent = [read_images(digits.test).payload(0), b"no image", None, b"\xff" * 3]
    for number, payload in enumerate(sent):
        name = f"{number}" * 32
        write(folder, [incident(number, id=name, payload=f"{name}.bin", model="digits")])
        if payload is not None:
            (folder / "payloads" / f"{name}.bin").write_bytes(payload)
    write_call(folder, "0" * 32, "false_alarm")

    calm = tmp_path / "guard.yaml"
    calm.write_text("defaults: {flag: {score: 1.0e+9}, reject: {score: 1.0e+9}, mode: off}\n")
    code, printed, said = run(
        "incidents", "replay", "--trail", "trail", "--archive", archive, "--guard", guard,
        "--config", calm,
    )  # fmt: skip

    assert code == 0, said
    rows = {line.split()[2]: line for line in printed.splitlines()[1:]}
    assert "accept" in rows["00000000"]
    assert "false_alarm" in rows["00000000"]
    assert "invalid" in rows["11111111"]
    assert "payload gone" in rows["22222222"]
    assert "1 accept, 2 invalid; 0 as they were." in said
