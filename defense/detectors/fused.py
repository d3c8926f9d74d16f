"""`fused`: does everything that looked at the request agree with the answer?

The backbone's own certainty, the course of evidence along its path, the witness's answer and the
echoes' each give a few numbers about the one class that was answered. A linear judge per look weighs
them. With attacks it learns from attacked runs; without, from counterfeits: clean runs with another
answer put in the place of theirs, which every honest view must contradict.

Beside the judge stands an alarm for paths unlike anything that the fit saw, noise and other harmless
changes included. It is no more than that, because a judge of raw channels that tells attacks from
clean images tells noisy images from clean ones just as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from defense.detectors.density import ROWS, DensityView, fit_density_view, halves
from defense.detectors.gaussian import Standardiser, fit_standardiser
from defense.detectors.stacks import SiteStacks, pad, stack_sites
from defense.detectors.trajectory import TrajectoryView, course, fit_trajectory_view
from defense.errors import ArtifactError, DataError, GuardFailure
from defense.types import LOOKS, FitData, PathLayout, Routed, carries

REACH = 10.0
"""Standard deviations at which a view's numbers are cut off: none may outweigh all others."""
FLOOR = 1e-6
"""Probabilities are not told apart below this."""
LOWEST = math.log(FLOOR)
STEEP = 8.0
"""How fast the alarm for unknown paths rises, in log-odds per deviation of the log-distances."""


@dataclass(frozen=True)
class Judge:
    """Log-odds of attacked against clean from the numbers of one look. weight: (F,); bias: ().

    course: whether the course of evidence along the path is among the numbers.
    """

    look: str
    course: bool
    standardise: Standardiser
    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(N, F) -> (N,)."""
        return self.standardise(features).clamp(-REACH, REACH) @ self.weight + self.bias


@dataclass(frozen=True)
class Alarm:
    """How far a path lies outside of all that the fit saw. limit: () largest usual excess."""

    view: DensityView
    usual: Standardiser
    limit: Tensor

    def excess(self, distances: Tensor) -> Tensor:
        """(N, 2 S) -> (N,): mean of all sites' log-distances above the usual ones, in deviations."""
        return self.usual(distances).clamp(min=0).mean(dim=1)

    def __call__(self, distances: Tensor) -> Tensor:
        """(N, 2 S) -> (N,) log-odds: strongly negative for whatever resembles the fit."""
        return STEEP * (self.excess(distances) - self.limit) - STEEP


@dataclass(frozen=True)
class Fused:
    """Fitted fused detector: one judge for each look that the fit could show."""

    name: ClassVar[str] = "fused"

    trajectory: TrajectoryView
    alarm: Alarm
    judges: tuple[Judge, ...]

    def __post_init__(self) -> None:
        pairs = [
            (probe.standardise, site.standardise)
            for probe, site in zip(self.trajectory.probes, self.alarm.view.sites, strict=True)
        ]
        # Seen where it is made or loaded: on another device a comparison would wait for that.
        here = [pair for pair in pairs if pair[0].center.device.type == "cpu"]
        if not all(one.equals(other) for one, other in here):
            raise ArtifactError(
                "the views of the fused detector standardise paths differently; fit the guard again"
            )

    @property
    def looks(self) -> tuple[str, ...]:
        """The looks that it can score."""
        return tuple(judge.look for judge in self.judges)

    def score(self, routed: Routed) -> Tensor:
        """(N,) float64: log-odds of attacked against clean, or of an unknown path if higher."""
        judge = next((judge for judge in self.judges if judge.look == routed.look), None)
        if judge is None:
            raise GuardFailure(
                "score",
                f"the fused detector was not fitted for the look '{routed.look}'; it knows "
                f"{', '.join(self.looks)}",
            )
        steps, distances = self._views(routed)
        doubt = judge(agreement(steps if judge.course else None, routed))
        return torch.logaddexp(doubt, self.alarm(distances)).double()

    def _views(self, routed: Routed) -> tuple[Tensor, Tensor]:
        """Return the course (N, 3 S) and the log-distances (N, 2 S), from one reading of the path."""
        if len(routed) > ROWS:
            parts = torch.arange(len(routed), device=routed.path.device).split(ROWS)
            found = [self._views(routed.take(part)) for part in parts]
            return torch.cat([steps for steps, _ in found]), torch.cat([far for _, far in found])
        rows = self._stacks.rows(routed.path)
        maps = self._stacks.maps(rows)
        classes = self.trajectory.probes[0].weight.shape[1]
        evidence = self.trajectory.read(maps[..., :classes])
        distances = self.alarm.view.stacked.judge(
            maps[..., classes:], self._stacks.energies(rows), routed.predicted
        )
        return course(evidence, routed.logits), distances

    @cached_property
    def _stacks(self) -> SiteStacks:
        """Both views' maps side by side; they were fitted to the same standardised paths."""
        pairs = list(zip(self.trajectory.probes, self.alarm.view.sites, strict=True))
        with torch.inference_mode(False):
            directions = pad([site.directions for _, site in pairs])
            return stack_sites(
                self.trajectory.layout,
                [probe.standardise for probe, _ in pairs],
                [
                    torch.cat([probe.weight, own], dim=1)
                    for (probe, _), own in zip(pairs, directions, strict=True)
                ],
            )


