"""How good is a guard? Clean images, attacked ones, controls and baselines, on images no fit has seen.

The protocol of the field's critics: only images that the network gets right, only attacks that
succeed, thresholds fixed on calibration data, and beside every attack the noise of its own norm.
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
from defense.offline.collect import Served, backbone_inputs, collect, collect_inputs
from defense.offline.data import ImageSet
from defense.offline.fit import label_rows, versions
from defense.offline.pixels import deliverable, find_pixel_space
from defense.offline.progress import Progress, Silent
from defense.types import Routed

PROBE_EPS = 8 / 255
TARGETS = (0.05, 0.01, 0.001)
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
        return collect(self.served, self.gated, payloads, self.progress)


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
        return collect_inputs(bench.served.backbone, bench.gated, space.to_input(changed))

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
            value = auroc(baseline(clean.take(right)), baseline(attacked.take(won)))
            report["baselines"][name][attack.name] = value


def _clean(guard: Guard, clean: Routed, right: Tensor) -> dict[str, Any]:
    return {
        "n": len(clean),
        "accuracy": round(right.double().mean().item(), 4),
        "realised_fpr": _hit_rates(guard, clean),
    }


def _attack_row(guard: Guard, clean: Routed, attacked: Routed, won: Tensor) -> dict[str, Any]:
    """Describe one attack on images that the network got right; `won` (N,) marks its successes."""
    scored = guard.score(attacked)
    got_through = won & (scored.p_value > GUARDED_AT)
    failed = attacked.take(~won)
    return {
        "n": len(attacked),
        "success_rate": round(won.double().mean().item(), 4),
        "auroc": auroc(guard.score(clean).score, scored.score[won]),
        "tpr": _hit_rates(guard, attacked.take(won)),
        "guarded_success_rate": round(got_through.double().mean().item(), 4),
        "failed": {"n": len(failed), "flagged": _hit_rates(guard, failed)},
    }


def _hit_rates(guard: Guard, routed: Routed) -> dict[str, float | None]:
    """Share of rows at or below each target rate; None where calibration is too small, or no row."""
    if len(routed) == 0:
        return {str(target): None for target in TARGETS}
    p_value = guard.score(routed).p_value
    return {
        str(target): round((p_value <= target).double().mean().item(), 4)
        if guard.calibration.count >= 1 / target
        else None
        for target in TARGETS
    }


def auroc(negative: Tensor, positive: Tensor) -> float | None:
    """Return P(positive > negative) + P(equal) / 2; None where either is empty."""
    if len(negative) == 0 or len(positive) == 0:
        return None
    ordered = negative.double().sort().values
    value = positive.double()
    below = torch.searchsorted(ordered, value, right=False)
    upto = torch.searchsorted(ordered, value, right=True)
    return round(((below + upto).double() / 2 / len(ordered)).mean().item(), 4)


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
