"""Attributions on demand, of a real network: one at a time, in time, and of the right network."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defense import attributions
from defense.config import Limits
from defense.console.lens import Lens
from defense.errors import ConfigError, DataError, SiteError
from defense.fingerprint import fingerprint
from tests.conftest import Digits
from tests.console.trails import name_of
from tests.served import PngHandler, SmallNet, png

FIRST, SECOND = name_of(1), name_of(2)


@pytest.fixture
def network(trained: SmallNet) -> str:
    return fingerprint(trained)


@pytest.fixture
def sent(digits: Digits) -> bytes:
    return png(digits.images[3])


def make_lens(net: SmallNet, budget: float = 60) -> Lens:
    return Lens(PngHandler(net), Limits(), budget=budget)


def test_an_attribution_is_drawn_and_kept(trained: SmallNet, network: str, sent: bytes) -> None:
    lens = make_lens(trained)

    seen = lens.look(FIRST, sent, "saliency", network)

    assert seen.png.startswith(b"\x89PNG")
    assert not seen.signed
    assert lens.kept(FIRST, "saliency") is seen
    assert lens.look(FIRST, sent, "saliency", network[:16]) is seen
    assert lens.kept(FIRST, "neflag") is None


def test_an_unknown_method_names_the_nearest(trained: SmallNet, network: str, sent: bytes) -> None:
    with pytest.raises(
        ConfigError, match="no attribution method 'salency'; did you mean 'saliency'"
    ):
        make_lens(trained).look(FIRST, sent, "salency", network)


@pytest.mark.parametrize("other", ["ab" * 32, ""])
def test_another_network_explains_nothing(trained: SmallNet, sent: bytes, other: str) -> None:
    with pytest.raises(DataError, match=r"another network .* answered this request than --archive"):
        make_lens(trained).look(FIRST, sent, "saliency", other)


def test_a_payload_that_the_handler_cannot_read_says_so(trained: SmallNet, network: str) -> None:
    with pytest.raises(DataError, match="the archive's handler cannot read this payload"):
        make_lens(trained).look(FIRST, b"junk", "saliency", network)


def test_a_payload_that_the_server_would_not_open_is_not_shown_to_the_handler(
    trained: SmallNet, network: str, sent: bytes
) -> None:
    strict = Lens(PngHandler(trained), Limits(max_pixels=10), budget=60)

    with pytest.raises(DataError, match="the payload cannot be shown: too many pixels"):
        strict.look(FIRST, sent, "saliency", network)


def test_the_neurons_that_the_answer_rests_on_come_with_it(
    trained: SmallNet, network: str, sent: bytes
) -> None:
    found = make_lens(trained).look(FIRST, sent, "saliency", network).neurons

    assert len(found) == 5
    assert found[0].difference == max(one.difference for one in found) > 0


def test_a_network_that_cannot_be_taken_apart_names_no_neurons(
    trained: SmallNet, network: str, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object) -> None:
        raise SiteError("its parts cannot be reached")

    monkeypatch.setattr("defense.console.lens.influential", closed)

    assert make_lens(trained).look(FIRST, sent, "saliency", network).neurons == ()


def test_a_network_without_images_has_nothing_to_draw(sent: bytes) -> None:
    class Flattening(PngHandler):
        def infer(self, batch: Tensor) -> Tensor:
            return super().infer(batch.flatten(1))

    linear = nn.Linear(64, 10).eval()
    lens = Lens(Flattening(linear), Limits(), budget=60)

    with pytest.raises(DataError, match="the network in this archive takes no images"):
        lens.look(FIRST, sent, "saliency", fingerprint(linear))


def test_a_slow_attribution_is_left_to_a_later_visit(
    trained: SmallNet, network: str, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def slow(method: str, model: Any, inputs: Tensor, target: Sequence[int]) -> Tensor:
        go_on.wait(60)
        return torch.ones_like(inputs)

    monkeypatch.setattr(attributions, "attribute", slow)
    lens = make_lens(trained, budget=0.05)

    with pytest.raises(DataError, match=r"takes longer than 0.05 s and goes on; load this page"):
        lens.look(FIRST, sent, "saliency", network)
    with pytest.raises(DataError, match="another attribution is being computed"):
        lens.look(SECOND, sent, "saliency", network)
    go_on.set()
    while lens.kept(FIRST, "saliency") is None:
        threading.Event().wait(0.01)

    assert lens.look(FIRST, sent, "saliency", network).png.startswith(b"\x89PNG")
