"""Train a classifier of small images on a CPU or a GPU; an interrupted run resumes bit for bit.

The recipe follows the fast-CIFAR literature (https://arxiv.org/abs/2404.00498): a frozen whitening
stem, one triangle of learning rate, alternating flips, cutout, small images first, averaged weights.
Images are `(N, 3, H, W)` uint8 throughout; networks see them as `(pixels / 255 - mean) / std`.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn
from torch.nn import functional

from defense.errors import ArtifactError, ConfigError, DataError
from defense.offline.data import read_images
from defense.offline.networks import Normalisation
from defense.offline.progress import Progress, bar

EVALUATION_BATCH = 500
CALIBRATION_BINS = 15
DECAYING = (nn.Conv2d, nn.Linear)
"""Layers whose weights decay."""


@dataclass(frozen=True)
class TrainingSettings:
    """What, beside network and images, decides the weights; lengths are in pixels or epochs."""

    epochs: int = 40
    batch_size: int = 500
    learning_rate: float = 0.5
    momentum: float = 0.9
    weight_decay: float = 7e-4
    warmup: float = 0.2
    """Share of all steps, in (0, 1), after which the learning rate peaks."""
    crop: int = 4
    """Images move by up to this many pixels each way; the border mirrors them."""
    cutout: int = 10
    """Side of the square that is hidden, wholly or in part, in every image; 0 hides nothing."""
    small_epochs: int = 18
    small_size: int = 24
    """The first `small_epochs` epochs see images shrunk to this side."""
    average_decay: float = 0.99
    """Per step; the result is this exponential average of the weights."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that no run can follow."""
        for name in ("epochs", "batch_size", "learning_rate", "small_size"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}.")
        for name in ("warmup", "average_decay"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} must lie between 0 and 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class LabelledImages:
    """Images `(N, 3, H, W)` uint8 with labels `(N,)` int64 into `classes`."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def to(self, device: torch.device) -> LabelledImages:
        """Return the same images on `device`."""
        return LabelledImages(self.pixels.to(device), self.labels.to(device), self.classes)

    @cached_property
    def normalisation(self) -> Normalisation:
        """Return the statistics of these pixels, to four digits so that a card can state them."""
        values = torch.arange(256, dtype=torch.float64) / 255
        mean, std = [], []
        for channel in self.pixels.cpu().unbind(1):
            share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
            centre = (share * values).sum()
            mean.append(round(centre.item(), 4))
            std.append(round((share * (values - centre) ** 2).sum().sqrt().item(), 4))
        return Normalisation(tuple(mean), tuple(std))


def read_split(source: Path, split: str) -> LabelledImages:
    """Decode `split/CLASS/*` of a folder or a zip file; all images must have one size."""
    found = read_images(source / split)
    if found.labels is None:
        raise DataError(f"The images of {source / split} must lie in one folder per class.")
    payloads = found.payloads(range(len(found)))
    pixels = [decode(payload, name) for payload, name in zip(payloads, found.names, strict=True)]
    sizes = {tuple(image.shape) for image in pixels}
    if len(sizes) > 1:
        raise DataError(
            f"The images of {source / split} must share one size, found {sorted(sizes)}."
        )
    return LabelledImages(torch.stack(pixels), torch.tensor(found.labels), found.class_names)


def decode(payload: bytes, name: str) -> Tensor:
    """Return one image file as `(3, H, W)` uint8."""
    try:
        with Image.open(BytesIO(payload)) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{name} is no readable image ({error}); remove it.") from error


class Objective(Protocol):
    """What a training method minimises: a frozen dataclass of its weights and constants."""

    def loss(self, network: nn.Module, x: Tensor, labels: Tensor, epoch: int) -> Tensor:
        """Return the mean loss, a scalar, of `x` `(B, 3, S, S)` and `labels` `(B,)` in `epoch`.

        `network` is in training mode. Chance comes from torch's global generator, which is seeded
        for every epoch.
        """
        ...

    def settle(self, network: nn.Module, epoch: int) -> None:
        """Put weights back where they belong, after every step; then those of the average."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Plain training: cross-entropy to labels smoothed by this share."""

    label_smoothing: float = 0.1

    def loss(self, network: nn.Module, x: Tensor, labels: Tensor, epoch: int) -> Tensor:
        """Return the mean cross-entropy."""
        return functional.cross_entropy(
            logits(network, x), labels, label_smoothing=self.label_smoothing
        )

    def settle(self, network: nn.Module, epoch: int) -> None:
        """Any weights will do."""


