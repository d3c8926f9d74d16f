"""Explanations of one request, refused ones included: what they hold, and what is left out and said."""

from __future__ import annotations

import base64
import io
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from defense.attributions import METHODS
from defense.config import ATTRIBUTIONS, Explanations, ModelSettings, Probing, TierRule
from defense.errors import ConfigError, GuardFailure, SiteError
from defense.explain import (
    GRID,
    Explained,
    Explainer,
    UnknownClass,
    class_index,
    heat_map,
    pictured,
)
from defense.gate import Gate
from defense.guard import Guard
from defense.payload import InvalidReason
from defense.types import Verdict
from tests.conftest import Counts
from tests.served import PngHandler, SmallNet, hook_count, images_like_noise, png

KEY = "a secret of more than sixteen bytes"
REJECT_ALL = ModelSettings(reject=TierRule(score=-1e9))
ENOUGH = 1e6
Clean = Callable[[int], Tensor]


@pytest.fixture
def wanted(tmp_path: Path) -> Explanations:
    (tmp_path / "key").write_text(KEY)
    return Explanations(key_file=tmp_path / "key", method="saliency", budget_ms=600_000)


@pytest.fixture
def gate(guard: Guard, trained: SmallNet, counts: Counts) -> Iterator[Gate]:
    """A gate that rejects all."""
    with guard.attach(trained, REJECT_ALL) as attached:
        yield Gate(attached, REJECT_ALL, counts.metrics)


def explain(
    gate: Gate,
    wanted: Explanations,
    counts: Counts,
    payload: bytes,
    *,
    about: str | None = None,
    age: float = 0.0,
) -> Explained:
    handler = PngHandler(gate.attached.backbone.model)
    return Explainer(wanted, counts.metrics).explain(
        gate,
        payload,
        lambda _: handler.answer([payload]),
        about=about,
        started=time.monotonic() - age,
    )


def document(found: Explained) -> dict[str, Any]:
    assert found.document is not None
    assert json.loads(json.dumps(found.document, allow_nan=False)) == found.document
    return found.document


def results(counts: Counts) -> dict[str, float]:
    """Return the explanations counted so far by result, zeros left out."""
    kinds = ("given", "too_large", "out_of_time", "failed", "invalid", "wrong_key")
    found = {kind: counts.value("explanations_total", result=kind) for kind in kinds}
    return {kind: count for kind, count in found.items() if count}


def test_a_rejected_request_is_explained_in_full(
    gate: Gate, wanted: Explanations, counts: Counts, clean: Clean, trained: SmallNet
) -> None:
    image = clean(1)[0]
    found = document(explain(gate, wanted, counts, png(image)))

    predicted = str(int(trained(image[None]).argmax()))
    assert found["verdict"] == "reject"
    assert 0 < found["p_value"] <= 1
    assert found["reasons"]["predicted"] == predicted
    assert len(found["reasons"]["sites"]) == 3
    assert len(found["influential"]) == 5
    assert found["influential"][0]["difference"] > 0
    near = found["reasons"]["nearest_clean"]
    assert [n["distance"] for n in near] == sorted(n["distance"] for n in near)
    assert {n["class"] for n in found["reasons"]["nearest_predicted"]} == {predicted}
    assert found["reasons"]["pathway"] is None  # this guard's router knows none
    assert found["left_out"] == {}
    assert found["attribution"]["class"] == predicted
    assert results(counts) == {"given": 1}


def test_the_attribution_is_that_of_the_input_as_the_backbone_saw_it(
    gate: Gate, wanted: Explanations, counts: Counts, clean: Clean, trained: SmallNet
) -> None:
    image = clean(1)
    found = document(explain(gate, wanted, counts, png(image[0])))["attribution"]

    x = image.clone().requires_grad_()
    (slope,) = torch.autograd.grad(trained(x)[0].max(), [x])
    expected = slope.abs()[0, 0]
    assert (found["method"], found["height"], found["width"]) == ("saliency", 8, 8)
    torch.testing.assert_close(torch.tensor(found["grid"]), expected, rtol=1e-3, atol=1e-6)
    with Image.open(io.BytesIO(base64.b64decode(found["heat_map"]))) as picture:
        shade = np.asarray(picture)
    assert shade.shape == (8, 8, 3)
    strongest = divmod(int(expected.argmax()), 8)
    assert shade[strongest].tolist() == [255, 0, 0]


def test_an_explanation_is_neither_counted_nor_remembered_as_a_request(
    guard: Guard, trained: SmallNet, wanted: Explanations, counts: Counts, clean: Clean
) -> None:
    settings = ModelSettings(probing=Probing(after=2, remember=16))
    with guard.attach(trained, settings) as attached:
        gate = Gate(attached, settings, counts.metrics)
        for _ in range(3):
            explain(gate, wanted, counts, png(clean(1)[0]))
        assert attached.memory is not None
        assert len(attached.memory) == 0
    assert counts.verdicts() == {}
    assert counts.value("p_value_count") == 0
    assert hook_count(trained) == 0


