"""What several peers look at: pooled sites, the network behind the pixels, a judge of features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from defense.errors import DataError, SiteError
from defense.offline.attacks import uniform_noise
from defense.offline.benchmark.peers.contract import Case, Sample
from defense.offline.collect import route
from defense.offline.comparison.judges import classifiers
from defense.routers.activation import ActivationRouter
from defense.sites import device_of
from defense.types import PathLayout, Routed

NOISE = 8 / 255
"""Bound of the uniform noise that stands among the harmless images of judges fitted with attacks."""
ROWS = 256


def pooled_sites(layout: PathLayout, routed: Routed) -> list[Tensor]:
    """Return the mean of every channel, site by site: S tensors (N, channels) in float64."""
    if "mean" not in layout.statistics:
        raise DataError(
            f"the paths hold {', '.join(layout.statistics)} of every channel and published detectors "
            "read its mean; take paths with the 'activation' router and the statistic 'mean'"
        )
    place = layout.statistics.index("mean")
    starts = [
        columns.start + place * site.channels
        for columns, site in zip(layout.columns, layout.sites, strict=True)
    ]
    path = routed.path.double().cpu()
    return [
        path[:, start : start + site.channels]
        for start, site in zip(starts, layout.sites, strict=True)
    ]


def penultimate(layout: PathLayout, routed: Routed) -> Tensor:
    """Return the pooled features of the last site, (N, channels) in float64."""
    return pooled_sites(layout, routed)[-1]


@dataclass(frozen=True)
class Network:
    """The network that has the sites of a layout, and the model of pixels that it is called by."""

    model: nn.Module
    network: nn.Module

    def inputs(self, pixels: Tensor) -> Tensor:
        """Return what the network is given for pixels (N, C, H, W), on the CPU."""
        seen: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0].detach().cpu().clone())

        handle = self.network.register_forward_pre_hook(keep)
        try:
            answers(self.model, pixels)
        finally:
            handle.remove()
        return torch.cat(seen)


def network_of(case: Case) -> Network:
    """Return the model itself, or the part of it that it wraps, whichever has the layout's sites.

    A model of pixels shifts and scales them before the network; the layout was found without that.
    SiteError where neither has them.
    """
    wanted = {site.module for site in case.layout.sites}
    for module in (case.model, *case.model.children()):
        if wanted <= {name for name, _ in module.named_modules()}:
            return Network(case.model, module)
    raise SiteError(
        f"neither {type(case.model).__name__} nor a direct part of it has the module "
        f"'{min(wanted)}' and the other sites of the layout; give the model whose paths these are"
    )


def answers(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return logits (N, K) of pixels (N, C, H, W), on the CPU in float64."""
    device = device_of(model)
    with torch.no_grad():
        return torch.cat([model(part.to(device)).cpu().double() for part in pixels.split(ROWS)])


def with_noise(case: Case) -> Routed:
    """Return the runs of the clean images, and of the same images with uniform noise.

    Noise of the size of an attack is harmless, and what is fitted with attacks has to be told.
    """
    noisy = uniform_noise(case.clean.pixels, eps=NOISE, seed=case.seed)
    network = network_of(case)
    router = ActivationRouter(case.layout)
    found = route(network.network, router, network.inputs(noisy))
    return Routed.concat(
        [Routed(case.clean.routed.logits.cpu(), case.clean.routed.path.cpu()), found]
    )


def fit_judge(
    kind: Literal["logistic", "forest"], clean: Tensor, attacked: Tensor, seed: int
) -> Callable[[Tensor], Tensor]:
    """Fit a common classifier to features (N, F) of clean and of attacked images.

    Returns log-odds, or the share of trees, of features: (N, F) -> (N,).
    """
    judge = classifiers()[kind](seed)
    x = torch.cat([clean, attacked]).double().cpu().numpy()
    judge.fit(x, [0] * len(clean) + [1] * len(attacked))
    if kind == "forest":
        judge.set_params(n_jobs=1)  # threads add the trees up in any order, which changes last bits
        return lambda features: torch.from_numpy(
            judge.predict_proba(features.double().numpy())[:, 1]
        )
    # Log-odds still differ where probabilities have become 1.
    return lambda features: torch.from_numpy(judge.decision_function(features.double().numpy()))


def judged(
    kind: Literal["logistic", "forest"], features: Callable[[Case, Sample], Tensor]
) -> Callable[[Case], Callable[[Sample], Tensor]]:
    """Return how to fit a common classifier to features (N, F) of samples, with attacks."""

    def learn(case: Case) -> Callable[[Sample], Tensor]:
        judge = fit_judge(kind, features(case, case.clean), features(case, case.attacks), case.seed)
        return lambda sample: judge(features(case, sample))

    return learn
