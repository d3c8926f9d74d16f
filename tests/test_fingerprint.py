"""A fingerprint changes with whatever makes a network answer differently, and with nothing else."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from torch import nn

from defense.fingerprint import fingerprint
from tests.served import SmallNet, seeded_net


def test_the_fingerprint_is_the_sha256_of_names_types_shapes_and_bytes() -> None:
    net = nn.Linear(2, 1, bias=False)
    nn.init.constant_(net.weight, 1.0)
    expected = hashlib.sha256(b"weight|torch.float32|(1, 2)|" + b"\x00\x00\x80\x3f" * 2)
    assert fingerprint(net) == expected.hexdigest()


def test_equal_weights_have_equal_fingerprints() -> None:
    net = seeded_net()
    assert fingerprint(net) == fingerprint(copy.deepcopy(net)) == fingerprint(seeded_net())


def test_one_flipped_bit_changes_the_fingerprint(net: SmallNet) -> None:
    before = fingerprint(net)
    net.head.bias.view(torch.int32)[0] ^= 1
    assert fingerprint(net) != before


def test_a_buffer_counts_like_a_weight() -> None:
    norm = nn.BatchNorm1d(3)
    before = fingerprint(norm)
    assert norm.running_mean is not None
    norm.running_mean[1] = 0.5
    assert fingerprint(norm) != before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_has_a_fingerprint_of_its_own(net: SmallNet, dtype: torch.dtype) -> None:
    before = fingerprint(net)
    assert fingerprint(net.to(dtype)) != before


def test_the_shape_counts_although_the_bytes_are_the_same() -> None:
    wide, tall = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
    for net in (wide, tall):
        nn.init.ones_(net.weight)
    assert fingerprint(wide) != fingerprint(tall)


def test_the_memory_layout_does_not_count(net: SmallNet) -> None:
    before = fingerprint(net)
    assert fingerprint(net.to(memory_format=torch.channels_last)) == before


def test_scalars_and_extra_state_are_read_too() -> None:
    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.tensor(3))

        def get_extra_state(self) -> object:
            return {"no": "tensor"}

    assert len(fingerprint(Extra())) == 64
