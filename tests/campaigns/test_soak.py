"""A short soak: every count agrees, also under bursts that fill the queue."""

from __future__ import annotations

from pathlib import Path

import pytest

from defense.offline.progress import Silent
from tests.campaigns.soak import page, soak
from tests.campaigns.traffic import MIX, digits_archive

pytestmark = pytest.mark.server

SHORT = 1000


def test_every_count_agrees_after_mixed_traffic_and_bursts(tmp_path: Path) -> None:
    archive, bodies = digits_archive(tmp_path, seed=0, trained=False)
    assert set(bodies) == set(MIX)

    found = soak(archive, bodies, requests=SHORT, seed=0, progress=Silent())

    assert [what for what, so in found.kept(long=False).items() if not so] == []
    assert sum(found.statuses.values()) == SHORT
    assert {"200 accept", "200 describe", "400 invalid", "413 invalid"} <= set(found.statuses)
    assert all(check.of in page(found, 0) for check in found.checks)
