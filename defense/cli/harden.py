"""Hardening as a command: train, then measure the network before and after, alone and in a guard."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from defense.cli.benchmark import sealed_rows
from defense.errors import ConfigError, DataError
from defense.offline.archived import pack_network
from defense.offline.attacks import make_attack
from defense.offline.backbones import train_backbone
from defense.offline.benchmark.splits import make_pools
from defense.offline.benchmark.store import Store
from defense.offline.benchmark.study import SEEDS
from defense.offline.benchmark.subject import digest, open_subject
from defense.offline.cards import load_network
from defense.offline.comparison.backbones import open_network
from defense.offline.data import read_images
from defense.offline.fit import versions
from defense.offline.hardening.detection import detection
from defense.offline.hardening.recipe import NATURAL
from defense.offline.hardening.table import Row, write_rows
from defense.offline.hardening.withstand import Trial, withstand
from defense.offline.methods import Method
from defense.offline.progress import Progress, bar
from defense.offline.training import read_split
from handlers.torchserve_inner import open_archive


@dataclass(frozen=True)
class HardenRequest:
    """What to harden, how, and what to measure it with.

    data: holds train/CLASS/* and test/CLASS/*. start, out: the card to go on from, the weights to
    write. beside: the card of the network that it is a witness of; None: it is a backbone itself,
    whose guard asks `witness`, a card, where one is given. eps: radii in [0, 1] of PGD-50, the
    largest of AutoAttack too, on `images` images. attacks: names of those that guards are judged
    with, on as many. kept: what was measured lies here. tables: where hardening.md and .json go.
    """

    data: Path
    start: Path
    out: Path
    method: Method
    checkpoint: Path
    beside: Path | None
    witness: Path | None
    eps: Sequence[float]
    images: int
    attacks: Sequence[str]
    kept: Path
    tables: Path
    command: str

    @property
    def seed(self) -> int:
        """That of the training, of attacks, and of what guards see."""
        return self.method.settings.seed

    def __post_init__(self) -> None:
        """Refuse what could only fail after the training."""
        if self.beside is not None and self.witness is not None:
            raise ConfigError(
                "a network is hardened as a witness (--beside) or as a backbone that a witness "
                "stands beside (--witness); leave one of them out"
            )
        if self.out.with_suffix(".json") == self.start:
            raise ConfigError(
                f"--out {self.out} would write over the network that training goes on from; name "
                "another file"
            )
        for name in self.attacks:
            make_attack(name)
        for card in (self.start, self.beside, self.witness):
            if card is not None:
                load_network(card)


def run_harden(request: HardenRequest, console: Console) -> None:
    """Measure the network, train it, measure what comes of it; the table grows row by row."""
    write_rows(request.tables, [measure(request.start, request, console)])
    request.out.parent.mkdir(parents=True, exist_ok=True)
    train_backbone(
        request.data,
        request.out,
        method=request.method,
        architecture=request.method.architecture,
        settings=request.method.settings,
        checkpoint=request.checkpoint,
        command=request.command,
        start=request.start,
        console=console,
    )
    write_rows(request.tables, [measure(request.out.with_suffix(".json"), request, console)])


def measure(card: Path, request: HardenRequest, console: Console) -> Row:
    """Return the row of one network: alone, and in a guard."""
    facts = json.loads(card.read_text())
    witness = card if request.beside else request.witness
    sealed = sealed_rows(read_images(request.data / "test"))
    with bar(console, f"images attacked and run, {card.stem}", None) as progress:
        network = _network(card, request, sealed, progress)
        guard, fingerprint = _guard(request.beside or card, witness, request, sealed, progress)
    return {
        "name": card.stem,
        "role": "witness" if request.beside else "backbone",
        "beside": request.beside and request.beside.stem,
        "made_by": made_by(facts),
        "weights": facts["sha256"],
        "started_from": facts.get("started_from"),
        "witness": witness and json.loads(witness.read_text())["sha256"],
        "fingerprint": fingerprint,
        "recipe": facts["recipe"] | {"objective": facts.get("objective")},
        "network": network,
        "attacks": list(request.attacks),
        "guard_images": request.images,
        "guard_seeds": list(SEEDS),
        "detection": guard,
        "seed": request.seed,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "command": request.command,
    }


def made_by(facts: dict[str, Any]) -> str:
    """Say in a few words how the network of a card was trained."""
    recipe, objective = facts["recipe"], facts.get("objective") or {}
    course = f"{recipe['epochs']} epochs at {recipe['learning_rate']:g}"
    if objective.get("name") != "ConsistentObjective":
        return f"plain, {course}"
    steps, radius = objective.get("steps", 1), objective["eps"] * NATURAL * 255
    inner = "FGSM" if steps == 1 else f"PGD-{steps}"
    return f"consistent, {inner} up to {radius:.0f}/255, {course}"


def _network(
    card: Path, request: HardenRequest, sealed: torch.Tensor, progress: Progress
) -> dict[str, Any]:
    test = read_split(request.data, "test")
    rows = make_pools(sealed).attacked[: request.images]
    if len(rows) < request.images:
        raise DataError(
            f"there are {len(rows)} test images to attack, and {request.images} were asked for; ask "
            "for fewer with --images"
        )
    pixels = test.pixels[rows]
    about = f"{json.loads(card.read_text())['sha256']} {digest(pixels)} {request.seed}"
    trial = Trial(
        pixels=pixels.float() / 255,
        labels=test.labels[rows],
        eps=request.eps,
        seed=request.seed,
        store=Store(request.kept, about),
        progress=progress,
    )
    return withstand(card.stem, open_network(card), trial)


def _guard(
    backbone: Path,
    witness: Path | None,
    request: HardenRequest,
    sealed: torch.Tensor,
    progress: Progress,
) -> tuple[dict[str, Any], str]:
    """Return how well guards of `backbone` detect, and the fingerprint of what they guard."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        archive = folder / "network.mar"
        pack_network(backbone, archive)
        served = stack.enter_context(open_archive(archive, folder / "open"))
        subject = stack.enter_context(
            open_subject(
                served,
                read_images(request.data / "test"),
                request.kept,
                witness=witness,
                seed=request.seed,
                progress=progress,
            )
        )
        attacks = [make_attack(name) for name in request.attacks]
        found = detection(subject, sealed, attacks, count=request.images)
        return found, subject.fingerprint