def logits(network: nn.Module, x: Tensor) -> Tensor:
    """Return the float32 logits `(B, K)` of a pass in bfloat16."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return network(x).float()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: mean training loss, accuracy on the validation images (if any), seconds."""

    epoch: int
    loss: float
    accuracy: float | None
    seconds: float

    def line(self) -> str:
        """Return the epoch as a line for people."""
        accuracy = "" if self.accuracy is None else f", validation accuracy {self.accuracy:.4f}"
        return f"epoch {self.epoch}: loss {self.loss:.4f}{accuracy}, {self.seconds:.0f} s"


@dataclass(frozen=True)
class Evaluation:
    """Accuracy, expected calibration error (15 bins) and accuracy per class, all in [0, 1]."""

    accuracy: float
    calibration_error: float
    per_class: dict[str, float]


@dataclass
class Run:
    """Everything that changes while training; a checkpoint is exactly this."""

    network: nn.Module
    average: nn.Module
    optimizer: torch.optim.SGD
    history: list[EpochRecord]

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the run by name, sharing memory with the run."""
        named = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        named |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for index, state in enumerate(self.optimizer.state.values()):
            named[f"momentum.{index}"] = state["momentum_buffer"]
        return named


def train(
    network: nn.Module,
    images: LabelledImages,
    settings: TrainingSettings,
    *,
    checkpoint: Path,
    objective: Objective | None = None,
    validation: LabelledImages | None = None,
    console: Console | None = None,
) -> tuple[EpochRecord, ...]:
    """Train `network` in place, on the device it lives on, and return what each epoch reached.

    After every epoch the run is written to `checkpoint`; if that file exists, it continues there.
    """
    objective = objective or CrossEntropy()
    images = images.to(next(network.parameters()).device)
    steps = steps_per_epoch(images, settings)
    run = new_run(network, settings)
    identity = identify(network, images, settings, objective)
    if checkpoint.exists():
        restore(run, checkpoint, identity)
    console = console or Console()
    with bar(console, "training", settings.epochs * steps) as progress:
        progress.advance(len(run.history) * steps)
        while len(run.history) < settings.epochs:
            record = run_epoch(run, images, settings, objective, validation, progress)
            run.history.append(record)
            save(run, checkpoint, identity)
            console.print(record.line())
    network.load_state_dict(run.average.state_dict())
    network.eval()
    return tuple(run.history)


def new_run(network: nn.Module, settings: TrainingSettings) -> Run:
    """Return a run that has made no step yet; only convolution and linear weights decay."""
    network.to(memory_format=torch.channels_last)
    trained = [value for value in network.parameters() if value.requires_grad]
    layers = (module for module in network.modules() if isinstance(module, DECAYING))
    decaying = {module.weight for module in layers}
    groups: list[dict[str, Any]] = [
        {"params": [value for value in trained if value in decaying]},
        {"params": [value for value in trained if value not in decaying], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(
        groups,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=True,
    )
    for group in optimizer.param_groups:
        for value in group["params"]:
            optimizer.state[value]["momentum_buffer"] = torch.zeros_like(value)
    return Run(network, deepcopy(network), optimizer, [])


def run_epoch(
    run: Run,
    images: LabelledImages,
    settings: TrainingSettings,
    objective: Objective,
    validation: LabelledImages | None,
    progress: Progress,
) -> EpochRecord:
    """Train for the epoch that comes after the run's history and return its record."""
    started, epoch = time.monotonic(), len(run.history)
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed * 1_000_003 + epoch + 1)
        for x, labels, rate in batches(images, settings, epoch):
            loss = objective.loss(run.network.train(), x, labels, epoch)
            step(run, loss, rate)
            objective.settle(run.network, epoch)
            follow(run.average, run.network, settings.average_decay)
            objective.settle(run.average, epoch)
            losses.append(loss.detach())
            progress.advance()
    mean = torch.stack(losses).mean().item()
    if not math.isfinite(mean):
        raise ConfigError(
            f"Training diverged in epoch {epoch + 1} (its mean loss is {mean}); "
            f"choose a learning_rate below {settings.learning_rate}."
        )
    accuracy = None
    if validation is not None:
        with torch.autocast(images.pixels.device.type, torch.bfloat16):
            accuracy = evaluate(run.average, validation, images.normalisation).accuracy
    return EpochRecord(epoch + 1, mean, accuracy, time.monotonic() - started)


