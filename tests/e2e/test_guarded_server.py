"""The guarded archive on a real TorchServe: statuses, bodies, headers, counts."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import httpx
import pytest
from PIL import Image

from tests.e2e.conftest import Running
from tests.e2e.requests import post, total

pytestmark = pytest.mark.server

VERDICT = "X-PathGuard-Verdict"


def png(mode: str, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def accepted(running: Running, model: str, images: Sequence[bytes]) -> list[bytes]:
    """Return images that the guard accepts, so that a test can rely on it."""
    answers = post(running.server, model, images)
    return [
        image for image, a in zip(images, answers, strict=True) if a.headers[VERDICT] == "accept"
    ]


def forwards(running: Running, image: bytes) -> int:
    """Return how many forward passes the guarded counting model has made, this call's included."""
    return int(post(running.server, "counting", [image])[0].headers["X-Forwards"])


def one_batch(
    running: Running, batch: Sequence[bytes | list[object]], good: bytes, readable: int
) -> tuple[int, list[httpx.Response]]:
    """Send until TorchServe makes one batch of all; return the forward passes before, and answers."""
    for _ in range(10):
        before = forwards(running, good)
        answers = post(running.server, "counting", batch)
        if {a.headers.get("X-Batch", str(readable)) for a in answers} == {str(readable)}:
            return before, answers
    raise AssertionError("TorchServe never put the requests into one batch")


def test_a_mixed_batch_of_eight_gets_eight_right_statuses_from_one_forward(
    running: Running, clean: list[bytes], attacked: list[bytes]
) -> None:
    good = accepted(running, "counting", clean[:8])[:3]
    nan: list[object] = [[[float("nan")] * 32] * 32]
    batch: list[bytes | list[object]] = [
        good[0], attacked[0], b"no image", good[1], good[2][:60], attacked[1], good[2], nan,
    ]  # fmt: skip

    before, answers = one_batch(running, batch, good[0], 5)

    assert [a.status_code for a in answers] == [200, 403, 400, 200, 400, 403, 200, 422]
    assert [a.headers[VERDICT] for a in answers] == [
        "accept", "reject", "invalid", "accept", "invalid", "reject", "accept", "invalid",
    ]  # fmt: skip
    reasons = [a.json()["guard"].get("reason") for a in answers if a.headers[VERDICT] == "invalid"]
    assert reasons == ["not_an_image", "truncated_image", "not_finite"]
    # The three invalid ones never reach the network, the other five pass it together.
    assert {answers[i].headers["X-Forwards"] for i in (0, 3, 6)} == {str(before + 1)}
    assert {answers[i].headers["X-Batch"] for i in (0, 3, 6)} == {"5"}
    # What the handler said of a refused request stays inside.
    assert not [a for a in answers if a.status_code >= 400 and "X-Batch" in a.headers]


@pytest.mark.parametrize("model", ["counting", "function", "classifier"])
def test_accepted_answers_are_byte_identical_to_the_stock_archives(
    running: Running, clean: list[bytes], model: str
) -> None:
    images = [_coloured(image) for image in clean[:4]] if model == "classifier" else clean[:4]

    for image in images:
        # One by one: how requests share batches moves the last bits of floats, stock or guarded.
        (stock,) = post(running.server, f"{model}-stock", [image])
        (guarded,) = post(running.server, model, [image])

        assert (stock.status_code, guarded.status_code) == (200, 200)
        assert guarded.content == stock.content
        assert guarded.headers.get("content-type") == stock.headers.get("content-type")


def test_accepted_answers_of_a_full_batch_are_byte_identical_to_the_stock_archives(
    running: Running, clean: list[bytes]
) -> None:
    images = accepted(running, "counting", clean[:12])[:8]

    stock = whole_batch(running, "counting-stock", images)
    guarded = whole_batch(running, "counting", images)

    assert [a.content for a in guarded] == [a.content for a in stock]


def whole_batch(running: Running, model: str, images: Sequence[bytes]) -> list[httpx.Response]:
    """Send images until TorchServe puts all of them into one batch."""
    for _ in range(10):
        answers = post(running.server, model, images)
        if {a.headers.get("X-Batch") for a in answers} == {str(len(images))}:
            return answers
    raise AssertionError(f"TorchServe never put {len(images)} requests into one batch")


