"""The handler inside a worker's process: what every outcome becomes in TorchServe's own terms."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import values
from ts.context import Context, RequestProcessor
from ts.torch_handler.vision_handler import VisionHandler

from defense.archive import extract_archive
from defense.artifact import save_guard
from defense.config import parse_settings
from defense.errors import ArtifactError, PathGuardError
from defense.offline.data import read_images
from defense.offline.demo.digits import pack_digits, write_digits
from defense.offline.demo.digits_model import DigitsNet
from defense.offline.fit import FitOptions, fit_archive
from defense.wrap import wrap_archive
from handlers.torchserve import HANDLER_SOURCE, TorchServeGuard
from handlers.torchserve_inner import _offline_context, open_archive
from handlers.torchserve_server import free_port

Worker = Callable[[str], TorchServeGuard]

EXPLANATION = [0.25, -0.5]
REJECT_ALL = "reject: {score: -1.0e+9}"
FLAG_ALL = "flag: {score: -1.0e+9}, reject: {score: 1.0e+9}"
ACCEPT_ALL = "flag: {score: 1.0e+9}, reject: {score: 1.0e+9}"


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guarded archive around an untrained network."""
    work = tmp_path_factory.mktemp("wrapped")
    torch.manual_seed(0)
    stock = work / "digits.mar"
    pack_digits(DigitsNet(), stock)
    images = read_images(write_digits(work / "digits", seed=0).fit).shuffled(0, 240)
    with open_archive(stock, work / "unpacked") as served:
        save_guard(fit_archive(served, images, options=FitOptions()), work / "guard")
    target = work / "guarded.mar"
    wrap_archive(stock, target, guard_folder=work / "guard", handler_source=HANDLER_SOURCE)
    (work / "image.png").write_bytes(images.payload(0))
    return target


@pytest.fixture
def image(wrapped: Path) -> bytes:
    return (wrapped.parent / "image.png").read_bytes()


@pytest.fixture
def folder(wrapped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The archive unpacked, with the process in the state of a worker that is about to load it."""
    target = tmp_path / "model"
    extract_archive(wrapped, target)
    monkeypatch.chdir(target)
    monkeypatch.syspath_prepend(str(target))
    monkeypatch.setenv("PATHGUARD_METRICS_DIR", str(tmp_path))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "set by the handler")
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    before = set(sys.modules)
    yield target
    for name in set(sys.modules) - before:
        if str(target) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def worker(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """Start a handler under the given `defaults` of guard.yaml."""
    started: list[TorchServeGuard] = []

    def start(defaults: str) -> TorchServeGuard:
        config = tmp_path / "guard.yaml"
        config.write_text(f"defaults: {{{defaults}}}\nmetrics: {{port: {free_port()}}}\n")
        monkeypatch.setenv("PATHGUARD_CONFIG", str(config))
        guard = TorchServeGuard()
        started.append(guard)
        guard.initialize(context_of(folder))
        return guard

    yield start
    for guard in started:
        guard.close()


def context_of(folder: Path, requests: int = 0, **headers: str) -> Context:
    """A worker's context with some requests in it, the first of them with `headers`."""
    from defense.archive import Archive

    manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())
    context = _offline_context(Archive(folder, manifest, ()), folder, None)
    context.request_ids = {row: f"id-{row}" for row in range(requests)}
    context.request_processor = [
        RequestProcessor({"host": "here", **(headers if row == 0 else {})})
        for row in range(requests)
    ]
    return context


def ask(
    guard: TorchServeGuard, folder: Path, *bodies: bytes, **headers: str
) -> tuple[list[Any], list[int], list[dict[str, str]]]:
    """Send one batch; returns bodies, statuses and headers."""
    context = context_of(folder, len(bodies), **headers)
    answers = guard.handle([{"body": body} for body in bodies], context)
    rows = range(len(bodies))
    statuses = [context.get_response_status(row)[0] for row in rows]
    return answers, statuses, [context.get_response_headers(row) for row in rows]


