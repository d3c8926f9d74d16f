"""A witness, echoes and a detector that looks at them, small enough for any test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from defense.calibration import Calibration
from defense.guard import Guard
from defense.looks import Echo, Extras, Perturbation
from defense.offline.networks import Architecture, CifarResNet, Normalisation
from defense.offline.witness import fold
from defense.types import Routed
from defense.witness import Witness

NAMES = tuple(map(str, range(10)))
ECHO = Echo((Perturbation("noise", 0.05), Perturbation("mirror"), Perturbation("noise", 0.05)))


@dataclass(frozen=True)
class Disagreement:
    """How far the answers that it is shown stand from the network's own; the path's energy alone."""

    name: ClassVar[str] = "disagreement"
    looks: ClassVar[tuple[str, ...]] = (
        "path",
        "path+witness",
        "path+echoes",
        "path+witness+echoes",
    )

    def score(self, routed: Routed) -> Tensor:
        own = routed.logits.double().softmax(1)
        score = routed.path.double().square().mean(1)
        if routed.witness is not None:
            score = score + (own - routed.witness.double().softmax(1)).abs().sum(1)
        if routed.echoes is not None:
            score = score + (own[:, None] - routed.echoes.double().softmax(2)).abs().sum((1, 2))
        return score


def small_network(seed: int = 0) -> CifarResNet:
    """Return a residual network with batch norm statistics and factors drawn from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = CifarResNet(Architecture((1, 2), (6, 8), stem=4)).eval()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.normal_(module.weight, 0.5, 1.0)
                torch.nn.init.normal_(module.bias)
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return network.requires_grad_(False)


NORMALISATION = Normalisation((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def small_witness(dtype: torch.dtype = torch.float32) -> Witness:
    """Return a witness of grey 8x8 images in [0, 1], which knows nothing."""
    one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    return fold(
        small_network(),
        NORMALISATION,
        backbone_scale=one,
        backbone_shift=zero,
        classes=NAMES,
        wanted=NAMES,
        side=8,
        dtype=dtype,
    )


def shown(run: Routed, seed: int = 0) -> Routed:
    """Return a run with a witness and echoes drawn from a seed."""
    draw = torch.Generator().manual_seed(seed)
    count, classes = run.logits.shape
    witness = torch.randn(count, classes, generator=draw)
    return Routed(run.logits, run.path, witness, torch.randn(count, 3, classes, generator=draw))


def with_extras(guard: Guard, extras: Extras, runs: Routed) -> Guard:
    """Return `guard` with the detector above, calibrated for all that `extras` and `runs` show."""
    detector = Disagreement()
    calibrations = {
        look: Calibration(detector.score(runs.at(look)), runs.predicted)
        for look in detector.looks
        if runs.shows(look)
    }
    return Guard(
        guard.fingerprint,
        guard.router,
        detector,
        calibrations,
        guard.class_names,
        guard.inputs,
        guard.facts,
        extras.witness,
        extras.echo,
    )
