"""Attackers without the weights, who only ask a real server, stock and guarded."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from defense.cli.served import Served, served_forms
from defense.offline.attacks.queries import compare
from defense.offline.attacks.queries.boundary import HopSkipJump
from defense.offline.attacks.queries.lockstep import QueryAttack
from defense.offline.attacks.queries.square import Square
from tests.e2e.conftest import Pair
from tests.e2e.requests import total

pytestmark = pytest.mark.server

DIGITS = tuple("0123456789")
EPS = 32 / 255
ATTACKS = [Square(EPS, budget=12, p_init=0.3), HopSkipJump(EPS, budget=24, probes=8)]


@pytest.fixture(scope="module")
def served(counting: Pair) -> Iterator[Served]:
    with served_forms(counting.stock, counting.guarded, DIGITS, reject_fpr=0.05) as pair:
        yield pair


@pytest.fixture(scope="module")
def pixels(clean: list[bytes]) -> Tensor:
    return torch.stack([to_tensor(Image.open(io.BytesIO(image))) for image in clean[:8]])


def judged(served: Served) -> float:
    """Return the requests that the guard has judged, refused ones too."""
    return total(served.metrics_url, "pathguard_requests_total", model="guarded")


@pytest.mark.parametrize("attack", ATTACKS, ids=["square", "boundary"])
def test_an_attack_over_http_is_counted_by_the_guard_to_the_query(
    attack: QueryAttack, served: Served, pixels: Tensor
) -> None:
    labels = served.stock.ask(pixels).labels
    before = judged(served) - served.guarded.asked
    figures = compare(attack, served.stock, served.guarded, pixels, labels, seed=0)
    assert judged(served) - served.guarded.asked == before
    assert figures["n"] == len(pixels)
    assert 0 <= figures["guarded_success"] <= figures["stock_success"] <= 1


def test_the_server_answers_clean_images_and_refuses_striped_ones(
    served: Served, pixels: Tensor
) -> None:
    stripes = (pixels + 0.2 * (torch.arange(32) % 2 * 2 - 1)).clamp(0, 1)
    calm, loud = served.guarded.ask(pixels), served.guarded.ask(stripes)
    assert int(calm.refused.sum()) <= 2
    assert int(loud.refused.sum()) >= 6
    assert calm.probabilities is not None
    answered = calm.probabilities[~calm.refused]
    torch.testing.assert_close(answered.sum(1), torch.ones(len(answered)).double())