@pytest.mark.parametrize("mode", ["off", "shadow", "flag", "enforce"])
def test_every_mode_explains_with_the_verdict_that_enforcing_would_have(
    guard: Guard, trained: SmallNet, wanted: Explanations, counts: Counts, clean: Clean, mode: str
) -> None:
    settings = REJECT_ALL.model_copy(update={"mode": mode})
    with guard.attach(trained, settings) as attached:
        gate = Gate(attached, settings, counts.metrics)
        assert document(explain(gate, wanted, counts, png(clean(1)[0])))["verdict"] == "reject"
        garbage = explain(gate, wanted, counts, b"garbage")
    assert garbage.document is None
    assert garbage.outcome.invalid is InvalidReason.NOT_AN_IMAGE
    assert results(counts) == {"given": 1, "invalid": 1}


def test_a_handler_that_fails_is_told_as_the_prediction_would_be(
    gate: Gate, wanted: Explanations, counts: Counts, clean: Clean
) -> None:
    def broken(_: object) -> list[object]:
        handler.answer([png(clean(1)[0])])
        raise RuntimeError("no more memory")

    handler = PngHandler(gate.attached.backbone.model)
    found = Explainer(wanted, counts.metrics).explain(
        gate, png(clean(1)[0]), broken, about=None, started=time.monotonic()
    )
    assert (found.document, type(found.outcome.failure)) == (None, RuntimeError)
    assert results(counts) == {"failed": 1}


def test_a_handler_that_fails_the_second_time_fails_alone(
    gate: Gate, wanted: Explanations, counts: Counts, clean: Clean
) -> None:
    handler, calls = PngHandler(gate.attached.backbone.model), iter(range(9))

    def once(_: object) -> list[object]:
        if next(calls):
            raise RuntimeError("no more memory")
        return handler.answer([png(clean(1)[0])])

    found = Explainer(wanted, counts.metrics).explain(
        gate, png(clean(1)[0]), once, about=None, started=time.monotonic()
    )
    assert (found.document, type(found.outcome.failure)) == (None, RuntimeError)


def test_an_input_over_the_limit_gets_all_but_the_attribution(
    gate: Gate, wanted: Explanations, counts: Counts, clean: Clean
) -> None:
    small = wanted.model_copy(update={"max_pixels": 63})
    found = document(explain(gate, small, counts, png(clean(1)[0])))
    assert found["attribution"] is None
    assert found["left_out"] == {"attribution": "too_large"}
    assert found["reasons"] is not None
    assert found["influential"]
    assert results(counts) == {"too_large": 1}


def test_a_batch_that_has_spent_its_budget_gets_the_reasons_alone(
    gate: Gate, wanted: Explanations, counts: Counts, clean: Clean
) -> None:
    found = document(explain(gate, wanted, counts, png(clean(1)[0]), age=ENOUGH))
    assert (found["influential"], found["attribution"]) == ([], None)
    assert found["left_out"] == {"attribution": "out_of_time"}
    assert found["reasons"]["nearest_clean"]
    assert results(counts) == {"out_of_time": 1}


