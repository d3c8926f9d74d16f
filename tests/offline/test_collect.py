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


def test_images_that_go_one_by_one_but_not_together_are_run_one_by_one(
    net: SmallNet, guard: Guard
) -> None:
    payloads = [png(torch.zeros(1, size, size)) for size in (8, 9)]
    with counted_forwards(net) as forwards:
        together = collected(PngHandler(net), guard, payloads)
    alone = [collected(PngHandler(net), guard, [payload]) for payload in payloads]
    assert forwards == [1, 1]
    assert torch.equal(together.path, torch.cat([one.path for one in alone]))


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
        (Twice, "runs its backbone on 4 rows for 2 requests; only a fixed number of rows per"),
        (Idle, "this archive cannot be guarded: the handler ran the backbone 0 times"),
        (Mirrored, "runs its backbone on 4 rows for 2 requests; only a fixed number of rows per"),
    ],
)
def test_a_handler_that_runs_other_rows_than_those_of_its_views_is_an_error(
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


class Random(PngHandler):
    """Shows its backbone every image and a crop at a place that chance chooses."""

    def infer(self, batch: Tensor) -> Tensor:
        place = int(torch.randint(1, 8, ()))
        return super().infer(torch.cat([batch, batch.roll(place, -1)]))[: len(batch)]


class Sorted(PngHandler):
    """Runs each image and its mirror image, the darkest images first."""

    def infer(self, batch: Tensor) -> Tensor:
        order = batch.flatten(1).sum(1).argsort()
        views = torch.stack([batch[order], batch[order].flip(-1)], 1)
        return super().infer(views.flatten(0, 1))[::2][order.argsort()]


class Darkest(PngHandler):
    """Runs the darkest images first."""

    def infer(self, batch: Tensor) -> Tensor:
        order = batch.flatten(1).sum(1).argsort()
        return super().infer(batch[order])[order.argsort()]


class Sized(PngHandler):
    """Runs as many rows of an image as it is bright."""

    def infer(self, batch: Tensor) -> Tensor:
        times = batch.flatten(1).mean(1).mul(4).long() + 1
        return super().infer(batch.repeat_interleave(times, 0))[: len(batch)]


class Scales(PngHandler):
    """Runs an image in two sizes."""

    def infer(self, batch: Tensor) -> Tensor:
        super().infer(batch)
        return super().infer(batch[..., :-1, :-1])


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (Random, "2 rows per request, in a batch not the same ones or mixed"),
        (Sorted, "2 rows per request, in a batch not the same ones or mixed"),
        (Darkest, "1 rows per request, in a batch not the same ones or mixed"),
        (Sized, r"a number of rows that depends on the image \(2, 3, 4\); only a fixed"),
        (Scales, "inputs of several sizes; only inputs of one size can be fitted to"),
    ],
)
def test_a_handler_whose_rows_cannot_be_told_apart_is_an_error(
    net: SmallNet, digits: Digits, kind: type[PngHandler], sentence: str
) -> None:
    bright = [
        image.clamp(least, 1) for least, image in zip((0.8, 0.4, 0), digits.images, strict=False)
    ]
    torch.manual_seed(0)
    with pytest.raises(ArchiveError, match=sentence):
        input_spec(kind(net), [png(image) for image in bright])


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
        pytest.raises(ArchiveError, match="the inputs of every request by position; fit a guard"),
    ):
        collect(ByKeyword(net), gated, [png(digits.images[0])], Silent(), Extras(small_witness()))