@dataclass(frozen=True)
class FusedRecipe:
    """Hyper-parameters of the views and of the judges.

    counterfeits: how many times every clean run is counterfeited where there are no attacks.
    """

    rank: int = 32
    ridge: float = 1.0
    temperature: float = 0.1
    inverse_penalty: float = 0.05
    counterfeits: int = 3

    def fit(self, data: FitData, layout: PathLayout, *, seed: int) -> Fused:
        """Fit to clean runs, to attacked ones where there are any, and to harmless changes."""
        shape, judge = halves(data, seed)
        trajectory = fit_trajectory_view(
            shape, layout, ridge=self.ridge, temperature=self.temperature
        )
        density = fit_density_view(shape, layout, rank=self.rank)
        harmless = [judge.clean] if judge.shifted is None else [judge.clean, judge.shifted]
        negative = Routed.concat(harmless)
        positive, real = self._positive(judge, layout, seed)
        # A counterfeit does not know the course of a real attack: it is the last resort.
        judges = [
            self._judge(look, trajectory, knows, negative.at(look), positive.at(look), seed)
            for look in LOOKS
            if negative.shows(look)
            for knows in [real or not carries(look, "witness")]
        ]
        return Fused(trajectory, fit_alarm(density, judge.clean, negative), tuple(judges))

    def _positive(self, data: FitData, layout: PathLayout, seed: int) -> tuple[Routed, bool]:
        """Return what the judges learn to find, and whether it is real attacks."""
        if data.attacked is not None and len(data.attacked):
            return data.attacked, True
        right = data.clean.take(data.clean.predicted == data.labels)
        if len(right) < 2:
            raise DataError(
                f"only {len(right)} of the clean runs are classified as their labels say, so nothing "
                "can be counterfeited; check the labels of the data"
            )
        made = [counterfeit(right, layout, seed=seed + n) for n in range(self.counterfeits)]
        return Routed.concat(made), False

    def _judge(
        self,
        look: str,
        view: TrajectoryView,
        knows_course: bool,
        negative: Routed,
        positive: Routed,
        seed: int,
    ) -> Judge:
        from sklearn.linear_model import LogisticRegression

        features = [
            agreement(view.features(run) if knows_course else None, run)
            for run in (negative, positive)
        ]
        standardise = fit_standardiser(features[0])
        x = standardise(torch.cat(features)).clamp(-REACH, REACH).double().numpy()
        y = [0] * len(negative) + [1] * len(positive)
        model = LogisticRegression(
            C=self.inverse_penalty, class_weight="balanced", max_iter=3000, random_state=seed
        ).fit(x, y)
        weight = torch.tensor(model.coef_[0], dtype=torch.float32)
        return Judge(
            look, knows_course, standardise, weight, torch.tensor(model.intercept_[0]).float()
        )


def agreement(steps: Tensor | None, routed: Routed) -> Tensor:
    """Return (N, F): what all that `routed` carries has to say about the class that was answered.

    steps: (N, 3 S) the course of evidence along the path; None leaves it out.
    """
    logits = routed.logits.float()
    answer, runner_up = logits.topk(2, dim=1).indices.unbind(1)
    parts = [certainty(logits)]
    if steps is not None:
        parts.append(steps)
    if routed.witness is not None:
        parts.append(testimony(routed.witness.float(), logits, answer, runner_up))
    if routed.echoes is not None:
        parts.append(resonance(routed.echoes.float(), logits, answer))
    return torch.cat(parts, dim=1)


def certainty(logits: Tensor) -> Tensor:
    """(N, K) -> (N, 5): log-probabilities of the three first classes, of all but the first; scale."""
    ordered = logits.log_softmax(dim=1).sort(dim=1, descending=True).values
    first = ordered[:, :3]
    if first.shape[1] < 3:
        first = torch.nn.functional.pad(first, (0, 1), value=LOWEST)
    doubt = ordered[:, 1:].logsumexp(dim=1, keepdim=True)
    return torch.cat([floored(first), floored(doubt), logits.logsumexp(dim=1, keepdim=True)], dim=1)


