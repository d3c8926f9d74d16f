"""A guard is a folder of JSON and safetensors; what is wrong with one is said before it is used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from defense import artifact
from defense.artifact import JSON_NAME, SCHEMA, TENSORS_NAME, load_guard, save_guard
from defense.errors import ArtifactError, CalibrationError, ConfigError
from defense.guard import Guard
from defense.looks import Extras
from defense.types import Routed
from tests.conftest import Digits
from tests.looks import ECHO, shown, small_witness, with_extras
from tests.served import SmallNet, images_like_noise


@pytest.fixture
def folder(guard: Guard, tmp_path: Path) -> Path:
    save_guard(guard, tmp_path / "guard")
    return tmp_path / "guard"


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the description of a guard in place."""
    path = folder / JSON_NAME
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_guard_that_was_saved_scores_as_before(
    guard: Guard, folder: Path, trained: SmallNet, digits: Digits
) -> None:
    again = load_guard(folder)
    assert again.facts == guard.facts
    assert (again.fingerprint, again.class_names, again.inputs, again.router) == (
        guard.fingerprint,
        guard.class_names,
        guard.inputs,
        guard.router,
    )
    with guard.attach(trained) as first, torch.inference_mode():
        expected = first(digits.images[:50])
    with again.attach(trained) as second, torch.inference_mode():
        found = second(digits.images[:50])
    torch.testing.assert_close(found.scored.score, expected.scored.score, rtol=1e-5, atol=1e-7)
    assert found.verdicts == expected.verdicts
    assert torch.equal(again.calibration.score, guard.calibration.score)
    assert torch.equal(again.calibration.predicted, guard.calibration.predicted)


