"""Every door of a real TorchServe through which a guarded model can be asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import grpc
import httpx
import pytest

from tests.e2e.conftest import Running
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
