"""Who takes part in a study: our detectors with what they are made of, and the published ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from defense.calibration import Calibration
from defense.config import SecondLook
from defense.detectors import detector_named
from defense.errors import DataError
from defense.offline.benchmark.peers import PEERS, Peer, Sample, Score
from defense.types import FitData, PathLayout, Routed, carries

BELOW_P = SecondLook().below_p
"""First p-value up to which a request gets the second look: the settings' default."""
CERTAIN = 1e6
"""Above every score: a request that is looked at again ranks above those that are not."""
Fit = Literal["attacks", "clean"]


@dataclass(frozen=True)
class Trial:
    """What a contestant may learn from, for one seed. labels: of views and fit images, in order.

    views, fit, calibration: clean images. attacked: successful attacks on fit images; None for a
    fit on clean data alone. shifted: harmless changes of fit images.
    """

    model: nn.Module
    layout: PathLayout
    views: Sample
    fit: Sample
    labels: Tensor
    attacked: Sample | None
    shifted: Sample
    calibration: Sample
    seed: int

    def data(self) -> FitData:
        """Return all of it as our detectors take it."""
        judged = torch.arange(len(self.labels)) >= len(self.views)
        return FitData(
            clean=Routed.concat([self.views.routed, self.fit.routed]),
            labels=self.labels,
            attacked=None if self.attacked is None else self.attacked.routed,
            shifted=self.shifted.routed,
            judged=judged,
        )

    def clean(self) -> Sample:
        """Return views and fit images as one."""
        pixels = torch.cat([self.views.pixels, self.fit.pixels])
        return Sample(pixels, Routed.concat([self.views.routed, self.fit.routed]))


@dataclass(frozen=True)
class Contestant:
    """A detector that takes part. `learn` returns its score; larger = more suspicious.

    kind: `ours`, `peer`, `baseline` or `control`. slow: judged on fewer images. needs: the look that
    runs must show.
    """

    name: str
    kind: str
    fit: Fit
    about: str
    learn: Callable[[Trial], Score]
    slow: bool = False
    needs: str = "path"


@dataclass(frozen=True)
class TwoLooks:
    """Scores in the order of the served p-values: doubtful rows first, by their second look."""

    first: Score
    second: Score
    calibration: Calibration
    below_p: float = BELOW_P

    def doubtful(self, sample: Sample) -> Tensor:
        """(N,) which rows get the second look."""
        score = self.first(sample)
        return self.calibration.rank(score, sample.routed.predicted).p_value <= self.below_p

    def __call__(self, sample: Sample) -> Tensor:
        """(N,) scores."""
        score, doubtful = self.first(sample), self.doubtful(sample)
        return torch.where(doubtful, CERTAIN + self.second(sample), score)


def contestants() -> Iterator[Contestant]:
    """Yield everyone, ours first: the default, then what it is without one of its parts."""
    yield from _ours("pathguard", "attacks", "all looks, fitted with attacks")
    yield from _ours("pathguard clean", "clean", "all looks, fitted with clean images alone")
    for fit, mark in (("attacks", ""), ("clean", " clean")):
        yield _look(f"without echoes{mark}", fit, "path+witness", "the first look alone")  # type: ignore[arg-type]
        yield _look(f"path alone{mark}", fit, "path", "neither witness nor echoes")  # type: ignore[arg-type]
    for name in ("density", "trajectory", "overlap"):
        yield _path_detector(name, "clean")
    yield _path_detector("supervised", "attacks")
    about = "how little the witness believes the answer"
    yield Contestant("witness alone", "control", "clean", about, _witness, needs="path+witness")
    for name, peer in PEERS.items():
        yield _peer(name, peer)


def _ours(name: str, fit: Fit, about: str) -> Iterator[Contestant]:
    yield Contestant(name, "ours", fit, about, lambda trial: two_looks(trial, fit))


def two_looks(trial: Trial, fit: Fit) -> Score:
    """Fit the default detector and return its score as served: a second look where in doubt."""
    first, second = looks_of(trial.fit.routed)
    score = _fitted(trial, "fused", fit)
    ordered = Calibration(score(first)(trial.calibration), trial.calibration.routed.predicted)
    return score(first) if first == second else TwoLooks(score(first), score(second), ordered)


def looks_of(routed: Routed) -> tuple[str, str]:
    """Return the first look, all but echoes, and the fullest one that these runs carry."""
    whole = routed.look
    return ("path+witness" if carries(whole, "witness") else "path"), whole


def _fitted(trial: Trial, name: str, fit: Fit) -> Callable[[str], Score]:
    """Fit a detector of ours; returns its score at a look."""
    data = trial.data()
    if fit == "clean":
        data = FitData(data.clean, data.labels, None, data.shifted, data.judged)
    detector = detector_named(name).recipe().fit(data, trial.layout, seed=trial.seed)
    return lambda look: lambda sample: detector.score(sample.routed.at(look))


def _look(name: str, fit: Fit, look: str, about: str) -> Contestant:
    return Contestant(
        name, "ours", fit, about, lambda trial: _fitted(trial, "fused", fit)(look), needs=look
    )


def _path_detector(name: str, fit: Fit) -> Contestant:
    about = f"the detector '{name}' on the activation path"
    return Contestant(name, "ours", fit, about, lambda trial: _fitted(trial, name, fit)("path"))


def _witness(_trial: Trial) -> Score:
    def score(sample: Sample) -> Tensor:
        said = sample.routed.witness
        if said is None:
            raise DataError("these runs carry no witness; name its card with --witness")
        answer = sample.routed.predicted[:, None]
        return -said.double().log_softmax(1).gather(1, answer).squeeze(1)

    return score


def _peer(name: str, peer: Peer) -> Contestant:
    def learn(trial: Trial) -> Score:
        attacked = trial.attacked if peer.needs_attacks else None
        return peer.fit(
            trial.model, trial.layout, trial.clean(), trial.labels, attacked, seed=trial.seed
        )

    fit: Fit = "attacks" if peer.needs_attacks else "clean"
    return Contestant(name, peer.kind, fit, peer.about, learn, peer.slow)
