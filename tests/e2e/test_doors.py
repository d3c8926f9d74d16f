"""Every door of a real TorchServe through which a guarded model can be asked."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence

import grpc
import httpx
import pytest

from tests.e2e.conftest import EXPLANATION_KEY, Running
from tests.e2e.grpc import predictions, stream_predictions
from tests.e2e.requests import post, total

pytestmark = pytest.mark.server

VERDICT = "X-PathGuard-Verdict"
PREDICTIONS = (
    "predictions/counting", "predictions/counting/1.0", "predictions/counting/1.0/any/path",
    "invocations?model_name=counting", "models/counting/invoke",
    "counting/predict", "counting/1.0/predict",
    "v1/models/counting:predict", "v2/models/counting/infer",
)  # fmt: skip
EXPLANATIONS = (
    "explanations/counting", "v1/models/counting:explain", "v2/models/counting/explain",
)  # fmt: skip
REFUSED = {"title": "The request was refused.", "status": 403, "guard": {"verdict": "reject"}}


def ask(doors: Running, door: str, image: bytes, **headers: str) -> httpx.Response:
    own = {**doors.server.token_header(), **headers}
    return httpx.post(
        f"{doors.server.inference_url}/{door}", content=image, headers=own, timeout=60
    )


def counted(doors: Running, model: str = "counting") -> dict[str, float]:
    """Return what was counted of a model so far: verdicts, invalid requests, unscored ones."""
    names = ("requests_total", "invalid_inputs_total", "passed_total", "errors_total")
    return {name: total(doors.metrics_url, f"pathguard_{name}", model=model) for name in names}


@pytest.fixture(scope="module")
def good(doors: Running, clean: list[bytes]) -> bytes:
    """An image that the guard accepts."""
    answers = [ask(doors, "predictions/counting", image) for image in clean[:8]]
    return next(
        i for i, a in zip(clean[:8], answers, strict=True) if a.headers[VERDICT] == "accept"
    )


@pytest.fixture(scope="module")
def bad(doors: Running, attacked: list[bytes]) -> bytes:
    """An image that the guard rejects."""
    answers = [ask(doors, "predictions/counting", image) for image in attacked[:8]]
    return next(
        i for i, a in zip(attacked[:8], answers, strict=True) if a.headers[VERDICT] == "reject"
    )


@pytest.mark.parametrize("door", PREDICTIONS)
def test_every_door_over_http_predicts_and_refuses_alike(
    doors: Running, good: bytes, bad: bytes, door: str
) -> None:
    before = counted(doors)
    expected = ask(doors, "predictions/counting", good)
    given, refused = ask(doors, door, good), ask(doors, door, bad)

    assert (given.status_code, given.content) == (200, expected.content)
    assert given.headers[VERDICT] == "accept"
    assert refused.status_code == 403
    assert refused.json() == REFUSED
    assert_tells_nothing(refused)
    assert counted(doors) == {**before, "requests_total": before["requests_total"] + 3}


@pytest.mark.parametrize("door", EXPLANATIONS)
def test_every_door_to_explanations_explains_and_refuses_alike(
    doors: Running, good: bytes, bad: bytes, door: str
) -> None:
    before = counted(doors)
    given, refused, invalid = (ask(doors, door, image) for image in (good, bad, b"no image"))

    assert (given.status_code, given.headers[VERDICT]) == (200, "accept")
    assert len(given.json()[0]) == 32  # an attribution has the size of the image
    assert refused.status_code == 403
    assert refused.json() == REFUSED
    assert_tells_nothing(refused)
    assert (invalid.status_code, invalid.json()["guard"]["reason"]) == (400, "not_an_image")
    after = {
        "requests_total": before["requests_total"] + 2,
        "invalid_inputs_total": before["invalid_inputs_total"] + 1,
    }
    assert counted(doors) == {**before, **after}


def explained(doors: Running, model: str = "counting") -> dict[str, float]:
    """Return the explanations that were asked for with a key so far, by result, zeros left out."""
    kinds = ("given", "too_large", "out_of_time", "failed", "invalid", "wrong_key")
    name = "pathguard_explanations_total"
    found = {kind: total(doors.metrics_url, name, model=model, result=kind) for kind in kinds}
    return {kind: count for kind, count in found.items() if count}


@pytest.mark.parametrize("door", EXPLANATIONS)
def test_every_door_to_explanations_tells_the_holder_of_the_key_about_any_request(
    doors: Running, good: bytes, bad: bytes, door: str
) -> None:
    before, asked = counted(doors), explained(doors)
    key = {"X-PathGuard-Key": EXPLANATION_KEY}
    one, other, invalid = (ask(doors, door, image, **key) for image in (good, bad, b"no image"))

    for answer, verdict in ((one, "accept"), (other, "reject")):
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        found = answer.json()
        assert found["verdict"] == verdict
        assert found["reasons"]["sites"][0]["channels"]
        assert len(found["reasons"]["votes"]) > 3
        assert found["reasons"]["witness"] is not None
        assert len(found["reasons"]["nearest_clean"]) == 5
        assert len(found["influential"]) == 5
        assert found["attribution"]["method"] == "saliency"
        assert base64.b64decode(found["attribution"]["heat_map"]).startswith(b"\x89PNG")
        assert found["left_out"] == {}
    assert (invalid.status_code, invalid.json()["guard"]["reason"]) == (400, "not_an_image")
    assert counted(doors) == before
    assert explained(doors) == {
        **asked,
        "given": asked.get("given", 0) + 2,
        "invalid": asked.get("invalid", 0) + 1,
    }


def test_a_wrong_key_changes_nothing_that_a_client_could_see(
    doors: Running, good: bytes, bad: bytes
) -> None:
    asked = explained(doors)
    door, wrong = "explanations/counting", {"X-PathGuard-Key": EXPLANATION_KEY[:-1]}
    for image in (good, bad, b"no image"):
        without, with_wrong = ask(doors, door, image), ask(doors, door, image, **wrong)
        assert with_wrong.status_code == without.status_code
        assert with_wrong.content == without.content
        assert set(with_wrong.headers) == set(without.headers)
    assert explained(doors) == {**asked, "wrong_key": asked.get("wrong_key", 0) + 3}


def test_an_explanation_keeps_its_limits_and_names_no_class_that_is_not_there(
    doors: Running, bad: bytes
) -> None:
    key = {"X-PathGuard-Key": EXPLANATION_KEY}
    large = ask(doors, "explanations/function", bad, **key).json()  # its inputs are 32 x 32
    assert (large["attribution"], large["left_out"]) == (None, {"attribution": "too_large"})
    assert large["reasons"]["votes"]

    named = ask(doors, "explanations/counting", bad, **key, **{"X-PathGuard-Class": "3"})
    assert named.json()["attribution"]["class"] == "3"
    unknown = ask(doors, "explanations/counting", bad, **key, **{"X-PathGuard-Class": "10"})
    assert unknown.status_code == 422
    assert unknown.json()["guard"] == {"verdict": "invalid", "reason": "unknown_class"}
    over = ask(doors, "explanations/counting", bytes(6_000_001), **key)
    assert over.status_code == 413


def test_the_key_to_explanations_is_written_down_nowhere(doors: Running, bad: bytes) -> None:
    for key in (EXPLANATION_KEY, "a wrong key 7f3a91"):
        ask(doors, "explanations/counting", bad, **{"X-PathGuard-Key": key})
    folder = doors.server.log_file.parent
    logs = [path for path in folder.rglob("*.log") if path.is_file()]
    assert logs
    for path in logs:
        text = path.read_text(errors="replace")
        assert EXPLANATION_KEY not in text
        assert "a wrong key 7f3a91" not in text
    assert "7f3a91" not in httpx.get(doors.metrics_url, timeout=10).text


@pytest.mark.parametrize("mark", ["describe", "explain"])
@pytest.mark.parametrize("door", ["predictions/function", "function/predict"])
def test_a_header_of_the_clients_does_not_lead_past_the_guard(
    doors: Running, bad: bytes, door: str, mark: str
) -> None:
    # This archive's handler never looks at headers: it would predict.
    answer = ask(doors, door, bad, **{mark: "True"})

    assert answer.status_code == 403
    assert answer.json() == REFUSED


def test_a_description_carries_no_data_and_passes(doors: Running) -> None:
    before = counted(doors)
    described = httpx.get(
        f"{doors.server.management_url}/models/counting?customized=true",
        headers=doors.server.token_header("management"),
        timeout=60,
    )

    assert described.status_code == 200
    assert counted(doors) == {**before, "passed_total": before["passed_total"] + 1}


def test_grpc_gets_the_same_answers_and_the_same_refusals(
    doors: Running, good: bytes, bad: bytes
) -> None:
    before = counted(doors)
    expected = ask(doors, "predictions/counting", good).content

    assert predictions(doors.server, "counting", {"data": good}) == expected
    assert predictions(doors.server, "counting", {"body": good}, version="1.0") == expected
    assert json.loads(predictions(doors.server, "counting", {"data": bad})) == REFUSED
    garbage = json.loads(predictions(doors.server, "counting", {"data": b"garbage"}))
    assert garbage["guard"] == {"verdict": "invalid", "reason": "not_an_image"}
    after = {
        "requests_total": before["requests_total"] + 4,
        "invalid_inputs_total": before["invalid_inputs_total"] + 1,
    }
    assert counted(doors) == {**before, **after}


def test_a_stream_over_grpc_has_one_answer_and_costs_no_worker(
    doors: Running, good: bytes, bad: bytes
) -> None:
    pids = doors.server.worker_pids("counting")
    expected = predictions(doors.server, "counting", {"data": good})

    assert stream_predictions(doors.server, "counting", {"data": good}) == [expected]
    refused = stream_predictions(doors.server, "counting", {"data": bad})
    assert [json.loads(part) for part in refused] == [REFUSED]
    assert doors.server.worker_pids("counting") == pids


def test_every_door_asks_for_a_token(doors: Running, bad: bytes) -> None:
    before = counted(doors)
    doors_over_http = [*PREDICTIONS, *EXPLANATIONS, "wfpredict/any"]

    for door in doors_over_http:
        answer = httpx.post(f"{doors.server.inference_url}/{door}", content=bad, timeout=60)
        assert (answer.status_code, answer.json()["type"]) == (400, "InvalidKeyException"), door
    calls: Sequence[Callable[..., object]] = (predictions, stream_predictions)
    for call in calls:
        with pytest.raises(grpc.RpcError, match="Token Authorization failed"):
            call(doors.server, "counting", {"data": bad}, token=False)
    assert counted(doors) == before


def test_several_workers_count_every_request_once(doors: Running, good: bytes, bad: bytes) -> None:
    before = counted(doors, "function")
    answers = [a for _ in range(4) for a in post(doors.server, "function", [good, bad, b"x"])]

    assert len(set(doors.server.worker_pids("function"))) == 2
    assert [a.status_code for a in answers] == [200, 403, 400] * 4
    after = {
        "requests_total": before["requests_total"] + 8,
        "invalid_inputs_total": before["invalid_inputs_total"] + 4,
    }
    assert counted(doors, "function") == {**before, **after}


def assert_tells_nothing(refused: httpx.Response) -> None:
    """No header of a refusal, and none that the handler set, says what the network saw."""
    own = {name for name in refused.headers if name.startswith("x-")}
    assert own == {"x-pathguard-verdict", "x-request-id"}
    assert "probabilities" not in refused.text
    assert "class" not in refused.text
