"""A trained network as an ordinary archive: packed, opened, answering as the network itself does."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from defense.archive import read_archive
from defense.errors import ArtifactError
from defense.obstacles import archive_obstacles
from defense.offline.archived import pack_network
from defense.offline.cards import load_network
from handlers.torchserve_inner import open_archive
from tests.cli import tiny_card
from tests.coloured import coloured_images

__all__ = ["tiny_card"]  # a fixture that pytest finds here


def test_a_packed_network_answers_with_its_classes_and_probabilities(
    tiny_card: Path, tmp_path: Path
) -> None:
    pack_network(tiny_card, tmp_path / "tiny.mar")
    assert archive_obstacles(read_archive(tmp_path / "tiny.mar")) == []
    images = coloured_images(4)
    payloads = []
    for pixels in images.pixels:
        buffer = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
        payloads.append(buffer.getvalue())
    network, normalise = load_network(tiny_card)
    names = json.loads(tiny_card.read_text())["classes"]
    with torch.inference_mode():
        expected = network(normalise(images.pixels)).softmax(1)
    with open_archive(tmp_path / "tiny.mar", tmp_path / "open") as served:
        answers = served.answer(payloads)
    for answer, row in zip(answers, expected, strict=True):
        assert isinstance(answer, dict)
        assert list(answer) == [names[i] for i in row.argsort(descending=True)]
        assert sum(answer.values()) == pytest.approx(1)
        assert max(answer.values()) == pytest.approx(float(row.max()), abs=1e-5)


def test_a_grey_image_of_another_size_is_answered_as_well(tiny_card: Path, tmp_path: Path) -> None:
    pack_network(tiny_card, tmp_path / "tiny.mar")
    buffer = io.BytesIO()
    Image.new("L", (20, 30), 90).save(buffer, "PNG")
    with open_archive(tmp_path / "tiny.mar", tmp_path / "open") as served:
        (answer,) = served.answer([buffer.getvalue()])
    assert isinstance(answer, dict)
    assert len(answer) == 3


def test_no_pickle_is_in_the_archive(tiny_card: Path, tmp_path: Path) -> None:
    pack_network(tiny_card, tmp_path / "tiny.mar")
    with open_archive(tmp_path / "tiny.mar", tmp_path / "open"):
        files = {path.name for path in (tmp_path / "open").rglob("*") if path.is_file()}
    assert {"networks.py", "card.json", "weights.safetensors", "network_handler.py"} <= files
    assert not [name for name in files if name.endswith((".pt", ".pth", ".pkl"))]


def test_a_card_without_weights_is_not_packed(tiny_card: Path, tmp_path: Path) -> None:
    alone = tmp_path / "tiny.json"
    alone.write_text(tiny_card.read_text())
    with pytest.raises(ArtifactError, match="and its weights cannot be read"):
        pack_network(alone, tmp_path / "tiny.mar")
