"""How well scores tell attacked images from clean ones, and how sure that is.

Scores are (N,), larger = more suspicious; negatives are clean images that the network gets right,
positives are attacked ones that it gets wrong. A threshold is never chosen on the scores that it is
judged with: it comes from calibration scores by the rank rule of `defense.calibration`.
Every figure is None where there is nothing to measure it on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import torch
from torch import Tensor
from torch.nn.functional import pad

LEVEL = 0.95
RESAMPLES = 500
GRID = torch.logspace(-3, 0, 61, dtype=torch.float64)
"""False-positive rates at which a ROC curve is drawn."""


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: mean, standard deviation, and a 95 % interval over images."""

    mean: float
    sd: float
    low: float
    high: float

    @classmethod
    def over(cls, seeds: Sequence[Spread]) -> Spread:
        """Merge the spreads of single seeds, whose own deviation is not known.

        The limits are the means of the seeds' limits. That is the interval of the mean where all
        seeds are lucky on the same images, and too wide otherwise; never too narrow. The deviation
        of one seed alone is given as 0.
        """
        return cls(
            mean=fmean(s.mean for s in seeds),
            sd=stdev(s.mean for s in seeds) if len(seeds) > 1 else 0.0,
            low=fmean(s.low for s in seeds),
            high=fmean(s.high for s in seeds),
        )


def resampled(count: int, resamples: int, *, seed: int) -> Tensor:
    """Return how often each of `count` images is in each bootstrap sample: (count, resamples).

    Single precision, four times as fast to sum: whole numbers, and an interval needs no seventh digit.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(count, (count, resamples), generator=generator)
    cells = (draws * resamples + torch.arange(resamples)).flatten()
    return cells.bincount(minlength=count * resamples).view(count, resamples).float()


def areas(negative: Tensor, positive: Tensor, times: Tensor, positive_times: Tensor) -> Tensor:
    """Return the area under the ROC curve of every resample, (B,); NaN where one lacks a side.

    times: (N, B) and positive_times: (P, B), how often a row counts. Ties count one half
    (Mann & Whitney 1947).
    """
    ordered, order = negative.sort()
    upto = pad(times[order].cumsum(dim=0), (0, 0, 1, 0))
    below = upto[torch.searchsorted(ordered, positive, right=False)]
    below = (below + upto[torch.searchsorted(ordered, positive, right=True)]) / 2
    return (below * positive_times).sum(dim=0) / (upto[-1] * positive_times.sum(dim=0))


def auroc(negative: Tensor, positive: Tensor) -> float | None:
    """Return P(positive > negative) + P(equal) / 2; None where either is empty."""
    if len(negative) == 0 or len(positive) == 0:
        return None
    negative, positive = plain(negative), plain(positive)
    once = torch.ones(len(negative), 1, dtype=torch.float64)
    return float(areas(negative, positive, once, torch.ones_like(positive)[:, None]))


def interval(values: Tensor, *, level: float = LEVEL) -> tuple[float, float]:
    """Return the percentile interval of resampled figures (B,), of those that are numbers."""
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = values[values.isfinite()].double().quantile(ends).tolist()
    return low, high


def auroc_spread(
    clean: Tensor, attacked: Tensor, won: Tensor, *, resamples: int = RESAMPLES, seed: int = 0
) -> Spread | None:
    """Return the area with its bootstrap interval over images; row i of both is the same image.

    An image is drawn together with its attacked twin, because the two scores depend on each other.
    An area of exactly 1 has no width in any resample: read it together with `n`.
    """
    clean, attacked = plain(clean), plain(attacked)
    found = auroc(clean, attacked[won])
    if found is None:
        return None
    times = resampled(len(clean), resamples, seed=seed)
    low, high = interval(areas(clean, attacked[won], times, times[won]))
    return Spread(found, 0.0, low, high)


def wilson(hits: int, count: int, *, level: float = LEVEL) -> tuple[float, float]:
    """Return the score interval of a share (Wilson 1927); unlike others it has a width at 0 and 1."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = hits / count
    centre = share + z * z / (2 * count)
    half = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    low, high = ((centre + side * half) / (1 + z * z / count) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)


def share(marks: Tensor) -> Spread | None:
    """Return the share of marked rows (N,) with its Wilson interval."""
    if len(marks) == 0:
        return None
    hits = int(marks.sum())
    return Spread(hits / len(marks), 0.0, *wilson(hits, len(marks)))


