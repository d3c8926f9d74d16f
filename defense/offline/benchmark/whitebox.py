"""The attackers who know everything: how many of their images fool the network and get through."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from defense.guard import Guard
from defense.offline.attacks.adaptive import (
    ADAPTIVE,
    BARE,
    AdaptiveAttack,
    Attacked,
    Bank,
    Glance,
    OpenGuard,
    make_bank,
    open_guard,
)
from defense.offline.benchmark.contestants import two_looks
from defense.offline.benchmark.metrics import flagged
from defense.offline.benchmark.peers import Score
from defense.offline.benchmark.splits import make_split
from defense.offline.benchmark.store import Tensors
from defense.offline.benchmark.subject import Subject
from defense.offline.benchmark.trials import Material
from defense.offline.fit import FitOptions, assemble

RADII = (2, 4, 8)
"""In 1/255."""
FPR = 0.05
STRICT_FPR = 0.01
IMAGES = 60
BANK_IMAGES = 100
EFFORT: dict[str, dict[str, int]] = {
    "joint": {"steps": 15, "rounds": 4, "restarts": 1},
    "selective": {"steps": 30, "restarts": 2},
    "orthogonal": {"steps": 30, "restarts": 1},
    "matching": {"steps": 30, "restarts": 2},
    "mimic": {"steps": 30, "restarts": 1},
    "bare": {"steps": 30, "restarts": 2},
}
"""Steps and restarts that a CPU can pay for; more of them get more images through."""


@dataclass(frozen=True)
class HalfPrecisionGuard:
    """An open guard in bfloat16 on a CPU, for gradients; verdicts are given in single precision."""

    opened: OpenGuard

    def __call__(self, pixels: Tensor) -> Glance:
        with torch.autocast("cpu", torch.bfloat16, enabled=pixels.device.type == "cpu"):
            seen = self.opened(pixels)
        # Attacks compare what they see by functions that torch has for single precision alone.
        return Glance(
            seen.logits.float(),
            seen.path.float(),
            seen.score,
            None if seen.witness is None else seen.witness.float(),
            tuple(output.float() for output in seen.activations),
        )


def make_guard(material: Material, seed: int) -> Guard:
    """Return the default guard as the study fits it with `seed`, with attacks."""
    split = make_split(material.pools, seed)
    trial, subject = material.trial(split, seed), material.subject
    return assemble(
        subject.served.backbone,
        subject.router,
        subject.spec,
        trial.data(),
        trial.calibration.routed,
        subject.labelling.names,
        FitOptions(detector="fused", seed=seed),
        subject.labelling.facts | {"attacks": list(material.open.assaults)},
        subject.extras,
        images=[subject.names[row] for row in torch.cat([split.views, split.fit]).tolist()],
    )


def attack_knowing_all(material: Material, seed: int) -> dict[str, Any]:
    """Return the part `adaptive` of the results: every attack at every radius, and the worst of them.

    An image is through where it fools the network and the guard, as served, lets it pass. `worst`
    takes, image by image, any attack that gets it through; `knowing` leaves out the one that knows
    nothing of the guard, which is `bare`.
    """
    split, subject = make_split(material.pools, seed), material.subject
    guard = make_guard(material, seed)
    score = two_looks(material.trial(split, seed), "attacks")
    calibration = score(material.clean.take(split.calibration))
    opened = open_guard(guard, subject.served.backbone, subject.space)
    threshold = float(guard.calibrations[opened.look].score.double().quantile(1 - FPR))
    target = HalfPrecisionGuard(opened)
    rows = split.test[subject.right[split.test]][:IMAGES]
    bank_rows = split.fit[:BANK_IMAGES]
    bank = make_bank(target, _pixels(subject, bank_rows), subject.labels[bank_rows])
    found: dict[str, dict[str, Any]] = {}
    worst: dict[str, Any] = {}
    knowing: dict[str, Any] = {}
    bare: dict[str, Any] = {}
    for radius in RADII:
        tries = {
            name: _run(subject, attack, target, rows, radius, threshold, bank, seed)
            for name, attack in {**ADAPTIVE, "bare": BARE}.items()
        }
        outcomes = {
            name: _outcome(subject, score, calibration, rows, attacked, f"{name} {radius}")
            for name, attacked in tries.items()
        }
        bare[str(radius)] = outcomes["bare"].figures()
        worst[str(radius)] = _any(list(outcomes.values())).figures()
        knowing[str(radius)] = _any([outcomes[name] for name in ADAPTIVE]).figures()
        for name in ADAPTIVE:
            found.setdefault(name, {})[str(radius)] = outcomes[name].figures()
    return {
        "eps_255": list(RADII),
        "n": len(rows),
        "fpr": FPR,
        "rows": found,
        "worst": worst,
        "knowing": knowing,
        "bare": bare,
        "effort": EFFORT,
    }


@dataclass(frozen=True)
class Outcome:
    """What became of N images. All (N,): fooled, through, strictly (bool); size (L2)."""

    fooled: Tensor
    through: Tensor
    strictly: Tensor
    size: Tensor

    def figures(self) -> dict[str, float | None]:
        """Return shares, and the mean size of what fooled and of what got through."""
        return {
            "fooled": float(self.fooled.double().mean()),
            "through": float(self.through.double().mean()),
            "through_1": float(self.strictly.double().mean()),
            "mean_l2": _mean(self.size[self.through]),
            "mean_l2_fooled": _mean(self.size[self.fooled]),
        }


def _outcome(
    subject: Subject,
    score: Score,
    calibration: Tensor,
    rows: Tensor,
    attacked: Attacked,
    label: str,
) -> Outcome:
    pixels = (attacked.pixels * 255).round().to(torch.uint8)
    sample = subject.runs(f"adaptive {label}", pixels)
    fooled = sample.routed.predicted != subject.labels[rows]
    caught = [flagged(calibration, score(sample), rate) for rate in (FPR, STRICT_FPR)]
    loose, strict = (torch.zeros_like(fooled) if hits is None else hits for hits in caught)
    size = (sample.pixels - _pixels(subject, rows)).flatten(1).norm(dim=1)
    return Outcome(fooled, fooled & ~loose, fooled & ~strict, size)


def _any(outcomes: list[Outcome]) -> Outcome:
    """Return per image the best that any attack reached, with the least size that reached it.

    An image that nothing fools has the size infinity.
    """
    fooled, through, strictly, sizes = (
        torch.stack([getattr(outcome, part) for outcome in outcomes])
        for part in ("fooled", "through", "strictly", "size")
    )
    reached = torch.where(through.any(0), through, fooled)
    size = sizes.where(reached, torch.inf).amin(0)
    return Outcome(fooled.any(0), through.any(0), strictly.any(0), size)


def _run(
    subject: Subject,
    attack: AdaptiveAttack,
    target: HalfPrecisionGuard,
    rows: Tensor,
    radius: int,
    threshold: float,
    bank: Bank,
    seed: int,
) -> Attacked:
    """Run one attack, or read what it made before."""
    attack = replace(attack, **EFFORT[attack.name])

    def make() -> Tensors:
        made = attack.run(
            target,
            _pixels(subject, rows),
            subject.labels[rows],
            eps=radius / 255,
            threshold=threshold,
            bank=bank,
            seed=seed,
        )
        return {"pixels": made.pixels, "fooled": made.fooled, "score": made.score}

    kept = subject.store.keep(
        f"adaptive {attack.name} {radius}",
        make,
        attack=repr(attack),
        rows=rows.tolist(),
        threshold=threshold,
    )
    subject.progress.advance(len(rows))
    return Attacked(kept["pixels"], kept["fooled"], kept["score"])


def _pixels(subject: Subject, rows: Tensor) -> Tensor:
    return subject.pixels[rows].float() / 255


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None
