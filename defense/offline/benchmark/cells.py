"""The cells of a study: all figures of one contestant, ready for JSON, merged over seeds and attacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from defense.errors import DataError
from defense.offline.benchmark.metrics import (
    RESAMPLES,
    Spread,
    aupr,
    auroc_spread,
    flag_rate,
    flagged,
    fpr_at_tpr,
    guarded_success,
    per_class,
    plain,
    robust_accuracy,
)

TARGETS = (0.05, 0.01, 0.001)
REJECT_AT = 0.01
"""Target false-positive rate at which a guard that rejects is judged end to end."""
RARE = 0.01
"""Prevalence of attacks at which precision is given beside that of the sample."""

Cell = dict[str, Any]
"""Plain figures of one contestant against one attack; see `judge`."""


def judge(
    clean: Tensor,
    attacked: Tensor,
    won: Tensor,
    calibration: Tensor,
    *,
    accuracy: float = 1.0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Cell:
    """Describe one contestant against one attack for one seed.

    clean, attacked: (N,) scores; row i of both is one image that the network gets right when clean.
    won: (N,), whether the attack on it succeeded. calibration: (M,) scores of other clean images.
    accuracy: the network's clean accuracy, for `robust_accuracy` over all images.

    `n` counts the successes. `auroc` and `tpr` (by target rate) are spreads as dicts; `aupr` has the
    sample's prevalence and `aupr_1` one of 1 %; `fpr95` is the false-positive rate at which 95 % are
    found; `guarded_success` and `robust_accuracy` are those of rejection at a target rate of 1 %.
    """
    _check(clean, attacked, won, calibration)
    clean, attacked, calibration, won = *map(plain, (clean, attacked, calibration)), won.cpu()
    positive = attacked[won]
    clean_rejected, rejected = (flagged(calibration, s, REJECT_AT) for s in (clean, attacked))
    cell: Cell = {
        "n": len(positive),
        "auroc": _dict(auroc_spread(clean, attacked, won, resamples=resamples, seed=seed)),
        "aupr": aupr(clean, positive),
        "aupr_1": aupr(clean, positive, prevalence=RARE),
        "tpr": {str(t): _dict(flag_rate(calibration, positive, t)) for t in TARGETS},
        "fpr95": fpr_at_tpr(clean, positive),
        "guarded_success": None,
        "robust_accuracy": None,
    }
    if rejected is not None and clean_rejected is not None and len(won):
        cell["guarded_success"] = guarded_success(won, rejected)
        cell["robust_accuracy"] = robust_accuracy(clean_rejected, won, rejected, accuracy=accuracy)
    return cell


def judge_clean(score: Tensor, labels: Tensor, calibration: Tensor, names: Sequence[str]) -> Cell:
    """Describe one contestant on clean images for one seed.

    score, labels: (N,); calibration: (M,). `realised_fpr` is
    by target rate, `per_class_fpr` at a target rate of 1 %.
    """
    _check(score, score, labels >= 0, calibration)
    rejected = flagged(calibration, score, REJECT_AT)
    nothing = dict.fromkeys(names)
    return {
        "realised_fpr": {str(t): _dict(flag_rate(calibration, score, t)) for t in TARGETS},
        "per_class_fpr": nothing if rejected is None else per_class(rejected, labels.cpu(), names),
    }


def spread_cells(seeds: Sequence[Cell | None]) -> Cell | None:
    """Merge what was measured with each seed, cell by cell: spreads by `Spread.over`, else means.

    A figure that some seeds could not measure is that of the others; None where none could.
    """
    merged: Cell | None = _merged(seeds)
    return merged


def summary(seeds: Sequence[Mapping[str, Cell | None]]) -> Cell:
    """Describe one contestant over all attacks; one mapping of attack to cell per seed.

    `mean` is the AUROC averaged over attacks and `tpr_1` the hit rate at 1 % averaged over them;
    `worst` is the AUROC of the attack whose mean over seeds is lowest, `worst_attack` its name.
    """
    known = [{name: cell for name, cell in cells.items() if cell} for cells in seeds]
    attacks = dict.fromkeys(name for cells in known for name in cells)
    found = {a: _merged([cells[a]["auroc"] for cells in known if a in cells]) for a in attacks}
    measured = {attack: spread for attack, spread in found.items() if spread}
    worst = min(measured, key=lambda attack: float(measured[attack]["mean"]), default=None)
    hits = [[cell["tpr"][str(REJECT_AT)] for cell in cells.values()] for cells in known]
    return {
        "mean": _merged([_average([c["auroc"] for c in cells.values()]) for cells in known]),
        "worst": None if worst is None else measured[worst],
        "worst_attack": worst,
        "tpr_1": _merged([_average(spreads) for spreads in hits]),
    }


def _average(spreads: Sequence[Cell | None]) -> Cell | None:
    """Average one seed's spreads over attacks; attacks are no sample, so they have no deviation."""
    known = [Spread(**spread) for spread in spreads if spread is not None]
    return asdict(Spread.over(known)) | {"sd": 0.0} if known else None


def _merged(values: Sequence[Any]) -> Any:
    known = [value for value in values if value is not None]
    if not known:
        return None
    if not isinstance(known[0], dict):
        return round(fmean(known)) if isinstance(known[0], int) else fmean(known)
    if known[0].keys() == {field.name for field in fields(Spread)}:
        return asdict(Spread.over([Spread(**value) for value in known]))
    keys = dict.fromkeys(key for value in known for key in value)
    return {key: _merged([value.get(key) for value in known]) for key in keys}


def _dict(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else asdict(spread)


def _check(clean: Tensor, attacked: Tensor, won: Tensor, calibration: Tensor) -> None:
    shapes = [tuple(values.shape) for values in (clean, attacked, won)]
    if len(set(shapes)) > 1 or clean.dim() != 1 or won.dtype != torch.bool:
        raise DataError(
            f"scores to judge have shapes {shapes[0]} (clean), {shapes[1]} (attacked) and {shapes[2]} "
            f"of {won.dtype} (won); expected one number and one bool per image, twins in the same row"
        )
    if len(calibration) == 0:
        raise DataError(
            "there are no calibration scores to fix a threshold with; keep clean images apart for it"
        )
    for name, values in (("clean", clean), ("attacked", attacked), ("calibration", calibration)):
        if not bool(values.isfinite().all()):
            row = int((~values.isfinite()).nonzero()[0])
            raise DataError(
                f"the {name} score in row {row} is {float(values[row])}; expected finite scores, "
                "so look at what the detector does with that image"
            )
