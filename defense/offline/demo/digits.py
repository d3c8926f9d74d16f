"""What the demo starts from: scikit-learn's digits as PNGs, and a user's archive for them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from defense.offline.archiver import make_archive
from defense.offline.backbones import train_backbone
from defense.offline.demo.digits_model import DigitsNet
from defense.offline.methods import Method
from defense.offline.methods.consistent import ConsistentObjective
from defense.offline.networks import Architecture, CifarResNet
from defense.offline.progress import Progress
from defense.offline.training import TrainingSettings

SIZE = 32
TRAIN, FIT = 600, 900
"""Images to train the network on and to fit the guard on; the rest is held back."""
EPOCHS, BATCH_SIZE, SHIFT = 12, 50, 2
WITNESS = Method(
    CifarResNet,
    ConsistentObjective(eps=0.3),  # a tenth of full scale: digits deviate by a third of it
    TrainingSettings(
        epochs=10,
        batch_size=BATCH_SIZE,
        learning_rate=0.2,
        crop=SHIFT,
        cutout=0,
        small_epochs=0,
        average_decay=0.95,
    ),
    architecture=Architecture((1, 1, 1), (16, 32, 64), stem=16),
    half=True,
)
"""How the demo trains its witness: as `pathguard train --method consistent`, for digits and fresh."""


@dataclass(frozen=True)
class DigitFolders:
    """Folders of class-per-folder PNGs that share no image."""

    train: Path
    fit: Path
    test: Path


def write_digits(folder: Path, *, seed: int) -> DigitFolders:
    """Write the 1,797 digits as 32x32 grey PNGs, split at random into three folders."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    parts = {
        "train": order[:TRAIN],
        "fit": order[TRAIN : TRAIN + FIT],
        "test": order[TRAIN + FIT :],
    }
    for part, rows in parts.items():
        for row in rows:
            target = folder / part / str(digits.target[row])
            target.mkdir(parents=True, exist_ok=True)
            grey = (digits.images[row] * (255 / 16)).astype("uint8")
            image = Image.fromarray(grey).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            image.save(target / f"{row}.png")
    return DigitFolders(folder / "train", folder / "fit", folder / "test")


def train_digits(folder: Path, *, seed: int, progress: Progress) -> nn.Module:
    """Train the demo's network on a folder of digits; about ten seconds on two cores."""
    images, labels = _load(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DigitsNet()
        steps = EPOCHS * -(-len(images) // BATCH_SIZE)
        optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(images)).split(BATCH_SIZE):
                shift = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
                moved = torch.roll(images[rows], shift, (2, 3))
                loss = nn.functional.cross_entropy(net(moved), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            progress.advance()
    return net.eval()


def train_witness(folders: DigitFolders, card: Path, *, seed: int) -> None:
    """Train a witness on the folder `train` and write it with its `card`; about ten seconds."""
    with torch.random.fork_rng(devices=[]):
        train_backbone(
            folders.train.parent,
            card.with_suffix(".safetensors"),
            method=WITNESS,
            architecture=WITNESS.architecture,
            settings=replace(WITNESS.settings, seed=seed),
            checkpoint=card.with_suffix(".checkpoint"),
            command="pathguard demo",
            console=Console(quiet=True),
        )


def pack_digits(net: nn.Module, target: Path) -> None:
    """Pack the network as an ordinary TorchServe archive, as a user would."""
    source = files("defense.offline.demo")
    with (
        tempfile.TemporaryDirectory() as folder,
        as_file(source / "digits_model.py") as model_file,
        as_file(source / "digits_handler.py") as handler,
    ):
        weights = Path(folder) / "digits.pt"
        torch.save(net.state_dict(), weights)
        make_archive(target, handler=str(handler), model_file=model_file, serialized_file=weights)


def _load(folder: Path) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 32, 32) in [-1, 1], as the demo's handler gives them, and labels (N,)."""
    paths = sorted(folder.glob("*/*.png"))
    arrays = [np.asarray(Image.open(path)) for path in paths]
    images = torch.from_numpy(np.stack(arrays))[:, None].float() / 255
    return (images - 0.5) / 0.5, torch.tensor([int(path.parent.name) for path in paths])
