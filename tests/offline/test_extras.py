"""What a guard gets beside the path: a witness that fits the backbone, echoes that leave it calm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from defense.errors import ArtifactError, ConfigError
from defense.looks import Echo, Extras, Perturbation
from defense.offline.cards import load_network
from defense.offline.extras import choose_echo, describe_extras, make_extras
from defense.offline.pixels import PixelSpace
from tests.cli import tiny_card
from tests.coloured import coloured_images
from tests.conftest import Digits
from tests.served import SmallNet

__all__ = ["tiny_card"]  # a fixture that pytest finds here

MIRROR, SHIFT = Perturbation("mirror"), Perturbation("shift", 1)
SPACE = PixelSpace(torch.full((3, 1, 1), 2.0), torch.full((3, 1, 1), -1.0), "RGB")


class LeftBright(nn.Module):
    """Answers whether the left half is brighter than the right one."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = (half.mean((1, 2, 3)) for half in x.chunk(2, dim=3))
        return torch.stack([left, right], dim=1)


def pictures(count: int = 40) -> Tensor:
    """Images (N, 1, 8, 8) whose left half is brighter."""
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.cat([images[..., :4] + 1, images[..., 4:]], dim=3)


def test_a_change_that_turns_answers_over_is_no_echo() -> None:
    assert choose_echo(LeftBright(), pictures(), (MIRROR, SHIFT)) == Echo((SHIFT,))
    both = torch.stack([pictures(1)[0], pictures(1)[0].flip(-1)])
    assert choose_echo(nn.Flatten(), torch.zeros(4, 1, 2, 2), (MIRROR,)) == Echo((MIRROR,))
    assert choose_echo(LeftBright(), both, (MIRROR,)) is None


def test_nine_answers_in_ten_must_stay() -> None:
    even = pictures(20)
    even[:, :, :, 4:] = even[:, :, :, :4].flip(-1) - 1e-3  # mirrored, hardly darker: turns over
    steady = torch.zeros(20, 1, 8, 8)  # a draw stays one
    for turned, echo in ((2, Echo((MIRROR,))), (3, None)):
        mixed = torch.cat([even[:turned], steady[turned:]])
        assert choose_echo(LeftBright(), mixed, (MIRROR,)) == echo


@pytest.mark.parametrize(
    "inputs", [torch.rand(20, 4), torch.zeros(20, 1, 8, 8).long(), torch.rand(0, 1, 8, 8)]
)
def test_inputs_that_are_no_images_have_no_echo(inputs: Tensor) -> None:
    assert choose_echo(nn.Flatten(), inputs, (MIRROR, SHIFT)) is None


def test_extras_without_a_card_are_the_echo_alone(net: SmallNet, digits: Digits) -> None:
    found = make_extras(net, digits.images[:100], witness_card=None, space=None, class_names=("0",))
    assert found.witness is None
    assert found == Extras(echo=choose_echo(net, digits.images[:100], (MIRROR, SHIFT)))
    assert describe_extras(found, None)["witness"] is None


def test_perturbations_can_be_given(net: SmallNet, digits: Digits) -> None:
    blur = Perturbation("blur", 0.01)
    found = make_extras(
        net,
        digits.images[:100],
        witness_card=None,
        space=None,
        class_names=(),
        perturbations=(blur,),
    )
    assert found.echo == Echo((blur,))
    assert describe_extras(found, None)["echo"] == ["blur 0.01"]


def test_a_card_becomes_a_witness_that_reads_what_the_backbone_reads(tiny_card: Path) -> None:
    network, normalise = load_network(tiny_card)
    facts = json.loads(tiny_card.read_text())
    found = make_extras(
        nn.Flatten(),
        torch.zeros(4, 3, 8, 8),
        witness_card=tiny_card,
        space=SPACE,
        class_names=facts["classes"][::-1],
    )
    images = coloured_images(20).pixels
    with torch.no_grad():
        own = network(normalise(images))
    assert found.witness is not None
    told = found.witness.logits(SPACE.to_input(images / 255)).flip(1)
    torch.testing.assert_close(told, own, rtol=1e-2, atol=1e-2)
    assert found.witness.side == images.shape[-1]
    described = describe_extras(found, tiny_card)["witness"]
    assert described == {"card": "tiny.json", "sha256": facts["sha256"]}


def test_a_witness_without_pixels_is_an_error(tiny_card: Path) -> None:
    with pytest.raises(ConfigError, match="a witness reads pixels, and the preprocessing here is"):
        make_extras(
            nn.Flatten(), torch.zeros(1, 4), witness_card=tiny_card, space=None, class_names=()
        )


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        ({"network": "ClassGatedResNet"}, "cannot be read|do not fit the network"),
        ({"classes": None}, "does not say which classes its network knows, or of which size"),
        ({"input": "shape"}, "does not say which classes its network knows, or of which size"),
    ],
)
def test_a_card_of_another_kind_is_an_error(
    tiny_card: Path, tmp_path: Path, edit: dict[str, object], sentence: str
) -> None:
    facts = json.loads(tiny_card.read_text())
    if "network" in edit:
        facts["architecture"] |= edit
    elif "input" in edit:
        del facts["input"]["shape"]
    else:
        facts |= edit
    card = tmp_path / "tiny.json"
    card.write_text(json.dumps(facts))
    shutil.copy(tiny_card.with_suffix(".safetensors"), tmp_path)
    with pytest.raises(ArtifactError, match=sentence):
        make_extras(
            nn.Flatten(), torch.zeros(1, 3, 8, 8), witness_card=card, space=SPACE, class_names=()
        )
