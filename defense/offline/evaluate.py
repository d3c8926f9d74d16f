"""How good is a guard? Clean images, attacked ones, controls and baselines, on images no fit has seen.

The protocol of the field's critics: only images that the network gets right, only attacks that
succeed, thresholds fixed on calibration data, and beside every attack the noise of its own norm; also
images changed by chance, not by anybody. P-values are those that a server would give that has the
time for every second look that it owes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from defense.backbone import GatedBackbone
from defense.errors import DataError
from defense.guard import Guard, check_backbone
from defense.offline.attacks import Attack, uniform_noise
from defense.offline.benchmark.metrics import auroc
from defense.offline.benchmark.shifts import SHIFTS
from defense.offline.collect import Served, backbone_inputs, collect, collect_inputs
from defense.offline.data import ImageSet
from defense.offline.fit import label_rows, versions
from defense.offline.pixels import deliverable, find_pixel_space
from defense.offline.progress import Progress, Silent
from defense.types import Routed

PROBE_EPS = 8 / 255
TARGETS = (0.05, 0.01, 0.001)
SHIFT_LEVELS = (1, 2)
GUARDED_AT = 0.01
"""Target false-positive rate at which `guarded_success_rate` is given."""


@dataclass(frozen=True)
class Bench:
    """A served model with its guard's hooks on, and the images that it is judged with."""

    served: Served
    guard: Guard
    gated: GatedBackbone
    images: ImageSet
    progress: Progress

    def routed(self, payloads: Sequence[bytes]) -> Routed:
        guard = self.guard
        return collect(
            self.served, self.gated, payloads, self.progress, guard.extras, guard.inputs.views
        )

    def routed_inputs(self, inputs: Tensor) -> Routed:
        runs = collect_inputs(self.served.backbone, self.gated, inputs, self.guard.extras)
        self.progress.advance(len(runs))
        return runs


