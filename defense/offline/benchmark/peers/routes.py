"""The published path detectors, with this project's routers: CDRP and effective paths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from defense.detectors.overlap import fit_overlap_view
from defense.offline.benchmark.peers.contract import Case, Sample, Score, shuffled
from defense.offline.benchmark.peers.features import Network, fit_judge, network_of
from defense.offline.collect import route
from defense.offline.comparison.rows import of_each_class
from defense.routers import Router, RouterRecipe
from defense.routers.distillation import DistillationRecipe
from defense.sites import device_of
from defense.types import FitData, Routed

MOST = 300
"""Clean and attacked images that a slow detector is fitted to, each; published: a few per class."""


@dataclass(frozen=True)
class Routes:
    """A fitted router and the network whose paths it takes."""

    network: Network
    router: Router

    def __call__(self, sample: Sample) -> Routed:
        """Take the paths of a sample."""
        return route(self.network.network, self.router, self.network.inputs(sample.pixels))


def routes_of(case: Case, recipe: RouterRecipe) -> Routes:
    """Fit a router at the sites of the case's layout."""
    network = network_of(case)
    examples = network.inputs(case.clean.pixels[: max(2, recipe.examples)])
    router = recipe.fit(
        network.network,
        case.layout.sites,
        examples.to(device_of(network.network)),
        seed=case.seed,
        progress=lambda _: None,
    )
    return Routes(network, router)


def cdrp(case: Case) -> Score:
    """A random forest of the gates that `distillation` finds (Wang et al., CVPR 2018)."""
    take = routes_of(case, DistillationRecipe())
    clean, attacked = (take(few(each, MOST, case.seed)) for each in (case.clean, case.attacks))
    judge = fit_judge("forest", clean.path, attacked.path, case.seed)
    return lambda sample: judge(take(sample).path)


def effective_path(recipe: RouterRecipe, *, images_per_class: int) -> Callable[[Case], Score]:
    """Return how to fit a random forest of overlaps with class paths (Qiu et al., CVPR 2019).

    At every site the overlap with the path of the first and of the second answer.
    """

    def learn(case: Case) -> Score:
        take = routes_of(case, recipe)
        shape, judging = case.split()
        shape = shape.take(of_each_class(shape.labels.cpu(), images_per_class))
        data = FitData(take(shape.clean), shape.labels.cpu())
        view = fit_overlap_view(data, take.router.layout, images_per_class=images_per_class)

        def overlaps(sample: Sample) -> Tensor:
            return view.features(take(sample))

        clean, attacked = (
            overlaps(few(each, MOST, case.seed)) for each in (judging.clean, case.attacks)
        )
        judge = fit_judge("forest", clean, attacked, case.seed)
        return lambda sample: judge(overlaps(sample))

    return learn


def few(sample: Sample, most: int, seed: int) -> Sample:
    """Return at most so many images, drawn at random."""
    return sample.take(shuffled(len(sample), seed)[:most])
