"""A study of detectors small enough for tests: weakly coloured images, a network, its witness."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from defense.offline.attacks import Attack, make_attack
from defense.offline.benchmark.arsenal import Arsenal
from defense.offline.benchmark.contestants import Contestant, Fit, Trial
from defense.offline.benchmark.peers import Sample, Score
from defense.offline.benchmark.subject import Subject, open_subject
from defense.offline.cards import load_network
from defense.offline.comparison.backbones import OnPixels
from defense.offline.data import ImageSet
from defense.offline.progress import Silent
from defense.offline.training import LabelledImages

ARSENAL = Arsenal(tuple(map(make_attack, ("fgsm_8", "pgd_2", "pgd_4"))), frozenset({"pgd_4"}))
CLASSES = ("blue", "green", "red")
COUNT = 450


def weak_images(count: int, seed: int, *, side: int = 12, gap: int = 8) -> LabelledImages:
    """Return noisy images whose class is the channel that is a little brighter than the others."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(CLASSES)
    pixels = torch.randint(60, 150, (count, len(CLASSES), side, side), generator=draw)
    pixels[torch.arange(count), labels] += gap
    return LabelledImages(pixels.to(torch.uint8), labels, CLASSES)


class InProcess:
    """A served network in this process: `prepare` makes the network's input of a picture."""

    def __init__(self, backbone: nn.Module, prepare: Callable[[Image.Image], Image.Image]) -> None:
        self.backbone, self.prepare = backbone, prepare

    def decode(self, payload: bytes) -> Tensor:
        with Image.open(io.BytesIO(payload)) as image:
            array = np.array(self.prepare(image), dtype=np.float32)
        return torch.from_numpy(array).permute(2, 0, 1) / 255

    def answer(self, payloads: Sequence[bytes]) -> list[object]:
        with torch.inference_mode():
            logits = self.backbone(torch.stack([self.decode(payload) for payload in payloads]))
        return list(logits.argmax(1).tolist())


def untouched(image: Image.Image) -> Image.Image:
    return image


def serve(card: Path, prepare: Callable[[Image.Image], Image.Image] = untouched) -> InProcess:
    """Return the network of a card, which reads pixels in [0, 1], as a served one."""
    network, normalise = load_network(card)
    return InProcess(OnPixels(network, normalise).requires_grad_(False), prepare)


@contextmanager
def studied(
    served: InProcess, images: ImageSet, folder: Path, witness: Path | None = None
) -> Iterator[Subject]:
    """Open a subject whose results lie in `folder`."""
    with open_subject(
        served, images, folder, witness=witness, seed=0, progress=Silent()
    ) as subject:
        yield subject


@contextmanager
def rows_run(model: nn.Module) -> Iterator[list[int]]:
    """Collect the batch size of every forward pass of a model."""
    sizes: list[int] = []
    handle = model.register_forward_hook(lambda _m, args, _out: sizes.append(len(args[0])))
    try:
        yield sizes
    finally:
        handle.remove()


def spread(name: str, changed: Callable[[Tensor], Tensor], family: str = "") -> Attack:
    """Return an attack that changes images by a function of them."""
    return Attack(name, None, lambda _model: lambda images, _labels: changed(images), family)


def bright(sample: Sample) -> Tensor:
    """Score images by the mean of their pixels: a detector that has learnt nothing."""
    return sample.pixels.double().mean((1, 2, 3))


def entrant(
    name: str = "bright",
    kind: str = "peer",
    *,
    fit: Fit = "clean",
    learn: Callable[[Trial], Score] = lambda _trial: bright,
    slow: bool = False,
) -> Contestant:
    """Return a contestant that scores by brightness, or as `learn` says."""
    return Contestant(name, kind, fit, "brightness", learn, slow)