def p_values(calibration: Tensor, score: Tensor) -> Tensor:
    """Return p = (1 + #{calibration >= s}) / (n + 1), as the guard itself ranks a score."""
    ordered = plain(calibration).sort().values
    above = len(ordered) - torch.searchsorted(ordered, plain(score), right=False)
    return (1 + above.double()) / (1 + len(ordered))


def flagged(calibration: Tensor, score: Tensor, target: float) -> Tensor | None:
    """Mark (N,) the rows flagged at a target rate; None where calibration cannot promise it."""
    return p_values(calibration, score) <= target if len(calibration) >= 1 / target else None


def flag_rate(calibration: Tensor, score: Tensor, target: float) -> Spread | None:
    """Return the share of rows flagged at `target`: the realised rate of clean rows, or the hits."""
    marks = flagged(calibration, score, target)
    return None if marks is None else share(marks)


def curve(negative: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Return false- and true-positive rates (T,) at every distinct score, the highest first."""
    negative, positive = plain(negative).sort().values, plain(positive).sort().values
    score = torch.cat([negative, positive]).unique().flip(0)
    fpr, tpr = (
        (len(side) - torch.searchsorted(side, score, right=False)).double() / len(side)
        for side in (negative, positive)
    )
    return fpr, tpr


def aupr(negative: Tensor, positive: Tensor, *, prevalence: float | None = None) -> float | None:
    """Return the average precision: the mean of precision over recall, without interpolation.

    prevalence: share of positives that precision is computed for; None takes the sample's own.
    """
    if len(negative) == 0 or len(positive) == 0:
        return None
    share = len(positive) / (len(negative) + len(positive)) if prevalence is None else prevalence
    fpr, tpr = curve(negative, positive)
    precision = share * tpr / (share * tpr + (1 - share) * fpr)
    return float((tpr.diff(prepend=tpr.new_zeros(1)) * precision).sum())


def fpr_at_tpr(negative: Tensor, positive: Tensor, *, tpr: float = 0.95) -> float | None:
    """Return the lowest false-positive rate at which at least `tpr` of the positives are found."""
    if len(negative) == 0 or len(positive) == 0:
        return None
    false, true = curve(negative, positive)
    return float(false[true >= tpr - 1e-12][0])


def roc(negative: Tensor, positive: Tensor, *, grid: Tensor = GRID) -> list[list[float]]:
    """Return [fpr, tpr] pairs: the most found by any threshold that keeps to each rate of `grid`."""
    if len(negative) == 0 or len(positive) == 0:
        return []
    fpr, tpr = (pad(rates, (1, 0)) for rates in curve(negative, positive))
    best = tpr[torch.searchsorted(fpr, grid + 1e-12, right=True) - 1]
    return [[f, t] for f, t in zip(grid.tolist(), best.tolist(), strict=True)]


def guarded_success(won: Tensor, rejected: Tensor) -> float:
    """Return P(misclassified and not rejected) over all attacked rows (N,), failures included."""
    return float((won & ~rejected).double().mean())


def robust_accuracy(
    clean_rejected: Tensor, won: Tensor, rejected: Tensor, *, accuracy: float = 1.0
) -> float:
    """Return the share of images that are served well both clean and attacked.

    Such an image is answered rightly when clean (not rejected), and when attacked either answered
    rightly or rejected (the robust risk of a detector in Tramer 2022,
    arXiv 2107.11630; a reconstruction). The rows (N,)
    are images that the network gets right when clean, a share `accuracy` of all; the others count
    as errors.
    """
    return accuracy * float((~clean_rejected & (rejected | ~won)).double().mean())


def coverage(rejected: Tensor, right: Tensor) -> dict[str, float | None]:
    """Return what rejection costs on clean images (N,), those the network gets wrong included.

    `coverage` is the share that is answered, `accuracy` the share of all that the network gets
    right, `accuracy_answered` that among the answered.
    """
    answered = right[~rejected]
    return {
        "coverage": float((~rejected).double().mean()) if len(rejected) else None,
        "accuracy": float(right.double().mean()) if len(right) else None,
        "accuracy_answered": float(answered.double().mean()) if len(answered) else None,
    }


def per_class(marks: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, float | None]:
    """Return the share of marked rows (N,) of every class; None for a class without rows."""
    spreads = {name: share(marks[labels == index]) for index, name in enumerate(names)}
    return {name: None if found is None else found.mean for name, found in spreads.items()}


def plain(score: Tensor) -> Tensor:
    """Return scores as the figures want them: float64, on the CPU, without a graph."""
    return score.detach().double().cpu()
