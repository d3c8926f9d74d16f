"""A folded witness answers as the network that it was made of."""

from __future__ import annotations

import pytest
import torch

from defense.errors import ArtifactError
from defense.offline.networks import Architecture, DecoupledResNet
from defense.offline.witness import fold
from tests.looks import NAMES, NORMALISATION, small_network

SCALE = torch.tensor([3.0, 4.0, 5.0]).view(-1, 1, 1)
SHIFT = torch.tensor([-1.0, -2.0, 0.5]).view(-1, 1, 1)


def pixels(count: int = 6) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 16, 16), generator=draw).to(torch.uint8)


@pytest.mark.parametrize("seed", range(3))
def test_folded_logits_are_those_of_the_module_whatever_its_batch_norms_hold(seed: int) -> None:
    network, images = small_network(seed), pixels()
    assert bool((network.stages[0][0].bn1.weight < 0).any())  # type: ignore[index]
    witness = fold(
        network,
        NORMALISATION,
        backbone_scale=SCALE,
        backbone_shift=SHIFT,
        classes=NAMES,
        wanted=NAMES,
        side=16,
        dtype=torch.float32,
    )
    expected = network(NORMALISATION(images))
    found = witness.logits(images / 255 * SCALE + SHIFT)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_its_logits_stand_in_the_order_of_the_backbones_classes() -> None:
    network, images = small_network(), pixels()
    wanted = NAMES[::-1]
    witness = fold(
        network,
        NORMALISATION,
        backbone_scale=SCALE,
        backbone_shift=SHIFT,
        classes=NAMES,
        wanted=wanted,
        side=16,
        dtype=torch.float32,
    )
    found = witness.logits(images / 255 * SCALE + SHIFT)
    torch.testing.assert_close(found, network(NORMALISATION(images)).flip(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ((*NAMES[:9], "cat"), "'9' is known to one of them alone; take a witness for the same"),
        (NAMES[:9], "backbone 9 classes, and '9' is known to one of them alone"),
        ((*NAMES, "1"), "names repeat or are missing"),
    ],
)
def test_a_witness_for_other_classes_is_an_error(wanted: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ArtifactError, match=sentence):
        fold(
            small_network(),
            NORMALISATION,
            backbone_scale=SCALE,
            backbone_shift=SHIFT,
            classes=NAMES,
            wanted=wanted,
        )


def test_a_network_whose_blocks_do_more_is_an_error() -> None:
    network = DecoupledResNet(Architecture((1,), (4,), stem=4)).eval()
    with pytest.raises(ArtifactError, match="a block of the witness is a DecoupledBlock, which"):
        fold(
            network,
            NORMALISATION,
            backbone_scale=SCALE,
            backbone_shift=SHIFT,
            classes=NAMES,
            wanted=NAMES,
        )
