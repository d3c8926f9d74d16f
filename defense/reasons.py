"""Why a path is unusual, read off what a run left behind: no extra pass, nothing of the input.

Three views answer, where the guard's detector has learnt them. The density view says at which sites
the path lies far from those of clean images of the predicted class, and by which channels; the
trajectory view says which class every site reads; the witness says which class it believes. The
guard's exemplars tell which clean images took the nearest paths, and how the request keeps to the
pathways of classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from defense.detectors import Detector
from defense.detectors.density import Density, DensityView
from defense.detectors.fused import Fused
from defense.detectors.gaussian import Standardiser
from defense.detectors.trajectory import Trajectory, TrajectoryView
from defense.exemplars import Neighbour, Pathway, follow_pathway
from defense.figures import rounded
from defense.guard import Guard
from defense.types import Routed

FARTHEST = 1e6
"""Deviations are cut off here: what is written down has no infinite numbers."""


@dataclass(frozen=True)
class Belief:
    """A class, by name, and the probability in [0, 1] that one reader gives to it."""

    label: str
    share: float

    def as_json(self) -> dict[str, Any]:
        return {"class": self.label, "share": rounded(self.share)}


@dataclass(frozen=True)
class ChannelReason:
    """A channel and its distance to the predicted class's mean, in standard deviations.

    Signed: above 0 where the channel is stronger than usual. Of several statistics of a channel the
    farthest counts.
    """

    channel: int
    deviation: float

    def as_json(self) -> dict[str, Any]:
        return {"channel": self.channel, "deviation": rounded(self.deviation)}


@dataclass(frozen=True)
class SiteReason:
    """A site, by how many standard deviations its distance exceeds those of clean images, and why.

    channels: those farthest from the predicted class's mean, farthest first.
    """

    site: str
    deviation: float
    channels: tuple[ChannelReason, ...]

    def as_json(self) -> dict[str, Any]:
        channels = [channel.as_json() for channel in self.channels]
        return {"site": self.site, "deviation": rounded(self.deviation), "channels": channels}


@dataclass(frozen=True)
class Near:
    """The exemplars whose paths are nearest to a request's, and how it keeps to class pathways.

    clean: of all classes; predicted: of the predicted class; nearest first. pathway: None where the
    guard's router knows no pathways. names: of all classes.
    """

    clean: tuple[Neighbour, ...] = ()
    predicted: tuple[Neighbour, ...] = ()
    pathway: Pathway | None = None
    names: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "nearest_clean": [one.as_json(self.names) for one in self.clean],
            "nearest_predicted": [one.as_json(self.names) for one in self.predicted],
            "pathway": None if self.pathway is None else self.pathway.as_json(self.names),
        }


@dataclass(frozen=True)
class Reasons:
    """What the views of a guard say about one request; classes are names.

    sites: the most unusual ones first. votes: what every site reads, by site, in the order of the
    layout. Both are empty, and `witness` is None, where the guard has not learnt to say; `near` is
    empty for a guard without exemplars.
    """

    predicted: str
    runner_up: str | None
    sites: tuple[SiteReason, ...] = ()
    votes: tuple[tuple[str, Belief], ...] = ()
    witness: Belief | None = None
    near: Near = Near()

    def as_json(self) -> dict[str, Any]:
        """Return plain values that JSON can hold, numbers to four significant digits."""
        return {
            "predicted": self.predicted,
            "runner_up": self.runner_up,
            "sites": [site.as_json() for site in self.sites],
            "votes": [{"site": site, **belief.as_json()} for site, belief in self.votes],
            "witness": None if self.witness is None else self.witness.as_json(),
            **self.near.as_json(),
        }


@torch.inference_mode()
def reasons(guard: Guard, routed: Routed, *, most: int = 5) -> list[Reasons]:
    """Return why each of N runs is what the guard takes it for, from what the runs carry.

    most: sites, channels of a site, and clean images that are named at most.
    """
    names, detector = guard.class_names, guard.detector
    first = routed.logits.topk(min(2, routed.logits.shape[1]), dim=1).indices.tolist()
    sites, votes = _unusual(detector, routed, most), _votes(detector, routed, names)
    witness = [] if routed.witness is None else beliefs(routed.witness, names)
    near = _near(guard, routed, most)
    return [
        Reasons(
            predicted=names[answers[0]],
            runner_up=names[answers[1]] if answers[1:] else None,
            sites=sites[row] if sites else (),
            votes=votes[row] if votes else (),
            witness=witness[row] if witness else None,
            near=near[row] if near else Near(),
        )
        for row, answers in enumerate(first)
    ]


def trajectory_view(detector: Detector) -> TrajectoryView | None:
    """Return what reads a class at every site, where `detector` has learnt that."""
    match detector:
        case Fused(trajectory=view) | Trajectory(view=view):
            return view
    return None


def density_view(detector: Detector) -> tuple[DensityView, Standardiser] | None:
    """Return what knows the usual paths of a class, with the usual log-distances, where it is learnt."""
    match detector:
        case Fused(alarm=known) | (Density() as known):
            return known.view, known.usual
    return None


def deviations(view: DensityView, routed: Routed) -> list[Tensor]:
    """Return, per site, (N, channels): signed distances to the predicted class's mean.

    In standard deviations of the channel over clean images of all classes. The mean is the one that
    the class's Gaussian holds, in the leading directions of the site's path.
    """
    layout, found = view.layout, []
    for site, columns, density in zip(layout.sites, layout.columns, view.sites, strict=True):
        mean = density.gaussian.mean[routed.predicted] @ density.directions.T
        offset = density.standardise(routed.path[:, columns].float()) - mean
        # A column that never varied in the fit stands at zero in the standardised space.
        offset = torch.where(density.standardise.scale.isfinite(), offset, 0.0)
        table = offset.view(len(offset), len(layout.statistics), site.channels)
        farthest = table.abs().argmax(dim=1, keepdim=True)
        found.append(_bounded(table.gather(1, farthest).squeeze(1)))
    return found


def beliefs(logits: Tensor, names: Sequence[str]) -> list[Belief]:
    """Return the likeliest class of each row of logits (N, K)."""
    share, index = logits.float().softmax(dim=1).max(dim=1)
    rows = zip(index.tolist(), share.nan_to_num(0.0).tolist(), strict=True)
    return [Belief(names[label], probability) for label, probability in rows]


def _unusual(detector: Detector, routed: Routed, most: int) -> list[tuple[SiteReason, ...]]:
    """Return the most unusual sites of every run; nothing where the detector knows no usual ones."""
    known = density_view(detector)
    if known is None:
        return []
    view, usual = known
    names, channels = view.layout.names, deviations(view, routed)
    # Log-distances in the leading directions and off them: a site is as unusual as the larger one.
    excess = usual(view.features(routed)).view(len(routed), len(names), 2).amax(dim=2)
    values, order = _bounded(excess).topk(min(most, len(names)), dim=1)
    return [
        tuple(
            SiteReason(names[site], value, _channels(channels[site][row], most))
            for site, value in zip(sites, row_values, strict=True)
        )
        for row, (sites, row_values) in enumerate(zip(order.tolist(), values.tolist(), strict=True))
    ]


def _channels(deviation: Tensor, most: int) -> tuple[ChannelReason, ...]:
    """Name the farthest of one site's channels (C,)."""
    order = deviation.abs().topk(min(most, len(deviation))).indices
    pairs = zip(order.tolist(), deviation[order].tolist(), strict=True)
    return tuple(ChannelReason(channel, value) for channel, value in pairs)


