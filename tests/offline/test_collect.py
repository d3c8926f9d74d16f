"""The served model's own preprocessing is run; what its forward passes leave is kept."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from defense.backbone import GatedBackbone
from defense.errors import ArchiveError, DataError
from defense.guard import Guard
from defense.looks import Extras
from defense.offline.collect import (
    BATCH,
    Served,
    backbone_inputs,
    collect,
    collect_inputs,
    describe_backbone,
    input_spec,
)
from defense.offline.progress import Silent
from defense.routers.activation import ActivationRouter
from defense.types import PathLayout, Routed, Site
from tests.conftest import Digits
from tests.looks import ECHO, small_witness
from tests.served import PngHandler, SmallNet, counted_forwards, encoded, hook_count, png


class Steps:
    """Progress that adds up."""

    def __init__(self) -> None:
        self.done = 0

    def advance(self, steps: int = 1) -> None:
        self.done += steps


def collected(served: Served, guard: Guard, payloads: Sequence[bytes]) -> Routed:
    with GatedBackbone(served.backbone, guard.router) as gated:
        return collect(served, gated, payloads, Silent())


def test_images_are_run_in_batches_and_their_runs_stacked(
    net: SmallNet, guard: Guard, digits: Digits
) -> None:
    images, progress = digits.images[: 2 * BATCH + 3], Steps()
    with GatedBackbone(net, guard.router) as gated, counted_forwards(net) as forwards:
        routed = collect(PngHandler(net), gated, map(png, images), progress)
        direct = collect_inputs(net, gated, images)
    assert forwards[:3] == [BATCH, BATCH, 3]
    assert progress.done == len(images)
    assert torch.equal(routed.logits, direct.logits)
    assert torch.equal(routed.path, direct.path)
    torch.testing.assert_close(routed.logits, net(images))


def test_what_was_collected_can_be_fitted_to(net: SmallNet, guard: Guard, digits: Digits) -> None:
    routed = collected(PngHandler(net), guard, [png(digits.images[0])])
    assert not routed.path.is_inference()
    assert not routed.logits.is_inference()


def test_an_image_that_the_handler_cannot_read_is_an_error(
    net: SmallNet, guard: Guard, digits: Digits
) -> None:
    payloads = [png(digits.images[0]), b"garbage", png(digits.images[1])]
    with pytest.raises(
        DataError, match=r"cannot read one of the images .UnidentifiedImageError: .*remove"
    ):
        collected(PngHandler(net), guard, payloads)


def test_images_that_go_one_by_one_but_not_together_are_an_error(
    net: SmallNet, guard: Guard
) -> None:
    payloads = [png(torch.zeros(1, size, size)) for size in (8, 9)]
    with pytest.raises(
        ArchiveError, match=r"one by one but not together .RuntimeError: .*of one size"
    ):
        collected(PngHandler(net), guard, payloads)


class Twice(PngHandler):
    def infer(self, batch: Tensor) -> Tensor:
        super().infer(batch)
        return super().infer(batch)


class Mirrored(PngHandler):
    def infer(self, batch: Tensor) -> Tensor:
        return super().infer(torch.cat([batch, batch.flip(-1)]))[: len(batch)]


class Idle(PngHandler):
    def infer(self, batch: Tensor) -> Tensor:
        return torch.zeros(len(batch), 10)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (Twice, "this archive cannot be guarded: the handler ran the backbone 2 times"),
        (Idle, "this archive cannot be guarded: the handler ran the backbone 0 times"),
        (Mirrored, "runs its backbone on 4 rows for 2 requests; only one row per request"),
    ],
)
def test_a_handler_that_does_not_run_its_backbone_once_per_request_is_an_error(
    net: SmallNet, guard: Guard, digits: Digits, kind: type[PngHandler], sentence: str
) -> None:
    with pytest.raises(ArchiveError, match=sentence):
        collected(kind(net), guard, [png(image) for image in digits.images[:2]])


def test_backbone_inputs_are_what_the_preprocessing_makes(net: SmallNet, digits: Digits) -> None:
    images = digits.images[: BATCH + 1]
    assert torch.equal(backbone_inputs(PngHandler(net), [png(x) for x in images]), images)
    assert hook_count(net) == 0


def test_a_handler_that_never_calls_its_model_is_an_error(net: SmallNet, digits: Digits) -> None:
    with pytest.raises(ArchiveError, match="never calls its model; it cannot be guarded"):
        backbone_inputs(Idle(net), [png(digits.images[0])])
    assert hook_count(net) == 0


def test_an_input_spec_lets_vary_what_varies(net: SmallNet) -> None:
    same = [png(torch.zeros(1, 8, 8))] * 3
    assert input_spec(PngHandler(net), same).shape == (1, 8, 8)
    mixed = [*same, png(torch.zeros(1, 8, 9))]
    spec = input_spec(PngHandler(net), mixed)
    assert (spec.shape, spec.dtype) == ((1, 8, -1), "float32")


class Either(PngHandler):
    """Gives grey images without their channel axis."""

    def decode(self, payload: object) -> Tensor:
        assert isinstance(payload, bytes)
        array = np.array(Image.open(io.BytesIO(payload)))
        return torch.from_numpy(array).float() / 255

    def infer(self, batch: Tensor) -> Tensor:
        self.backbone(batch)
        return torch.zeros(len(batch), 10)


def test_inputs_of_different_rank_are_an_error(net: SmallNet) -> None:
    served = Either(torch.nn.Flatten())
    colour = encoded(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ArchiveError, match="inputs of different rank; it cannot be guarded"):
        input_spec(served, [colour, png(torch.zeros(1, 8, 8))])


def test_a_backbone_is_described_from_a_synthetic_image(net: SmallNet) -> None:
    assert describe_backbone(PngHandler(net)) == "SmallNet, 3 sites, 36 channels"


class Choosy(PngHandler):
    """Reads nothing but its own format."""

    def decode(self, payload: object) -> Tensor:
        raise ValueError("not mine")


def test_a_handler_that_reads_no_common_image_is_described_all_the_same(net: SmallNet) -> None:
    assert describe_backbone(Choosy(net)) == (
        "SmallNet (its handler read none of the test images; 'pathguard fit' will tell)"
    )
    assert hook_count(net) == 0


def test_runs_are_collected_with_a_witness_and_echoes_from_payloads_and_from_inputs_alike(
    net: SmallNet, guard: Guard, digits: Digits
) -> None:
    images, extras = digits.images[: BATCH + 3], Extras(small_witness(), ECHO)
    net.requires_grad_()
    with GatedBackbone(net, guard.router) as gated:
        routed = collect(PngHandler(net), gated, map(png, images), Silent(), extras)
        direct = collect_inputs(net, gated, images, extras)
        plain = collect_inputs(net, gated, images)
    assert routed.witness is not None
    assert routed.echoes is not None
    assert routed.echoes.shape == (len(images), 3, 10)
    assert not routed.echoes.requires_grad
    torch.testing.assert_close(routed.witness, small_witness().logits(images))
    for name in ("logits", "path", "witness", "echoes"):
        assert torch.equal(getattr(routed, name), getattr(direct, name))
    assert torch.equal(routed.path, plain.path)
    assert (plain.look, routed.look) == ("path", "path+witness+echoes")


def test_a_backbone_that_reads_no_images_gets_no_witness() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)).eval()
    sites = PathLayout((Site("1", 0, 3, 1),), ("mean",))
    with (
        GatedBackbone(net, ActivationRouter(sites)) as gated,
        pytest.raises(
            ArchiveError, match=r"do not suit .*: inputs of shape \(2, 4\) are no images"
        ),
    ):
        collect_inputs(net, gated, torch.rand(2, 4), Extras(small_witness()))


def test_a_backbone_that_is_called_by_keyword_gets_no_witness(
    net: SmallNet, guard: Guard, digits: Digits
) -> None:
    class ByKeyword(PngHandler):
        def infer(self, batch: Tensor) -> Tensor:
            with torch.inference_mode():
                logits: Tensor = self.backbone(x=batch)
            return logits

    with (
        GatedBackbone(net, guard.router) as gated,
        pytest.raises(ArchiveError, match="one input row per request by position; fit a guard"),
    ):
        collect(ByKeyword(net), gated, [png(digits.images[0])], Silent(), Extras(small_witness()))