@pytest.mark.parametrize("model", ["counting", "function", "classifier"])
def test_garbage_is_refused_alone_whatever_the_handler(
    running: Running, clean: list[bytes], model: str
) -> None:
    good = _coloured(clean[0]) if model == "classifier" else clean[0]
    wrong = png("L" if model == "classifier" else "RGB", (32, 32))

    answers = post(running.server, model, [good, b"", b"garbage", wrong, good[: len(good) // 2]])

    # The built-in handler's own preprocessing refuses a grey image before it reaches the network.
    shape = (400, "unreadable") if model == "classifier" else (422, "wrong_shape")
    assert answers[0].status_code == 200
    assert [a.status_code for a in answers[1:]] == [400, 400, shape[0], 400]
    reasons = [a.json()["guard"]["reason"] for a in answers[1:]]
    assert reasons == ["empty", "not_an_image", shape[1], "truncated_image"]


def test_a_bomb_is_refused_before_it_is_decoded(running: Running) -> None:
    answer = post(running.server, "counting", [png("1", (10_000, 6_000))])[0]

    assert answer.status_code == 413
    assert answer.json()["guard"] == {"verdict": "invalid", "reason": "too_many_pixels"}


def test_a_refusal_carries_no_prediction_and_no_score(
    running: Running, attacked: list[bytes]
) -> None:
    answer = post(running.server, "counting", [attacked[0]])[0]

    assert answer.status_code == 403
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json() == {
        "title": "The request was refused.",
        "status": 403,
        "guard": {"verdict": "reject"},
    }
    assert not [name for name in answer.headers if "score" in name or "p-value" in name]


def test_shadow_mode_answers_as_the_stock_archive_and_counts(
    running: Running, clean: list[bytes], attacked: list[bytes]
) -> None:
    images = [clean[0], attacked[0], attacked[1]]  # one by one, so that floats are equal to the bit
    before = total(
        running.metrics_url, "pathguard_requests_total", model="shadowed", verdict="reject"
    )

    shadowed = [post(running.server, "shadowed", [image])[0] for image in images]
    stock = [post(running.server, "counting-stock", [image])[0] for image in images]

    assert [a.content for a in shadowed] == [a.content for a in stock]
    assert all(VERDICT not in a.headers for a in shadowed)
    after = total(
        running.metrics_url, "pathguard_requests_total", model="shadowed", verdict="reject"
    )
    assert after == before + 2


def test_every_request_is_counted_exactly_once(
    running: Running, clean: list[bytes], attacked: list[bytes]
) -> None:
    def counted() -> tuple[float, float]:
        url = running.metrics_url
        scored = total(url, "pathguard_requests_total", model="function")
        return scored, total(url, "pathguard_invalid_inputs_total", model="function")

    before = counted()
    post(running.server, "function", [*clean[:6], *attacked[:4], b"x", b"y", b"z"])
    after = counted()

    assert (after[0] - before[0], after[1] - before[1]) == (10, 3)


def test_all_series_exist_before_the_first_request(running: Running) -> None:
    text = httpx.get(running.metrics_url).text

    for verdict in ("accept", "flag", "reject", "error"):
        assert f'pathguard_requests_total{{model="classifier",verdict="{verdict}"' in text
    for name in (
        "pathguard_p_value_bucket", "pathguard_guard_seconds_bucket", "pathguard_errors_total",
        "pathguard_invalid_inputs_total", "pathguard_target_fpr", "pathguard_guard_info",
        "pathguard_config_reloads_total", "pathguard_last_scored_timestamp_seconds",
        "pathguard_mode", "pathguard_passed_total",
    ):  # fmt: skip
        assert f"{name}{{" in text, name


def test_explanations_and_descriptions_keep_working(running: Running, clean: list[bytes]) -> None:
    image = _coloured(clean[0])

    scored = total(running.metrics_url, "pathguard_requests_total", model="classifier")
    stock = post(running.server, "classifier-stock", [image], door="explanations")[0]
    guarded = post(running.server, "classifier", [image], door="explanations")[0]
    described = httpx.get(
        f"{running.server.management_url}/models/classifier",
        headers=running.server.token_header("management"),
    )

    assert stock.status_code == guarded.status_code == 200
    assert guarded.content == stock.content
    after = total(running.metrics_url, "pathguard_requests_total", model="classifier")
    assert after == scored + 1
    assert json.loads(described.text)[0]["modelName"] == "classifier"


def test_what_a_client_sends_is_in_no_log_line_and_no_header(
    running: Running, clean: list[bytes]
) -> None:
    marker = "MARKER-7f3a"
    answers = post(
        running.server,
        "counting",
        [marker.encode(), clean[0]],
        headers={"X-Custom": marker, "X-Request-Id": f"{marker}\t[METRICS]x.Count:1"},
    )

    assert [a.status_code for a in answers] == [400, 200]
    assert all(marker not in value for a in answers for value in a.headers.values())
    assert marker not in running.server.log_file.read_text()


def _coloured(image: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