def _votes(
    detector: Detector, routed: Routed, names: Sequence[str]
) -> list[tuple[tuple[str, Belief], ...]]:
    """Return what every site reads in every run; nothing where the detector has no readers."""
    view = trajectory_view(detector)
    if view is None:
        return []
    evidence = view.evidence(routed)
    said = iter(beliefs(evidence.flatten(0, 1), names))
    return [tuple((site, next(said)) for site in view.layout.names) for _ in range(len(routed))]


def _near(guard: Guard, routed: Routed, most: int) -> list[Near]:
    """Return what is near to every run; nothing where the guard names no clean images."""
    exemplars, nearness = guard.exemplars, guard.nearness
    if exemplars is None or nearness is None:
        return []
    sketches, labels = nearness.sketch(routed.path), routed.predicted
    clean = exemplars.nearest(sketches, most=most)
    predicted = exemplars.nearest(sketches, most=most, labels=labels)
    pathways, layout = exemplars.pathways, guard.router.layout
    followed = [
        None if pathways is None else follow_pathway(path, label, pathways, layout, most=most)
        for path, label in zip(routed.path, labels.tolist(), strict=True)
    ]
    rows = zip(clean, predicted, followed, strict=True)
    return [Near(*one, names=guard.class_names) for one in rows]


def _bounded(values: Tensor) -> Tensor:
    return values.nan_to_num(0.0, FARTHEST, -FARTHEST).clamp(-FARTHEST, FARTHEST)