def evaluate(
    served: Served,
    guard: Guard,
    images: ImageSet,
    attacks: Sequence[Attack],
    *,
    seed: int,
    command: str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return the report: see the keys of `clean`, `attacks`, `baselines` and `controls` in docs."""
    check_backbone(guard, served.backbone)
    if images.labels is None:
        raise DataError(
            "evaluation needs labels and these images have none; give one folder per class"
        )
    with GatedBackbone(served.backbone, guard.router) as gated:
        bench = Bench(served, guard, gated, images, progress or Silent())
        payloads = images.payloads(range(len(images)))
        clean = bench.routed(payloads)
        labels = _labels(guard, images, clean)
        right = clean.predicted == labels
        report: dict[str, Any] = {
            "clean": _clean(guard, clean, right),
            "attacks": {},
            "controls": {},
            "baselines": {name: {} for name in BASELINES},
            "calibration": {"n": guard.calibration.count},
            "guarded_at_fpr": GUARDED_AT,
            "seed": seed,
            "versions": versions(),
            "fingerprint": guard.fingerprint,
            "command": command,
        }
        if attacks:
            if not bool(right.any()):
                raise DataError("the network gets none of these images right; nothing to attack")
            _attacked(bench, payloads, clean, labels, attacks, seed, report)
    return report


def _attacked(
    bench: Bench,
    payloads: Sequence[bytes],
    clean: Routed,
    labels: Tensor,
    attacks: Sequence[Attack],
    seed: int,
    report: dict[str, Any],
) -> None:
    right = clean.predicted == labels
    space = find_pixel_space(bench.served, payloads[0])
    pixels = space.to_pixels(backbone_inputs(bench.served, payloads))[right]
    # With noise: what attacks make has colours that clean images may lack.
    noisy_few = uniform_noise(pixels[:4], eps=PROBE_EPS, seed=seed)
    as_images = deliverable(bench.served, space, noisy_few)
    report["delivery"] = (
        "PNG through the archive's preprocessing" if as_images else "backbone input"
    )
    model = space.model(bench.served.backbone)

    def run(changed: Tensor) -> Routed:
        if as_images:
            return bench.routed(space.pngs(changed))
        return bench.routed_inputs(space.to_input(changed))

    for attack in attacks:
        changed = attack.run(model, pixels, labels[right], seed=seed)
        attacked = run(changed)
        won = attacked.predicted != labels[right]
        row = _attack_row(bench.guard, clean.take(right), attacked, won)
        size = (changed - pixels).abs().amax(dim=(1, 2, 3)).mean().item()
        report["attacks"][attack.name] = {"eps": attack.eps, "mean_linf": round(size, 5), **row}
        noisy = run(uniform_noise(pixels, eps=attack.eps or size, seed=seed))
        report["controls"][f"noise of {attack.name}'s size"] = {
            "n": len(noisy),
            "fpr": _hit_rates(bench.guard, noisy),
        }
        for name, baseline in BASELINES.items():
            value = _auroc(baseline(clean.take(right)), baseline(attacked.take(won)))
            report["baselines"][name][attack.name] = value
    for shift, change in SHIFTS.items():
        for level in SHIFT_LEVELS:
            runs = run(change(pixels, level, seed))
            row = {"n": len(runs), "fpr": _hit_rates(bench.guard, runs)}
            report["controls"][f"{shift} level {level}"] = row


def _clean(guard: Guard, clean: Routed, right: Tensor) -> dict[str, Any]:
    share = guard.judge(clean).taken / len(clean)
    passes = len(guard.echo.perturbations) if guard.echo is not None else 0
    return {
        "n": len(clean),
        "accuracy": round(right.double().mean().item(), 4),
        "realised_fpr": _hit_rates(guard, clean),
        "second_look": round(share, 4),
        "extra_passes": round(share * passes, 4),
    }


def _attack_row(guard: Guard, clean: Routed, attacked: Routed, won: Tensor) -> dict[str, Any]:
    """Describe one attack on images that the network got right; `won` (N,) marks its successes.

    `auroc` is that of requests as they are served, `auroc_all_looks` that of the score of all looks
    at every request: what a second look could add if it were given to all.
    """
    got_through = won & (guard.judge(attacked).scored.p_value > GUARDED_AT)
    failed = attacked.take(~won)
    return {
        "n": len(attacked),
        "success_rate": round(won.double().mean().item(), 4),
        "auroc": _auroc(*suspicion(guard, clean, attacked.take(won))),
        "auroc_all_looks": _auroc(guard.score(clean).score, guard.score(attacked.take(won)).score),
        "tpr": _hit_rates(guard, attacked.take(won)),
        "guarded_success_rate": round(got_through.double().mean().item(), 4),
        "failed": {"n": len(failed), "flagged": _hit_rates(guard, failed)},
    }


def _hit_rates(guard: Guard, routed: Routed) -> dict[str, float | None]:
    """Share of rows at or below each target rate; None where calibration is too small, or no row."""
    if len(routed) == 0:
        return {str(target): None for target in TARGETS}
    p_value = guard.judge(routed).scored.p_value
    return {
        str(target): round((p_value <= target).double().mean().item(), 4)
        if guard.calibration.count >= 1 / target
        else None
        for target in TARGETS
    }


def suspicion(guard: Guard, *runs: Routed) -> list[Tensor]:
    """Return what orders requests, larger = more suspicious: by p-value, and by score where that ties.

    A p-value ranks requests of either look; beyond the last calibration score all have the same.
    """
    judged = [guard.judge(routed).scored.p_value for routed in runs]
    scores = [guard.score(routed).score for routed in runs]
    both = torch.stack([-torch.cat(judged), torch.cat(scores)], dim=1)
    _, order = both.unique(dim=0, return_inverse=True)
    return list(order.double().split([len(routed) for routed in runs]))


def evaluation_steps(count: int, attacks: int) -> int:
    """Return how far `evaluate` advances its progress at most, given so many images and attacks."""
    return count * (1 + 2 * attacks + (len(SHIFTS) * len(SHIFT_LEVELS) if attacks else 0))


def _auroc(negative: Tensor, positive: Tensor) -> float | None:
    value = auroc(negative, positive)
    return None if value is None else round(value, 4)


def _labels(guard: Guard, images: ImageSet, clean: Routed) -> Tensor:
    """Return the images' classes as the network counts them: by the guard's names for them, or by
    what the network mostly answers for each folder where the guard was fitted without labels.
    """
    assert images.labels is not None
    unknown = [name for name in images.class_names if name not in guard.class_names]
    if not unknown:
        index = [guard.class_names.index(name) for name in images.class_names]
        return torch.tensor([index[label] for label in images.labels])
    matched = label_rows(images, torch.arange(len(images)), clean)
    if guard.facts.get("labels") == "folders" or matched.facts["labels"] != "folders":
        raise DataError(
            f"the guard knows no class '{unknown[0]}' (its classes are "
            f"{', '.join(guard.class_names[:12])}); name the folders as at the fit"
        )
    return matched.labels


def _margin(routed: Routed) -> Tensor:
    first, second = routed.logits.topk(2, dim=1).values.unbind(dim=1)
    return second - first


BASELINES: dict[str, Callable[[Routed], Tensor]] = {
    "max_softmax": lambda routed: -routed.logits.softmax(dim=1).amax(dim=1),
    "energy": lambda routed: -routed.logits.logsumexp(dim=1),
    "margin": _margin,
}
"""Scores from the logits alone, larger = more suspicious: what every path detector must beat."""
