"""A witness runs as data: on any size of image, in single precision, each row by itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from defense.errors import ArtifactError
from defense.state import join, split
from defense.witness import Witness
from tests.looks import small_witness
from tests.served import images_like_noise


def test_a_row_has_the_same_logits_alone_and_among_others() -> None:
    witness, images = small_witness(), images_like_noise(5, 0)
    whole = witness.logits(images)
    alone = torch.cat([witness.logits(image[None]) for image in images])
    assert whole.shape == (5, 10)
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5)


def test_images_of_another_side_are_resized_to_its_own() -> None:
    witness, flat = small_witness(), torch.full((1, 1, 24, 20), 0.3)
    torch.testing.assert_close(witness.logits(flat), witness.logits(flat[..., :8, :8]))


def test_its_logits_have_a_gradient_where_gradients_are_on_even_if_it_first_ran_without() -> None:
    witness, images = small_witness(torch.float16), images_like_noise(2, 0)
    with torch.inference_mode():
        first = witness.logits(images)
    images.requires_grad_()
    logits = witness.logits(images)
    logits.sum().backward()
    assert logits.dtype == torch.float32
    assert torch.equal(first, logits.detach())
    assert images.grad is not None
    assert bool(images.grad.abs().sum() > 0)


def test_half_precision_on_disk_is_single_precision_at_work() -> None:
    single, half = small_witness(), small_witness(torch.float16)
    images = images_like_noise(4, 0)
    assert half.stem.weight.dtype == torch.float16
    torch.testing.assert_close(half.logits(images), single.logits(images), rtol=0.05, atol=0.05)


def test_it_comes_back_from_an_artefact(tmp_path: Path) -> None:
    witness, images = small_witness(torch.float16), images_like_noise(3, 0)
    described, tensors = split(witness, "witness")
    again = join(Witness, described, load(save(tensors)))
    assert torch.equal(again.logits(images), witness.logits(images))


def test_a_side_that_is_none_is_an_error() -> None:
    with pytest.raises(ArtifactError, match="reads images of side 0; fit the guard again"):
        dataclasses.replace(small_witness(), side=0)
