"""What tests of the study of detectors share: one tiny trained network and one gathered study."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from defense.offline.backbones import train_backbone
from defense.offline.benchmark import splits, trials
from defense.offline.benchmark.trials import Material, gather
from defense.offline.data import ImageSet, read_images
from defense.offline.methods import METHODS
from tests.coloured import SETTINGS, TINY, write_folder
from tests.offline.studied import ARSENAL, COUNT, serve, studied, weak_images


@pytest.fixture(scope="session")
def weak_card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The card of a network that gets most weakly coloured images right."""
    folder = tmp_path_factory.mktemp("weak")
    for number, (split, count) in enumerate((("train", 150), ("test", 30))):
        write_folder(folder / "data", split, weak_images(count, seed=number + 1))
    train_backbone(
        folder / "data",
        folder / "weak.safetensors",
        method=METHODS["plain"],
        architecture=TINY,
        settings=replace(SETTINGS, epochs=6, average_decay=0.5, small_epochs=0),
        checkpoint=folder / "checkpoint",
        command="",
    )
    return folder / "weak.json"


@pytest.fixture(scope="session")
def weak_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that the network has not seen, in a folder per class."""
    folder = tmp_path_factory.mktemp("images")
    write_folder(folder, "unseen", weak_images(COUNT, seed=3))
    return folder / "unseen"


@pytest.fixture(scope="session")
def weak_set(weak_folder: Path) -> ImageSet:
    return read_images(weak_folder)


@pytest.fixture(scope="session")
def material(
    weak_card: Path, weak_set: ImageSet, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Material]:
    """Everything gathered for a study with a witness and echoes: change nothing of it."""
    kept = tmp_path_factory.mktemp("kept")
    with studied(serve(weak_card), weak_set, kept, weak_card) as subject:
        with pytest.MonkeyPatch.context() as patch:
            shrink(patch)
            pools = splits.make_pools(torch.arange(COUNT) % 5 == 0)
            gathered = gather(subject, pools, ARSENAL)
        yield gathered


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Let a study make do with few images."""
    patch.setattr(splits, "LEAST", 50)
    patch.setattr(trials, "CONTROL_IMAGES", {"open": 60, "sealed": 20})
    patch.setattr(trials, "SLOW_IMAGES", {"open": 40, "sealed": 20})
    patch.setattr(trials, "LEVELS", {"open": (1, 2), "sealed": (1,)})