def test_a_guard_is_two_files_and_saving_is_reproducible(guard: Guard, tmp_path: Path) -> None:
    save_guard(guard, tmp_path / "a")
    save_guard(guard, tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [JSON_NAME, TENSORS_NAME]
    for name in (JSON_NAME, TENSORS_NAME):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_the_description_says_what_the_design_promises(guard: Guard, folder: Path) -> None:
    document = json.loads((folder / JSON_NAME).read_text())
    assert document["schema"] == SCHEMA
    assert document["fingerprint"] == guard.fingerprint
    assert document["detector"]["name"] == "density"
    assert document["router"]["name"] == "activation"
    assert document["router"]["fitted"]["layout"]["sites"][0]["module"] == "act"
    assert document["inputs"] == {
        "shape": [1, 8, 8],
        "dtype": "float32",
        "views": {"number": 1, "grouped": True},
    }
    tensors = (folder / TENSORS_NAME).read_bytes()
    assert document["tensors_sha256"] == hashlib.sha256(tensors).hexdigest()
    assert torch.equal(
        load_file(folder / TENSORS_NAME)["calibrations.path.score"], guard.calibration.score
    )


def test_saving_replaces_an_earlier_guard(guard: Guard, folder: Path) -> None:
    (folder / "left_over").write_text("x")
    save_guard(guard, folder)
    assert not (folder / "left_over").exists()
    assert load_guard(folder).fingerprint == guard.fingerprint


def test_saving_into_an_empty_folder_makes_it_the_guard(guard: Guard, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    save_guard(guard, tmp_path / "new")
    assert load_guard(tmp_path / "new").fingerprint == guard.fingerprint


def test_a_folder_of_something_else_is_not_overwritten(guard: Guard, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(
        ArtifactError, match="exists and holds no guard; name an empty or a new folder"
    ):
        save_guard(guard, tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("name", ["file", "file/guard"])
def test_a_place_that_cannot_be_written_to_is_named(
    guard: Guard, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match=r"cannot write the guard to .*; name another folder"):
        save_guard(guard, tmp_path / name)
    assert (tmp_path / "file").read_text() == "x"


def test_a_save_that_fails_half_way_leaves_the_earlier_guard(
    guard: Guard, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        save_guard(guard, folder)
    monkeypatch.undo()
    assert load_guard(folder).fingerprint == guard.fingerprint
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"cannot read .*guard\.json: No such file or directory"
    ):
        load_guard(tmp_path)


def test_a_missing_tensor_file_is_an_error(folder: Path) -> None:
    (folder / TENSORS_NAME).unlink()
    with pytest.raises(ArtifactError, match=r"cannot read .*tensors\.safetensors: No such file"):
        load_guard(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_description_that_is_no_json_is_an_error(folder: Path, content: bytes) -> None:
    (folder / JSON_NAME).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"guard\.json is not JSON; fit the guard again"):
        load_guard(folder)


def test_a_description_that_is_no_object_is_an_error(folder: Path) -> None:
    (folder / JSON_NAME).write_text("[]")
    with pytest.raises(ArtifactError, match=r"guard\.json holds no object; fit the guard again"):
        load_guard(folder)


@pytest.mark.parametrize("schema", [SCHEMA + 1, None, "1"])
def test_a_guard_of_another_schema_is_refused(folder: Path, schema: object) -> None:
    edit(folder, lambda d: d.update(schema=schema))
    with pytest.raises(ArtifactError, match=rf"has schema {schema!r}; this version reads {SCHEMA}"):
        load_guard(folder)


def test_one_changed_byte_among_the_tensors_is_found_before_they_are_read(folder: Path) -> None:
    path = folder / TENSORS_NAME
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(
        ArtifactError, match=r"is not the file that guard\.json names \(its SHA-256 differs"
    ):
        load_guard(folder)


def test_a_pickle_in_the_place_of_the_tensors_is_never_loaded(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (pytest.fail, ("a pickle was loaded",))

    payload = pickle.dumps(Bomb())
    (folder / TENSORS_NAME).write_bytes(payload)
    edit(folder, lambda d: d.update(tensors_sha256=hashlib.sha256(payload).hexdigest()))
    with pytest.raises(ArtifactError, match=r"is damaged \(SafetensorError"):
        load_guard(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("fingerprint"),
        lambda d: d.pop("calibrations"),
        lambda d: d.update(calibrations=[]),
        lambda d: d.pop("witness"),
        lambda d: d.update(inputs={"shape": ["x"], "dtype": "float32"}),
        lambda d: d.update(inputs=[]),
        lambda d: d.update(facts=3),
        lambda d: d.update(router=None),
        lambda d: d.update(class_names=3),
    ],
)
def test_a_description_with_a_part_missing_or_wrong_is_damaged(
    folder: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edit(folder, change)
    with pytest.raises(ArtifactError, match=r"the guard in .* is damaged \(.*\); fit it again"):
        load_guard(folder)


def test_an_unknown_input_type_is_an_error(folder: Path) -> None:
    edit(folder, lambda d: d["inputs"].update(dtype="save"))
    with pytest.raises(ArtifactError, match="names the unknown input type 'save'; fit it again"):
        load_guard(folder)


def test_a_detector_or_router_that_this_version_lacks_is_named(folder: Path) -> None:
    edit(folder, lambda d: d["detector"].update(name="densty"))
    with pytest.raises(ConfigError, match=r"no detector 'densty'; did you mean 'density'\?"):
        load_guard(folder)
    edit(folder, lambda d: d["router"].update(name="activatoin"))
    with pytest.raises(ConfigError, match=r"no router 'activatoin'; did you mean 'activation'\?"):
        load_guard(folder)


def test_a_calibration_whose_parts_do_not_belong_together_is_refused(folder: Path) -> None:
    other = {"tensor": "detector.usual.center"}
    edit(folder, lambda d: d["calibrations"]["path"].update(predicted=other))
    with pytest.raises(CalibrationError, match="expected one of each per image"):
        load_guard(folder)


@pytest.mark.parametrize("name", [JSON_NAME, TENSORS_NAME])
def test_a_link_is_not_followed(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        ArtifactError, match=rf"{re.escape(name)} is no plain file or over \d+ bytes"
    ):
        load_guard(folder)


def test_a_file_that_is_far_too_large_is_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "MAX_TENSOR_BYTES", 10)
    with pytest.raises(
        ArtifactError, match="safetensors is no plain file or over 10 bytes; expected"
    ):
        load_guard(folder)


@pytest.fixture
def seeing(guard: Guard) -> Guard:
    """A guard with a witness, an echo and a calibration per look; its detector is a density."""
    extras = Extras(small_witness(torch.float16), ECHO)
    run = shown(Routed(torch.eye(10), torch.zeros(10, guard.router.layout.length)))
    found = with_extras(guard, extras, run)
    return dataclasses.replace(found, detector=guard.detector)


def test_a_witness_an_echo_and_every_looks_calibration_come_back(
    seeing: Guard, tmp_path: Path
) -> None:
    save_guard(seeing, tmp_path / "guard")
    again = load_guard(tmp_path / "guard")
    assert again.echo == seeing.echo
    assert list(again.calibrations) == sorted(seeing.calibrations)
    for look, calibration in again.calibrations.items():
        assert torch.equal(calibration.score, seeing.calibrations[look].score)
    images = images_like_noise(2, 0)
    assert again.witness is not None
    assert seeing.witness is not None
    assert again.witness.stem.weight.dtype == torch.float16
    assert torch.equal(again.witness.logits(images), seeing.witness.logits(images))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d["witness"]["stem"].update(weight={"tensor": "x"}), "lacks the tensor that"),
        (lambda d: d["witness"].pop("side"), "describes Witness with"),
        (lambda d: d["echo"]["perturbations"][0].update(kind="nois"), "no perturbation 'nois'"),
        (lambda d: d.update(echo=None), "is calibrated with echoes and has none; fit it again"),
        (lambda d: d.update(witness=None), "is calibrated with witness and has none; fit it"),
        (lambda d: d["calibrations"].update(past={}), "expected"),
        (lambda d: d.update(calibrations={}), r"for the looks \[\]; expected one or more of path"),
        (lambda d: d["class_names"].pop(), "tells 10 classes apart and the guard 9; fit it again"),
    ],
)
def test_a_witness_or_an_echo_that_was_tampered_with_is_an_error(
    seeing: Guard, tmp_path: Path, change: Callable[[dict[str, Any]], object], sentence: str
) -> None:
    save_guard(seeing, tmp_path / "guard")
    edit(tmp_path / "guard", change)
    with pytest.raises((ArtifactError, ConfigError), match=sentence):
        load_guard(tmp_path / "guard")


def test_a_guard_of_the_schema_before_still_loads(guard: Guard, folder: Path) -> None:
    def older(document: dict[str, Any]) -> None:
        document["schema"] = 1
        document["calibration"] = document.pop("calibrations")["path"]
        del document["witness"], document["echo"], document["nearness"]

    edit(folder, older)
    again = load_guard(folder)
    assert torch.equal(again.calibration.score, guard.calibration.score)
    assert (again.witness, again.echo, again.nearness) == (None, None, None)


def test_a_guard_from_before_there_was_a_memory_still_loads(seeing: Guard, tmp_path: Path) -> None:
    def older(document: dict[str, Any]) -> None:
        document["schema"] = 2
        del document["nearness"]

    save_guard(seeing, tmp_path / "guard")
    edit(tmp_path / "guard", older)
    again = load_guard(tmp_path / "guard")
    assert again.nearness is None
    assert again.witness is not None
