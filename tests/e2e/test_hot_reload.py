"""An edited guard.yaml takes effect while the server runs; a broken one changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Running, guard_yaml
from tests.e2e.requests import post, total

pytestmark = pytest.mark.server

TAKES_EFFECT_SECONDS = 2.0


@pytest.fixture(autouse=True)
def _restored(running: Running) -> Iterator[None]:
    yield
    before = reloads(running, "applied")
    running.config.write_text(guard_yaml(running.metrics_port) + "# restored\n")
    wait_until(lambda: reloads(running, "applied") > before)


def reloads(running: Running, result: str) -> float:
    return total(running.metrics_url, "pathguard_config_reloads_total", result=result)


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.1)


def test_an_edited_threshold_changes_verdicts_within_two_seconds(
    running: Running, clean: list[bytes]
) -> None:
    assert post(running.server, "counting", clean[:1])[0].status_code == 200

    running.config.write_text(guard_yaml(running.metrics_port, flag=0.99, reject=0.98))
    time.sleep(TAKES_EFFECT_SECONDS)
    strict = post(running.server, "counting", clean[:8])

    assert [a.status_code for a in strict].count(403) >= 7
    url = running.metrics_url
    assert total(url, "pathguard_target_fpr", model="counting", tier="reject") == 0.98


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ("defaults: [", "is not valid YAML"),
        ("defaults: {rejct: {target_fpr: 0.5}}", "did you mean 'reject'?"),
        ("defaults: {reject: {target_fpr: 0.00001}}", "needs at least 100000 calibration images"),
    ],
)
def test_a_broken_edit_changes_nothing_and_shows_in_metrics_and_log(
    running: Running, clean: list[bytes], edit: str, said: str
) -> None:
    before = reloads(running, "invalid")
    verdicts = [
        a.headers["X-PathGuard-Verdict"] for a in post(running.server, "counting", clean[:4])
    ]

    running.config.write_text(edit)
    wait_until(lambda: reloads(running, "invalid") > before)

    after = [a.headers["X-PathGuard-Verdict"] for a in post(running.server, "counting", clean[:4])]
    assert after == verdicts
    wait_until(lambda: said in Path(running.server.log_file).read_text())


def test_a_deleted_file_leaves_the_settings_in_force(running: Running, clean: list[bytes]) -> None:
    before = reloads(running, "invalid")

    running.config.unlink()
    wait_until(lambda: reloads(running, "invalid") > before)

    assert post(running.server, "counting", clean[:1])[0].status_code == 200
