"""Train a backbone by a published method, and write its weights with their card."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from defense.errors import ArtifactError, ConfigError
from defense.offline.cards import load_network
from defense.offline.methods import Method
from defense.offline.networks import Architecture, CifarResNet, Network
from defense.offline.training import (
    CALIBRATION_BINS,
    EpochRecord,
    Evaluation,
    LabelledImages,
    TrainingSettings,
    evaluate,
    read_split,
    train,
    whiten,
    write_atomically,
    write_tensors,
)


def train_backbone(
    source: Path,
    out: Path,
    *,
    method: Method,
    architecture: Architecture,
    settings: TrainingSettings,
    checkpoint: Path,
    command: str,
    start: Path | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Train on `train/CLASS/*` of `source`, write weights and card, return the test evaluation.

    `out` is the weights' file; the card has its name with `.json`. start: the card of a network to
    go on from, whose shape it then has. `test/CLASS/*` is measured after every epoch, yet nothing
    is chosen by it: the last epoch is what is written.
    """
    if method.needs_start and start is None:
        raise ConfigError(
            "this training method goes on from a trained network; name its card with --start"
        )
    images, test = read_split(source, "train"), read_split(source, "test")
    torch.manual_seed(settings.seed)
    network = first_network(method, architecture, images, start)
    network.to(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    history = train(
        network,
        images,
        settings,
        checkpoint=checkpoint,
        objective=method.objective,
        validation=test,
        console=console,
    )
    weights = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    if method.half:
        weights = halved(weights)
        network.load_state_dict(weights)
    result = evaluate(network, test, images.normalisation)
    write_tensors(out, weights, {})
    facts: dict[str, object] = {
        "weights": out.name,
        "sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
        "command": command,
        "architecture": {"network": type(network).__name__} | asdict(network.architecture),
        "parameters": sum(value.numel() for value in network.parameters()),
        "objective": {"name": type(method.objective).__name__} | asdict(method.objective),  # type: ignore[call-overload]
        "started_from": None if start is None else json.loads(start.read_text())["sha256"],
        "test": {"images": len(test), "calibration_bins": CALIBRATION_BINS} | asdict(result),
    }
    card = json.dumps(facts | provenance(images, settings, history), indent=2) + "\n"
    write_atomically(out.with_suffix(".json"), lambda unfinished: unfinished.write_text(card))
    return result


def halved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with those of convolutions and linear maps in half precision.

    What batch norms hold keeps its range: a variance may be too small for half precision.
    """
    return {name: value.half() if value.dim() > 1 else value for name, value in weights.items()}


def first_network(
    method: Method, architecture: Architecture, images: LabelledImages, start: Path | None
) -> Network:
    """Return the network that training begins with: fresh, or with `start`'s weights.

    A fresh one's stem, where it has one, is whitened.
    """
    if start is None:
        fresh = method.network(architecture)
        if isinstance(fresh, CifarResNet):
            whiten(fresh, images)
        return fresh
    trained, normalise = load_network(start)
    network = going_on(method, trained)
    if network is None:
        raise ArtifactError(
            f"{start} describes a {type(trained).__name__}, from which this method cannot go on; "
            "give the card of a plain one"
        )
    if normalise != images.normalisation or trained.architecture.classes != len(images.classes):
        raise ArtifactError(
            f"{start} describes a network of other images (their statistics or classes differ); "
            "give the data that it was trained on"
        )
    next(network.stem.parameters()).requires_grad_(False)
    return network


def going_on(method: Method, trained: Network) -> CifarResNet | None:
    """Return the method's network with the weights of `trained`; None where it cannot take them."""
    if not (isinstance(trained, CifarResNet) and issubclass(method.network, CifarResNet)):
        return None
    network = method.network(trained.architecture)
    found = network.load_state_dict(trained.state_dict(), strict=False)
    shared = CifarResNet(trained.architecture).state_dict().keys()
    fits = not (found.unexpected_keys or shared & set(found.missing_keys))
    return network if fits else None


def provenance(
    images: LabelledImages, settings: TrainingSettings, history: tuple[EpochRecord, ...]
) -> dict[str, object]:
    """Return what a card says about the making of a network: input, recipe, course, versions."""
    pixels = {"shape": list(images.pixels.shape[1:]), "pixels": "RGB in [0, 1]"}
    packages = ("torch", "safetensors", "pillow")
    return {
        "classes": list(images.classes),
        "input": pixels | asdict(images.normalisation),
        "recipe": {"optimizer": "SGD, Nesterov", "precision": "bfloat16"} | asdict(settings),
        "training": {
            "images": len(images),
            "seconds": round(sum(record.seconds for record in history)),
            "loss": [round(record.loss, 4) for record in history],
            "test_accuracy": [record.accuracy for record in history],
        },
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in packages},
    }