def explained(*_: object) -> list[list[float]]:
    """What a handler's `get_insights` says of a batch of one."""
    return [EXPLANATION]


def test_an_accepted_request_gets_the_handlers_own_answer(
    worker: Worker, folder: Path, image: bytes
) -> None:
    answers, statuses, headers = ask(worker(ACCEPT_ALL), folder, image)

    assert isinstance(answers[0], int)
    assert statuses == [200]
    assert headers == [{"X-PathGuard-Verdict": "accept"}]


def test_a_flagged_request_is_answered_with_a_header(
    worker: Worker, folder: Path, image: bytes
) -> None:
    answers, statuses, headers = ask(worker(FLAG_ALL), folder, image)

    assert isinstance(answers[0], int)
    assert (statuses, headers) == ([200], [{"X-PathGuard-Verdict": "flag"}])


def test_a_rejected_request_gets_the_configured_status_and_nothing_else(
    worker: Worker, folder: Path, image: bytes
) -> None:
    answers, statuses, headers = ask(worker(f"{REJECT_ALL}, reject_status: 422"), folder, image)

    assert statuses == [422]
    assert json.loads(answers[0]) == {
        "title": "The request was refused.",
        "status": 422,
        "guard": {"verdict": "reject"},
    }
    assert headers == [
        {"content-type": "application/problem+json", "X-PathGuard-Verdict": "reject"}
    ]


def test_mode_flag_never_refuses_a_suspicious_request(
    worker: Worker, folder: Path, image: bytes
) -> None:
    _, statuses, headers = ask(worker(f"mode: flag, {REJECT_ALL}"), folder, image)

    assert (statuses, headers) == ([200], [{"X-PathGuard-Verdict": "flag"}])


@pytest.mark.parametrize("mode", ["off", "shadow"])
def test_off_and_shadow_leave_answers_as_they_are(
    worker: Worker, folder: Path, image: bytes, mode: str
) -> None:
    answers, statuses, headers = ask(worker(f"mode: {mode}, {REJECT_ALL}"), folder, image)

    assert isinstance(answers[0], int)
    assert (statuses, headers) == ([200], [{}])


@pytest.mark.parametrize("exposed", [True, False])
def test_the_p_value_is_sent_only_where_the_operator_asked(
    worker: Worker, folder: Path, image: bytes, exposed: bool
) -> None:
    guard = worker(f"{ACCEPT_ALL}, expose_score: {str(exposed).lower()}")
    _, _, headers = ask(guard, folder, image)

    assert ("X-PathGuard-P-Value" in headers[0]) is exposed


