"""Peers that read every layer: Mahalanobis distances, neighbours' labels, local dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from defense.detectors.gaussian import (
    ClassGaussian,
    fit_class_gaussian,
    fit_standardiser,
)
from defense.errors import DataError
from defense.offline.benchmark.peers.contract import Case, Sample, Score, shuffled
from defense.offline.benchmark.peers.features import (
    fit_judge,
    penultimate,
    pooled_sites,
    with_noise,
)
from defense.types import Routed

NEIGHBOURS = 75
"""Papernot and McDaniel's k, fitted to tens of thousands of images."""
MINIBATCH = 100
MINIBATCHES = 5
DIMENSION_NEIGHBOURS = 20
LARGEST_DIMENSION = 1000.0


def mahalanobis(case: Case) -> Score:
    """Distance of the last features to the nearest class (Lee et al. 2018, eq. 2)."""
    gaussian = fit_class_gaussian(
        penultimate(case.layout, case.clean.routed), case.labels.cpu(), case.classes
    )
    return lambda sample: nearest_class(gaussian, penultimate(case.layout, sample.routed))


def mahalanobis_all(case: Case) -> Score:
    """A logistic regression of every layer's distance, fitted with attacks (Lee et al. 2018).

    Without the small step that the authors take on the input before they measure.
    """
    shape, judging = case.split()
    distances = _layer_distances(shape)
    judge = fit_judge(
        "logistic", distances(with_noise(judging)), distances(case.attacks.routed), case.seed
    )
    return lambda sample: judge(distances(sample.routed))


def mahalanobis_sum(case: Case) -> Score:
    """The sum of every layer's distance in units of its clean spread: no attack is looked at."""
    shape, judging = case.split()
    distances = _layer_distances(shape)
    standardise = fit_standardiser(distances(judging.clean.routed))
    return lambda sample: standardise(distances(sample.routed)).sum(1)


def _layer_distances(case: Case) -> Callable[[Routed], Tensor]:
    """Fit a Gaussian per layer; return what gives the distances (N, S) of runs."""
    gaussians = [
        fit_class_gaussian(site, case.labels.cpu(), case.classes)
        for site in pooled_sites(case.layout, case.clean.routed)
    ]

    def distances(routed: Routed) -> Tensor:
        sites = pooled_sites(case.layout, routed)
        pairs = zip(gaussians, sites, strict=True)
        return torch.stack([nearest_class(g, site) for g, site in pairs], dim=1)

    return distances


def nearest_class(gaussian: ClassGaussian, features: Tensor) -> Tensor:
    """Return the squared Mahalanobis distance of (N, d) to the nearest class, per dimension: (N,)."""
    whiten = gaussian.whiten.double().T
    rows, centres = features @ whiten, gaussian.mean.double() @ whiten
    distance = torch.cdist(rows, centres, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.amin(1).square() / features.shape[1]


def deep_knn(case: Case) -> Score:
    """One minus the largest share of one class among neighbours at all layers.

    Papernot and McDaniel 2018: the nonconformity of a class is the number of neighbours, over all
    layers, of another class; credibility is the share of calibration images that conform no better
    than the best class does. It falls as that nonconformity rises, in steps: the nonconformity
    itself ranks the same and needs no calibration images.
    """
    share = _neighbour_shares(case)
    return lambda sample: 1 - share(sample).amax(1)


def deep_knn_answer(case: Case) -> Score:
    """The same nonconformity, of the class that the network answers instead of the best one."""
    share = _neighbour_shares(case)

    def score(sample: Sample) -> Tensor:
        answer = sample.routed.predicted.cpu()[:, None]
        return 1 - share(sample).gather(1, answer)[:, 0]

    return score


def _neighbour_shares(case: Case) -> Callable[[Sample], Tensor]:
    """Return what gives the classes' shares (N, K) among the k nearest clean images of all sites.

    Nearest by the cosine of centred features. k: never more than half a class's images.
    """
    k = min(NEIGHBOURS, max(1, len(case.clean) // (2 * case.classes)))
    sites = pooled_sites(case.layout, case.clean.routed)
    centres = [site.mean(0) for site in sites]
    known = [_directions(site, centre) for site, centre in zip(sites, centres, strict=True)]
    labels = torch.nn.functional.one_hot(case.labels.cpu(), case.classes).double()

    def shares(sample: Sample) -> Tensor:
        found = []
        for site, centre, rows in zip(
            pooled_sites(case.layout, sample.routed), centres, known, strict=True
        ):
            nearest = (_directions(site, centre) @ rows.T).topk(k, dim=1).indices
            found.append(labels[nearest].mean(1))
        return torch.stack(found).mean(0)

    return shares


def _directions(site: Tensor, centre: Tensor) -> Tensor:
    return torch.nn.functional.normalize(site - centre, dim=1)


def lid(case: Case) -> Score:
    """A logistic regression of every layer's local intrinsic dimension (Ma et al. 2018).

    Fitted with clean and noisy images against attacked ones; neighbours are clean images alone, so
    that a request is judged by itself. The authors take one minibatch of neighbours; here the
    dimension is a mean over several, which it is unstable without.
    """
    shape, judging = case.split()
    batches = _minibatches(shape)
    references = pooled_sites(case.layout, shape.clean.routed)

    def dimensions(routed: Routed) -> Tensor:
        pairs = zip(pooled_sites(case.layout, routed), references, strict=True)
        return torch.stack([_mean_dimension(x, known, batches) for x, known in pairs], dim=1)

    judge = fit_judge(
        "logistic", dimensions(with_noise(judging)), dimensions(case.attacks.routed), case.seed
    )
    return lambda sample: judge(dimensions(sample.routed))


def _minibatches(case: Case) -> Sequence[Tensor]:
    """Return row numbers of clean images, up to five times a hundred."""
    count = len(case.clean)
    if count <= DIMENSION_NEIGHBOURS:
        raise DataError(
            f"{count} clean images are left to look for {DIMENSION_NEIGHBOURS} neighbours among; "
            f"give at least {2 * DIMENSION_NEIGHBOURS} clean images"
        )
    batches = shuffled(count, case.seed).split(min(MINIBATCH, count))
    return [batch for batch in batches if len(batch) == len(batches[0])][:MINIBATCHES]


def _mean_dimension(rows: Tensor, known: Tensor, batches: Sequence[Tensor]) -> Tensor:
    return torch.stack([local_dimension(rows, known[batch]) for batch in batches]).mean(0)


def local_dimension(rows: Tensor, known: Tensor, k: int = DIMENSION_NEIGHBOURS) -> Tensor:
    """Return the maximum-likelihood local intrinsic dimension of rows (N, d) among (M, d): (N,).

    Ma et al. 2018, eq. 4, over the k nearest of M; at most 1000, which equal distances would exceed.
    """
    distance = torch.cdist(rows, known, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distance.topk(k, dim=1, largest=False).values.clamp(min=torch.finfo(rows.dtype).tiny)
    slope = (nearest / nearest[:, -1:]).log().mean(1)
    return -1 / slope.clamp(max=-1 / LARGEST_DIMENSION)