def test_an_attribution_that_hangs_is_ended_when_its_time_is_over(
    gate: Gate,
    wanted: Explanations,
    counts: Counts,
    clean: Clean,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def endless(*_: object, **__: object) -> Tensor:
        while True:
            time.sleep(0.01)

    monkeypatch.setattr("defense.attributions.attribute", endless)
    short = wanted.model_copy(update={"budget_ms": 300})
    found = document(explain(gate, short, counts, png(clean(1)[0])))
    assert found["left_out"] == {"attribution": "out_of_time"}


@pytest.mark.parametrize(
    ("error", "said"),
    [(SiteError("a sentence of ours"), "a sentence of ours"), (ValueError("theirs"), "ValueError")],
)
def test_an_attribution_that_fails_is_left_out_and_logs_only_what_is_ours(
    gate: Gate,
    wanted: Explanations,
    counts: Counts,
    clean: Clean,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    said: str,
) -> None:
    def fails(*_: object, **__: object) -> Tensor:
        raise error

    monkeypatch.setattr("defense.attributions.attribute", fails)
    with caplog.at_level(logging.WARNING):
        found = document(explain(gate, wanted, counts, png(clean(1)[0])))
    assert found["left_out"] == {"attribution": "failed"}
    assert f"an explanation lacks its part 'attribution': {said}" in caplog.text
    assert "theirs" not in caplog.text
    assert results(counts) == {"failed": 1}


def test_a_path_that_cannot_be_read_leaves_the_reasons_empty(
    gate: Gate,
    wanted: Explanations,
    counts: Counts,
    clean: Clean,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> None:
        raise GuardFailure("capture", "a site could not be read")

    monkeypatch.setattr(type(gate.attached), "routed", fails)
    found = document(explain(gate, wanted, counts, png(clean(1)[0])))
    assert (found["verdict"], found["reasons"]) == ("error", None)
    assert found["left_out"] == {"attribution": "failed"}


def test_another_class_can_be_asked_for_by_name_or_index(
    gate: Gate, wanted: Explanations, counts: Counts, clean: Clean
) -> None:
    one, other = (
        document(explain(gate, wanted, counts, png(clean(1)[0]), about=name))["attribution"]
        for name in ("3", "4")
    )
    assert (one["class"], other["class"]) == ("3", "4")
    assert one["grid"] != other["grid"]


@pytest.mark.parametrize("about", ["10", "-1", "", "1e0", "٣", "<b>", "9" * 400])
def test_a_class_out_of_range_is_an_error_that_repeats_nothing(
    gate: Gate, wanted: Explanations, counts: Counts, clean: Clean, about: str
) -> None:
    with pytest.raises(UnknownClass, match="none of the model's 10; give a class's name") as error:
        explain(gate, wanted, counts, png(clean(1)[0]), about=about)
    assert "<b>" not in str(error.value)
    assert results(counts) == {"invalid": 1}


def test_a_name_wins_over_an_index() -> None:
    assert [class_index(about, ("1", "0", "cat")) for about in ("1", "0", "cat", "2")] == [
        0,
        1,
        2,
        2,
    ]


def test_only_the_key_opens_and_wrong_ones_are_counted(
    wanted: Explanations, counts: Counts
) -> None:
    explainer = Explainer(wanted, counts.metrics)
    assert explainer.opens(KEY)
    assert not explainer.opens(None)
    assert not explainer.opens("guess")
    assert results(counts) == {"wrong_key": 1}


def test_a_missing_package_is_one_sentence(
    wanted: Explanations, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("defense.attributions")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.split(".")[0] == "captum"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(
        ConfigError, match=r"need the package 'captum', .* install it, or set explanations to off$"
    ):
        Explainer(wanted, counts.metrics)


def test_a_missing_key_file_is_told_at_the_start(wanted: Explanations, counts: Counts) -> None:
    wanted.key_file.unlink()
    with pytest.raises(ConfigError, match="cannot read the key in"):
        Explainer(wanted, counts.metrics)


def test_the_names_that_the_configuration_knows_are_those_of_the_methods() -> None:
    assert set(ATTRIBUTIONS) == set(METHODS)


def test_a_guard_without_exemplars_says_so_with_empty_lists(
    guard: Guard, trained: SmallNet, wanted: Explanations, counts: Counts, clean: Clean
) -> None:
    with replace(guard, exemplars=None).attach(trained) as attached:
        gate = Gate(attached, ModelSettings(), counts.metrics)
        found = document(explain(gate, wanted, counts, png(clean(1)[0])))
    why = found["reasons"]
    assert (why["nearest_clean"], why["nearest_predicted"]) == ([], [])
    assert found["verdict"] == Verdict.ACCEPT.value


def test_a_picture_shows_for_in_red_against_in_blue_and_nothing_in_white() -> None:
    with Image.open(io.BytesIO(heat_map(torch.tensor([[2.0, -2.0], [0.0, 1.0]])))) as picture:
        shade = np.asarray(picture).tolist()
    assert shade == [[[255, 0, 0], [0, 0, 255]], [[255, 255, 255], [255, 128, 128]]]


def test_a_large_attribution_is_told_in_a_coarse_table_of_bounded_size() -> None:
    found = pictured(images_like_noise(1, 0, size=64)[0])
    assert np.shape(found["grid"]) == (GRID, GRID)
    assert (found["height"], found["width"]) == (64, 64)


def test_an_attribution_of_nothing_or_of_no_numbers_is_a_white_picture() -> None:
    for empty in (torch.zeros(3, 4, 4), torch.full((3, 4, 4), torch.nan)):
        found = pictured(empty)
        assert found["scale"] == 0
        assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_guard_with_class_pathways_says_how_the_request_keeps_to_them(
    guard: Guard, trained: SmallNet, wanted: Explanations, counts: Counts, clean: Clean
) -> None:
    assert guard.exemplars is not None
    everything = torch.ones(10, guard.router.layout.length)
    known = replace(guard, exemplars=replace(guard.exemplars, pathways=everything))
    with known.attach(trained) as attached:
        gate = Gate(attached, ModelSettings(), counts.metrics)
        pathway = document(explain(gate, wanted, counts, png(clean(1)[0])))["reasons"]["pathway"]
    assert pathway["open"] == pathway["own"] == pathway["best"]["share"]
    assert pathway["strays"] == []


@pytest.mark.parametrize("inputs", [None, torch.zeros(1, 8)], ids=["no input", "no image"])
def test_without_an_image_there_is_no_attribution_and_the_path_is_explained(
    gate: Gate,
    wanted: Explanations,
    counts: Counts,
    clean: Clean,
    monkeypatch: pytest.MonkeyPatch,
    inputs: Tensor | None,
) -> None:
    monkeypatch.setattr("defense.gate.inputs_of", lambda *_: inputs)
    found = document(explain(gate, wanted, counts, png(clean(1)[0])))
    assert (found["attribution"], found["influential"]) == (None, [])
    assert found["left_out"] == {"attribution": "failed"}
    assert found["reasons"]["sites"]
