"""The benchmark of detectors as a command: study, attackers, checks, pages."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from defense.artifact import save_guard
from defense.cli.served import served_forms
from defense.config import ModelSettings
from defense.errors import DataError
from defense.guard import Guard
from defense.offline.attacks.queries import compare
from defense.offline.attacks.queries.boundary import HopSkipJump
from defense.offline.attacks.queries.lockstep import QueryAttack
from defense.offline.attacks.queries.scattered import Scattered
from defense.offline.attacks.queries.square import Square
from defense.offline.benchmark.arsenal import make_arsenal
from defense.offline.benchmark.card import report_card
from defense.offline.benchmark.checks import (
    as_results,
    check_attacks,
    check_claims,
    check_guard,
    require_discipline,
)
from defense.offline.benchmark.contestants import contestants
from defense.offline.benchmark.markdown import markdown
from defense.offline.benchmark.report import page
from defense.offline.benchmark.splits import SEALED_PART, make_pools, make_split
from defense.offline.benchmark.study import SEEDS, run_study
from defense.offline.benchmark.subject import Subject, open_subject
from defense.offline.benchmark.trials import Material, gather
from defense.offline.benchmark.whitebox import attack_knowing_all, make_guard
from defense.offline.data import ImageSet, read_images
from defense.offline.fit import versions
from defense.offline.progress import Progress
from defense.wrap import wrap_archive
from handlers.torchserve import HANDLER_SOURCE
from handlers.torchserve_inner import open_archive


@dataclass(frozen=True)
class Asked:
    """An attack over HTTP. victim: the guarded form that it asks. count: images it tries to turn."""

    attack: QueryAttack
    count: int
    victim: str = "guarded"


ASKED = {
    "square": Asked(Square(), 40),
    "square, memory off": Asked(Square(), 40, "forgetful"),
    "scattered": Asked(Scattered(), 40),
    "boundary": Asked(HopSkipJump(), 12),
}
"""A thousand queries for every image."""
REFUSED_AT = 0.01


@dataclass(frozen=True)
class BenchmarkRequest:
    """What to measure, and where everything lies. surrogates: cards of networks for transfer."""

    archive: Path
    data: Path
    witness: Path | None
    surrogates: Sequence[Path]
    kept: Path
    out: Path
    command: str
    seed: int = 0
    guard: Path | None = None
    """Where the guard that was judged goes, with its report card."""


def run_benchmark(
    request: BenchmarkRequest, console: Console, progress: Progress
) -> dict[str, Any]:
    """Measure everything, write results.json and the pages into `out`, and return the results."""
    images = read_images(request.data)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        served = stack.enter_context(open_archive(request.archive, Path(folder)))
        subject = stack.enter_context(
            open_subject(
                served,
                images,
                request.kept,
                witness=request.witness,
                seed=request.seed,
                progress=progress,
            )
        )
        results, guard = _measure(request, subject, sealed_rows(images), console)
    write(results, request.out)
    if request.guard is not None:
        facts = guard.facts | {"command": request.command, "report_card": report_card(results)}
        save_guard(replace(guard, facts=facts), request.guard)
    return results


def sealed_rows(images: ImageSet) -> torch.Tensor:
    """Return (N,) the images that a study keeps sealed: one part of them, by their own names."""
    inside = set(images.part(*SEALED_PART).names)
    return torch.tensor([name in inside for name in images.names])


def _measure(
    request: BenchmarkRequest, subject: Subject, sealed: torch.Tensor, console: Console
) -> tuple[dict[str, Any], Guard]:
    pools = make_pools(sealed)
    material = gather(subject, pools, make_arsenal(request.surrogates))
    checks = require_discipline(material, SEEDS)
    console.print("Attacked images are ready; fitting and judging detectors.")
    results = describe(request, material) | run_study(material, list(contestants()))
    console.print("Attacking the guard with full knowledge.")
    results["adaptive"] = attack_knowing_all(material, request.seed)
    guard = make_guard(material, request.seed)
    console.print("Attacking the served guard over HTTP.")
    results["queries"] = {"attack": _ask(request, material, guard)}
    checks += [*check_attacks(material), *check_guard(material, guard, request.seed)]
    accuracy = float(subject.right.double().mean())
    results["sanity"] = as_results([*checks, *check_claims(results, accuracy)])
    return results, guard


def describe(request: BenchmarkRequest, material: Material) -> dict[str, Any]:
    """Return where the results come from."""
    subject = material.subject
    cards = {"witness": request.witness} | {card.stem: card for card in request.surrogates}
    weights = {name: json.loads(card.read_text())["sha256"] for name, card in cards.items() if card}
    accuracy = float(subject.right.double().mean())
    return {
        "command": request.command,
        "seeds": list(SEEDS),
        "versions": versions(),
        "fingerprint": subject.fingerprint,
        "artefacts": {"backbone": subject.fingerprint} | weights,
        "data": {
            "images": len(subject.pixels),
            "attacked": len(material.pools.attacked),
            "sealed": len(material.pools.sealed),
            "accuracy": accuracy,
            "discarded": 1 - accuracy,
        },
    }


def _ask(request: BenchmarkRequest, material: Material, guard: Guard) -> dict[str, Any]:
    """Attack the stock and the guarded archive over HTTP, with the verdict as feedback."""
    subject = material.subject
    split = make_split(material.pools, request.seed)
    rows = split.test[subject.right[split.test]]

    def measure() -> dict[str, Any]:
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            save_guard(guard, Path(folder) / "guard")
            guarded = Path(folder) / "guarded.mar"
            wrap_archive(
                request.archive,
                guarded,
                guard_folder=Path(folder) / "guard",
                handler_source=HANDLER_SOURCE,
            )
            names = subject.labelling.names
            with served_forms(request.archive, guarded, names, reject_fpr=REFUSED_AT) as forms:
                for name, asked in ASKED.items():
                    chosen = rows[: asked.count]
                    pixels = subject.pixels[chosen].float() / 255
                    labels = subject.labels[chosen]
                    victim = getattr(forms, asked.victim)
                    found[name] = compare(
                        asked.attack, forms.stock, victim, pixels, labels, seed=request.seed
                    )
        return found

    # Another guard gives other answers; what it is calibrated with tells two of them apart.
    known = {look: float(each.score.sum()) for look, each in guard.calibrations.items()}
    return subject.store.keep_plain(
        "queries",
        measure,
        attacks=repr(ASKED),
        rows=rows.tolist(),
        guard=known,
        settings=ModelSettings().model_dump(mode="json"),
        at=REFUSED_AT,
    )


def write(results: dict[str, Any], out: Path) -> None:
    """Write results and pages: detection.json, .html, .md and the card that travels in a guard."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        text = json.dumps(results, indent=1, allow_nan=False)
    except ValueError as error:
        raise DataError(f"a figure of the benchmark is no number ({error}); report this") from error
    (out / "detection.json").write_text(text + "\n")
    (out / "detection.html").write_text(page(results))
    (out / "detection.md").write_text(markdown(results))
    (out / "detection-card.json").write_text(json.dumps(report_card(results), indent=1) + "\n")