def testimony(witness: Tensor, logits: Tensor, answer: Tensor, runner_up: Tensor) -> Tensor:
    """(N, K) twice, (N,) twice -> (N, 6): the witness on the answer, its runner-up, the best other.

    And how far that other is ahead, how sure the witness is, and the cross-entropy of both networks.
    """
    said = floored(witness.log_softmax(dim=1))
    mine, next_best = (said.gather(1, of[:, None]).squeeze(1) for of in (answer, runner_up))
    other = said.scatter(1, answer[:, None], -torch.inf).amax(dim=1)
    sure = (said.exp() * said).sum(dim=1)
    shared = (logits.softmax(dim=1) * said).sum(dim=1)
    return torch.stack([mine, next_best, other, other - mine, sure, -shared], dim=1)


def resonance(echoes: Tensor, logits: Tensor, answer: Tensor) -> Tensor:
    """(N, P, K), (N, K), (N,) -> (N, 2 P + 3): every echo on the answer, its lead over the best other.

    And the mean and least lead, and how far the answer's log-probability fell on the way.
    """
    index = answer[:, None, None].expand(-1, echoes.shape[1], 1)
    said = floored(echoes.log_softmax(dim=2))
    mine = said.gather(2, index).squeeze(2)
    lead = mine - said.scatter(2, index, -torch.inf).amax(dim=2)
    before = floored(logits.log_softmax(dim=1)).gather(1, answer[:, None])
    change = (mine - before).mean(dim=1, keepdim=True)
    return torch.cat(
        [mine, lead, lead.mean(1, keepdim=True), lead.amin(1, keepdim=True), change], dim=1
    )


def floored(said: Tensor) -> Tensor:
    """Return log-probabilities that are never below that of `FLOOR`."""
    # Bounded on both sides, which is how tests of a guard tell a cut-off, and let gradients pass it.
    return said.clamp(LOWEST, 0.0)


def counterfeit(routed: Routed, layout: PathLayout, *, seed: int) -> Routed:
    """Return clean runs (N, ...) that claim an answer which is not theirs: attacks that nobody made.

    The answer changes places with another class, the likelier the more the backbone leans to it.
    From a random site on, the path is that of a run with the claimed answer, where there is one: an
    attacked path starts as its image's and ends as its answer's. Every echo may be deceived as well.
    The witness says what it said.
    """
    draw = torch.Generator().manual_seed(seed)
    count, rows = len(routed), torch.arange(len(routed))
    truth = routed.predicted
    lean = (routed.logits / 2).softmax(dim=1).clamp(min=FLOOR)
    claim = lean.scatter(1, truth[:, None], 0.0).multinomial(1, generator=draw).squeeze(1)
    logits = swapped(routed.logits, truth, claim)
    path = routed.path.clone()
    starts = torch.randint(len(layout.columns) + 1, (count,), generator=draw)
    for label in claim.unique():
        donors, mine = rows[truth == label], rows[claim == label]
        if len(donors) == 0:
            continue
        chosen = donors[torch.randint(len(donors), (len(mine),), generator=draw)]
        for site, columns in enumerate(layout.columns):
            late = starts[mine] <= site
            path[mine[late], columns] = routed.path[chosen[late], columns]
    echoes = routed.echoes
    if echoes is not None:
        deceived = torch.rand(echoes.shape[:2], generator=draw) < 0.5
        parts = [
            torch.where(fell[:, None], swapped(echo, truth, claim), echo)
            for fell, echo in zip(deceived.unbind(1), echoes.unbind(1), strict=True)
        ]
        echoes = torch.stack(parts, dim=1)
    return replace(routed, logits=logits, path=path, echoes=echoes)


def swapped(logits: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return logits (N, K) whose classes `one` and `other` (N,) have changed places."""
    of_one, of_other = logits.gather(1, one[:, None]), logits.gather(1, other[:, None])
    return logits.scatter(1, one[:, None], of_other).scatter(1, other[:, None], of_one)


def fit_alarm(view: DensityView, clean: Routed, harmless: Routed) -> Alarm:
    """Set the limit to the largest excess that any harmless run shows."""
    alarm = Alarm(view, fit_standardiser(view.features(clean)), torch.tensor(0.0))
    return replace(alarm, limit=alarm.excess(view.features(harmless)).amax())
