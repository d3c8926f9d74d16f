"""What config.properties says of versions, folders and tars, envelopes and requirements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from defense.archive import MANIFEST
from defense.errors import ServerError
from defense.folders import pack_tar
from handlers.torchserve_settings import (
    ServedModel,
    ServerSettings,
    render_properties,
    stored_models,
)


def archive(folder: Path, version: str) -> Path:
    (folder / "MAR-INF").mkdir(parents=True)
    model = {"modelName": "m", "modelVersion": version, "handler": "h"}
    (folder / MANIFEST).write_text(json.dumps({"runtime": "python", "model": model}))
    return folder


def properties(settings: ServerSettings) -> dict[str, str]:
    lines = [line for line in render_properties(settings).splitlines() if "=" in line]
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def test_versions_of_one_model_are_loaded_side_by_side(tmp_path: Path) -> None:
    pack_tar(archive(tmp_path / "two", "2.0"), tmp_path / "two.tar.gz", "m")
    settings = ServerSettings(
        models=(
            ServedModel("m", archive(tmp_path / "one", "1.0"), batch_size=3),
            ServedModel("m", tmp_path / "two.tar.gz"),
            ServedModel("alone", archive(tmp_path / "alone", "1.0")),
        )
    )
    found = properties(settings)
    assert found["load_models"] == "m=m-1.0,m=m-2.0.tar.gz,alone=alone"
    models = json.loads(found["models"])
    assert list(models["m"]) == ["1.0", "2.0"]
    assert [models["m"][version]["defaultVersion"] for version in models["m"]] == [True, False]
    assert models["m"]["1.0"]["batchSize"] == 3
    assert models["m"]["2.0"]["marName"] == "m-2.0.tar.gz"


def test_two_archives_of_one_version_are_refused(tmp_path: Path) -> None:
    models = tuple(ServedModel("m", archive(tmp_path / name, "1.0")) for name in "ab")
    with pytest.raises(ServerError, match=r"hold version 1\.0 of the model 'm'; give one of them"):
        stored_models(ServerSettings(models=models))


def test_envelopes_and_requirements_are_asked_for_on_purpose() -> None:
    plain = properties(ServerSettings())
    assert "service_envelope" not in plain
    assert plain["install_py_dep_per_model"] == "false"
    asked = properties(ServerSettings(service_envelope="kserve", install_requirements=True))
    assert asked["service_envelope"] == "kserve"
    assert asked["install_py_dep_per_model"] == "true"