@pytest.mark.parametrize(("on_error", "status"), [("open", 200), ("closed", 503)])
def test_a_guard_that_fails_has_the_configured_consequence(
    worker: Worker,
    folder: Path,
    image: bytes,
    on_error: str,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guard = worker(f"{ACCEPT_ALL}, on_error: {on_error}")

    def broken(*_: object) -> None:
        raise RuntimeError("no more memory")

    monkeypatch.setattr("defense.detectors.fused.Fused.score", broken)
    answers, statuses, headers = ask(guard, folder, image)

    assert statuses == [status]
    assert headers[0]["X-PathGuard-Verdict"] == "error"
    assert isinstance(answers[0], int if on_error == "open" else bytes)


def test_descriptions_and_predictions_in_one_batch_are_both_answered(
    worker: Worker, folder: Path, image: bytes
) -> None:
    # TorchServe's own handler would describe the whole batch, because the first request asks for it.
    answers, statuses, headers = ask(worker(ACCEPT_ALL), folder, b"", image, describe="True")

    assert answers[0] is None  # what this handler says when it is asked to describe itself
    assert isinstance(answers[1], int)
    assert statuses == [200, 200]
    assert [header.get("X-PathGuard-Verdict") for header in headers] == [None, "accept"]


def test_an_explanation_is_refused_where_its_prediction_would_be(
    worker: Worker, folder: Path, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VisionHandler, "get_insights", explained)
    refused, refused_status, _ = ask(worker(REJECT_ALL), folder, image, explain="True")
    given, given_status, headers = ask(worker(ACCEPT_ALL), folder, image, explain="True")

    assert refused_status == [403]
    assert json.loads(refused[0])["guard"] == {"verdict": "reject"}
    assert (given, given_status) == ([EXPLANATION], [200])
    assert headers == [{"X-PathGuard-Verdict": "accept"}]


def broken(*_: object) -> None:
    raise RuntimeError("a part of the handler fails")


@pytest.mark.parametrize("mode", ["off", "shadow"])
def test_off_and_shadow_explain_whatever_they_are_sent(
    worker: Worker, folder: Path, image: bytes, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VisionHandler, "get_insights", explained)
    guard = worker(f"mode: {mode}, {REJECT_ALL}")

    assert ask(guard, folder, image, explain="True") == ([EXPLANATION], [200], [{}])


def test_in_shadow_an_explanation_is_given_though_its_prediction_fails(
    worker: Worker, folder: Path, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VisionHandler, "get_insights", explained)
    monkeypatch.setattr(VisionHandler, "inference", broken)
    guard = worker(f"mode: shadow, {REJECT_ALL}")

    assert ask(guard, folder, image, explain="True") == ([EXPLANATION], [200], [{}])


def test_an_explanation_that_fails_fails_alone(
    worker: Worker, folder: Path, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VisionHandler, "get_insights", broken)
    answers, statuses, headers = ask(worker(ACCEPT_ALL), folder, image, image, explain="True")

    assert statuses == [503, 200]
    assert json.loads(answers[0])["guard"] == {"verdict": "failed"}
    assert headers[1]["X-PathGuard-Verdict"] == "accept"


@pytest.mark.parametrize(("on_error", "status"), [("open", 200), ("closed", 503)])
def test_an_explanation_that_cannot_be_scored_follows_on_error(
    worker: Worker,
    folder: Path,
    image: bytes,
    on_error: str,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(VisionHandler, "get_insights", explained)
    # A prediction that is made without the backbone leaves nothing to score.
    monkeypatch.setattr(VisionHandler, "inference", lambda _self, batch: batch.flatten(1))
    guard = worker(f"{ACCEPT_ALL}, on_error: {on_error}")
    _, statuses, headers = ask(guard, folder, image, explain="True")

    assert statuses == [status]
    assert headers[0]["X-PathGuard-Verdict"] == "error"


def test_data_that_is_marked_as_a_description_passes_no_guard(
    worker: Worker, folder: Path, image: bytes
) -> None:
    _, statuses, headers = ask(worker(REJECT_ALL), folder, image, describe="True")

    assert statuses == [403]
    assert headers[0]["X-PathGuard-Verdict"] == "reject"


def test_requests_without_headers_end_their_streams(
    worker: Worker, folder: Path, image: bytes
) -> None:
    # Only gRPC's have none; TorchServe kills a worker that leaves a StreamPredictions call open.
    context = context_of(folder, 2)
    context.request_processor[1] = RequestProcessor({"data": {"content-type": None}})
    worker(ACCEPT_ALL).handle([{"body": image}, {"data": image}], context)

    ends = [context.get_response_headers(row).get("ts_stream_next") for row in range(2)]
    assert ends == [None, "false"]


def test_garbage_fails_alone_with_a_reason(worker: Worker, folder: Path, image: bytes) -> None:
    answers, statuses, headers = ask(worker(ACCEPT_ALL), folder, image, b"garbage", image)

    assert statuses == [200, 400, 200]
    assert json.loads(answers[1])["guard"] == {"verdict": "invalid", "reason": "not_an_image"}
    assert headers[1]["X-PathGuard-Verdict"] == "invalid"


def test_a_part_beside_the_image_has_to_keep_the_limits_too(
    worker: Worker, folder: Path, image: bytes
) -> None:
    guard = worker(f"{ACCEPT_ALL}, limits: {{max_bytes: {len(image)}}}")
    context = context_of(folder, 3)
    rows = [{"data": image, "other": more} for more in (b"short", image + b"x", "")]
    answers: list[Any] = guard.handle(rows, context)
    assert [context.get_response_status(row)[0] for row in range(3)] == [200, 413, 200]
    assert json.loads(answers[1])["guard"]["reason"] == "too_many_bytes"


def test_all_that_goes_into_headers_is_ascii_text(
    worker: Worker, folder: Path, image: bytes
) -> None:
    # TorchServe's worker dies of a header that is no text, its frame of a phrase that is not ASCII.
    for rules in (ACCEPT_ALL, FLAG_ALL, REJECT_ALL):
        context = context_of(folder, 2)
        worker(f"{rules}, expose_score: true").handle([{"body": image}, {"body": b"x"}], context)
        for row in range(2):
            phrase = context.get_response_status(row)[1]
            texts = [*context.get_response_headers(row).values(), phrase or ""]
            assert all(isinstance(text, str) and text.isascii() for text in texts)
            assert not any(c in text for text in texts for c in "\r\n")


def test_a_guard_for_other_weights_does_not_start_and_says_why(
    worker: Worker, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = folder / "digits.pt"
    state = torch.load(weights, weights_only=True)
    state["layers.0.weight"] += 1
    torch.save(state, weights)

    with pytest.raises(ArtifactError, match="this one is"), caplog.at_level(logging.ERROR):
        worker(ACCEPT_ALL)

    assert "PathGuard did not start: the guard was fitted for the backbone" in caplog.text


def test_a_configuration_that_cannot_be_kept_does_not_start(worker: Worker) -> None:
    with pytest.raises(PathGuardError, match="needs at least 1000000 calibration images"):
        worker("reject: {target_fpr: 0.000001}")


def test_a_missing_package_is_named_by_the_archives_handler(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "handlers.torchserve", None)

    with pytest.raises(
        RuntimeError, match="install pathguard into the Python that runs the workers"
    ):
        exec((folder / "pathguard_handler.py").read_text(), {})  # noqa: S102 - written by wrap
    assert os.environ["PROMETHEUS_MULTIPROC_DIR"] == "set by the handler"


def test_an_edit_waits_for_the_end_of_a_batch_so_that_one_set_of_rules_holds_for_all_of_it(
    worker: Worker, folder: Path, image: bytes
) -> None:
    guard = worker(REJECT_ALL)
    edited = parse_settings(f"defaults: {{mode: shadow, {ACCEPT_ALL}}}", where="here")
    edit = threading.Thread(target=lambda: guard._apply_edit(edited, "digits"))
    own = guard._inner.handle

    def edited_meanwhile(data: Any, context: Context) -> Any:
        edit.start()
        edit.join(0.2)  # time enough for it, if nothing held it back
        return own(data, context)

    guard._inner = replace(guard._inner, handle=edited_meanwhile)
    _, statuses, _ = ask(guard, folder, image, image)
    edit.join()

    assert statuses == [403, 403]
    guard._inner = replace(guard._inner, handle=own)
    assert ask(guard, folder, image)[1] == [200]


def test_a_worker_that_takes_a_dead_ones_place_goes_on_where_the_file_is_broken_since(
    worker: Worker, folder: Path, image: bytes, tmp_path: Path
) -> None:
    worker(REJECT_ALL).close()
    (tmp_path / "guard.yaml").write_text("defaults: [")

    again = TorchServeGuard()
    again.initialize(context_of(folder))

    try:
        assert ask(again, folder, image)[1] == [403]
    finally:
        again.close()


KEY = "a secret of more than sixteen bytes"


@pytest.fixture
def explaining(tmp_path: Path) -> str:
    """The part of guard.yaml that lets the holder of a key have explanations."""
    (tmp_path / "key").write_text(KEY)
    return f"explanations: {{key_file: {tmp_path / 'key'}, method: saliency, budget_ms: 600000}}"


def test_the_holder_of_the_key_gets_an_explanation_of_a_rejected_request(
    worker: Worker, folder: Path, image: bytes, explaining: str
) -> None:
    guard = worker(f"{REJECT_ALL}, {explaining}")
    for header in ("X-PathGuard-Key", "x-pathguard-key"):
        [found], statuses, headers = ask(guard, folder, image, explain="True", **{header: KEY})

        assert statuses == [200]
        assert headers == [{"content-type": "application/json"}]
        assert found["verdict"] == "reject"
        assert found["reasons"]["predicted"] == found["attribution"]["class"]
        assert found["reasons"]["nearest_clean"][0]["image"].endswith(".png")
        assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("shown", [{}, {"X-PathGuard-Key": "a guess"}, {"X-PathGuard-Key": ""}])
def test_without_the_key_an_explanation_is_refused_or_the_archives_own(
    worker: Worker,
    folder: Path,
    image: bytes,
    explaining: str,
    shown: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(VisionHandler, "get_insights", explained)
    off = ask(worker(REJECT_ALL), folder, image, explain="True")
    refused = ask(worker(f"{REJECT_ALL}, {explaining}"), folder, image, explain="True", **shown)
    given, _, headers = ask(
        worker(f"{ACCEPT_ALL}, {explaining}"), folder, image, explain="True", **shown
    )

    assert refused == off
    assert (given, headers) == ([EXPLANATION], [{"X-PathGuard-Verdict": "accept"}])


def test_the_key_opens_explanations_alone(
    worker: Worker, folder: Path, image: bytes, explaining: str
) -> None:
    guard = worker(f"{REJECT_ALL}, {explaining}")
    for mark in ({}, {"describe": "True"}, {"explain": "true"}):
        assert ask(guard, folder, image, **mark, **{"X-PathGuard-Key": KEY})[1] == [403]


@pytest.mark.parametrize(
    ("body", "about", "status", "reason"),
    [(b"garbage", "1", 400, "not_an_image"), (None, "10", 422, "unknown_class")],
)
def test_what_cannot_be_explained_is_refused_with_a_reason(
    worker: Worker,
    folder: Path,
    image: bytes,
    explaining: str,
    body: bytes | None,
    about: str,
    status: int,
    reason: str,
) -> None:
    shown = {"X-PathGuard-Key": KEY, "X-PathGuard-Class": about}
    guard = worker(f"{ACCEPT_ALL}, {explaining}")
    answers, statuses, _ = ask(guard, folder, body or image, image, explain="True", **shown)

    assert statuses == [status, 200]
    assert json.loads(answers[0])["guard"] == {"verdict": "invalid", "reason": reason}


def test_no_handler_of_an_archive_sees_the_key_or_the_mark_of_an_explanation(
    worker: Worker, folder: Path, image: bytes, explaining: str
) -> None:
    guard = worker(f"{ACCEPT_ALL}, {explaining}")
    seen: list[dict[str, str]] = []
    own = guard._inner.handle

    def watched(data: Any, context: Context) -> Any:
        seen.append(context.get_all_request_header(0))
        return own(data, context)

    guard._inner = replace(guard._inner, handle=watched)
    ask(guard, folder, image, explain="True", **{"X-PathGuard-Key": KEY, "X-Own": "kept"})

    assert seen == [{"host": "here", "X-Own": "kept"}] * 2


def test_an_edit_opens_and_closes_explanations_and_one_that_cannot_be_had_changes_nothing(
    worker: Worker, folder: Path, image: bytes, explaining: str, tmp_path: Path
) -> None:
    guard = worker(REJECT_ALL)

    def edit(defaults: str) -> None:
        guard._apply_edit(parse_settings(f"defaults: {{{defaults}}}", where="here"), "digits")

    def status() -> int:
        shown = {"X-PathGuard-Key": KEY}
        return ask(guard, folder, image, explain="True", **shown)[1][0]

    assert status() == 403
    edit(f"{REJECT_ALL}, {explaining}")
    assert status() == 200
    with pytest.raises(PathGuardError, match="cannot read the key in"):
        edit(f"{REJECT_ALL}, explanations: {{key_file: {tmp_path / 'none'}}}")
    assert status() == 200
    edit(REJECT_ALL)
    assert status() == 403