def steps_per_epoch(images: LabelledImages, settings: TrainingSettings) -> int:
    """Return the number of whole batches; what is left over waits for another epoch's order."""
    steps = len(images) // settings.batch_size
    if steps == 0:
        raise DataError(
            f"Training needs at least one batch of {settings.batch_size} images, got {len(images)}."
        )
    return steps


def learning_rate(progress: float, settings: TrainingSettings) -> float:
    """Return the rate at `progress` in [0, 1] of the run: up to the peak, then down to zero."""
    triangle = min(progress / settings.warmup, (1 - progress) / (1 - settings.warmup))
    return settings.learning_rate * triangle


def batches(
    images: LabelledImages, settings: TrainingSettings, epoch: int
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yield `(x, labels, learning rate)` of one epoch, all of it decided by (seed, epoch).

    x: `(B, 3, S, S)` normalised float32. Every image is mirrored in every second epoch, moved and
    partly hidden (cutout, https://arxiv.org/abs/1708.04552) anew in each.
    """
    draw = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch + 1)
    always = torch.Generator().manual_seed(settings.seed * 1_000_003)
    mirrored = torch.rand(len(images), generator=always) < 0.5
    mirrored ^= epoch % 2 == 1
    steps = steps_per_epoch(images, settings)
    order = torch.randperm(len(images), generator=draw)[: steps * settings.batch_size]
    for number, chosen in enumerate(order.view(steps, settings.batch_size)):
        shifts = torch.randint(-settings.crop, settings.crop + 1, (2, len(chosen)), generator=draw)
        x = images.normalisation(shifted(images.pixels, chosen, shifts, mirrored[chosen]))
        x = hidden(x, torch.rand((2, len(chosen)), generator=draw), settings.cutout)
        if epoch < settings.small_epochs:
            x = shrunk(x, settings.small_size)
        progress = (epoch * steps + number + 0.5) / (settings.epochs * steps)
        yield x, images.labels[chosen.to(x.device)], learning_rate(progress, settings)


def shifted(pixels: Tensor, chosen: Tensor, shifts: Tensor, mirrored: Tensor) -> Tensor:
    """Return the `chosen` `(B,)` of `pixels` `(N, C, H, W)`, moved by `shifts` `(2, B)` pixels.

    Rows and columns that come from outside of the image are those that mirror them inside.
    """
    height, width = pixels.shape[2:]
    rows = reflected(shifts[0][:, None] + torch.arange(height), height)
    columns = reflected(shifts[1][:, None] + torch.arange(width), width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    chosen, rows, columns = (index.to(pixels.device) for index in (chosen, rows, columns))
    moved = pixels[chosen[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def hidden(x: Tensor, centres: Tensor, side: int) -> Tensor:
    """Return `x` `(B, C, H, W)` with the mean colour in a square of `side` pixels of each image.

    centres: `(2, B)` in [0, 1), relative to height and width; squares may reach over the border.
    """
    size = torch.tensor(x.shape[2:])
    first = (centres * size[:, None]).long() - side // 2
    rows, columns = (
        (offset >= 0) & (offset < side)
        for offset in (
            torch.arange(n) - start[:, None] for n, start in zip(size, first, strict=True)
        )
    )
    shown = ~(rows[:, None, :, None] & columns[:, None, None, :])
    return torch.mul(x, shown.to(x.device, x.dtype))


def reflected(index: Tensor, size: int) -> Tensor:
    """Mirror indices just outside of `range(size)` back into it."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def shrunk(x: Tensor, side: int) -> Tensor:
    """Return float images `(B, C, H, W)` at `(B, C, side, side)`, smoothed before sampling."""
    return functional.interpolate(x, size=(side, side), mode="bilinear", antialias=True)


def step(run: Run, loss: Tensor, rate: float) -> None:
    """Take one optimiser step down the gradient of `loss`, a scalar, at the given rate."""
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.zero_grad()
    torch.autograd.backward(loss)
    run.optimizer.step()


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move every weight and statistic of `average` towards `network` by `1 - decay`."""
    current = network.state_dict()
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            value.lerp_(current[name], 1 - decay)
        else:
            value.copy_(current[name])


@torch.no_grad()
def evaluate(network: nn.Module, images: LabelledImages, normalise: Normalisation) -> Evaluation:
    """Return how well `network`, in eval mode, knows `images`; the caller decides the precision."""
    device = next(network.parameters()).device
    network.eval()
    logits = [
        network(normalise(images.pixels[first : first + EVALUATION_BATCH].to(device))).float().cpu()
        for first in range(0, len(images), EVALUATION_BATCH)
    ]
    confidence, predicted = torch.cat(logits).softmax(1).max(1)
    labels = images.labels.cpu()
    hits = (predicted == labels).double()
    per_class = {
        name: hits[labels == index].mean().item() for index, name in enumerate(images.classes)
    }
    return Evaluation(hits.mean().item(), calibration_error(confidence, hits), per_class)


def calibration_error(confidence: Tensor, hits: Tensor) -> float:
    """Return the expected calibration error of `confidence` `(N,)` in [0, 1] against 0/1 `hits`."""
    bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    gaps = torch.zeros(CALIBRATION_BINS, dtype=torch.float64)
    gaps.index_add_(0, bins, confidence.double() - hits)
    return gaps.abs().sum().item() / len(hits)


@torch.no_grad()
def whiten(network: nn.Module, images: LabelledImages) -> None:
    """Set and freeze the first convolution: whitened directions of patches, with both signs.

    The directions are the leading eigenvectors of the patches' covariance; the batch norm that
    follows gives each of them unit variance.
    """
    stem = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    sample = images.pixels[:: max(1, len(images) // 5000)]
    patches = functional.unfold(images.normalisation(sample), stem.kernel_size, stride=4)
    flat = patches.transpose(1, 2).reshape(-1, stem.weight[0].numel())
    directions = torch.linalg.eigh(torch.cov(flat.T)).eigenvectors.T.flip(0)
    half = directions[: stem.out_channels // 2].view(-1, *stem.weight.shape[1:])
    stem.weight[: len(half)] = half
    stem.weight[len(half) : 2 * len(half)] = -half
    stem.weight.requires_grad_(False)


def identify(
    network: nn.Module, images: LabelledImages, settings: TrainingSettings, objective: Objective
) -> dict[str, str]:
    """Return what two runs must share for one to continue the other, as flat names and values."""
    identity = {
        f"shape of {name}": str(list(value.shape)) for name, value in network.state_dict().items()
    }
    identity |= {name: str(value) for name, value in asdict(settings).items()}
    identity["objective"] = repr(objective)
    return identity | {"number of images": str(len(images)), "classes": ", ".join(images.classes)}


def save(run: Run, path: Path, identity: dict[str, str]) -> None:
    """Write the run to `path` at once: a reader finds the old file or the new one, never a part."""
    history = json.dumps([asdict(record) for record in run.history])
    tensors = {name: value.contiguous() for name, value in run.tensors().items()}
    write_tensors(path, tensors, {"identity": json.dumps(identity), "history": history})


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda unfinished: unfinished.write_bytes(serialise(tensors, facts)))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in the place of `path`."""
    unfinished = path.with_name(path.name + ".partial")
    write(unfinished)
    os.replace(unfinished, path)


def restore(run: Run, path: Path, identity: dict[str, str]) -> None:
    """Bring `run` to where the checkpoint at `path` left it, if it is the same run's."""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
        found: dict[str, str] = json.loads(facts["identity"])
        history = [EpochRecord(**record) for record in json.loads(facts["history"])]
        stored = load_file(path)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path} is no readable training checkpoint ({error}); remove it to start again."
        ) from error
    for key in sorted(identity.keys() | found.keys()):
        if identity.get(key) != found.get(key):
            raise ArtifactError(
                f"The checkpoint {path} belongs to another run: its {key} is {found.get(key)}, "
                f"here it is {identity.get(key)}; remove the file or name another one."
            )
    tensors = run.tensors()
    if tensors.keys() != stored.keys():
        raise ArtifactError(
            f"The checkpoint {path} belongs to another run: other weights were frozen in it; "
            f"remove the file or name another one."
        )
    with torch.no_grad():
        for name, value in tensors.items():
            value.copy_(stored[name])
    run.history[:] = history
