"""Ways to train a backbone. One file per published method, one row in the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from defense.errors import ConfigError, nearest
from defense.offline.methods.class_gates import ClassGatesObjective
from defense.offline.methods.decoupled import DecoupledObjective
from defense.offline.methods.selective import SelectiveObjective
from defense.offline.networks import Architecture, CifarResNet, ClassGatedResNet, DecoupledResNet
from defense.offline.training import CrossEntropy, Objective, TrainingSettings


@dataclass(frozen=True)
class Method:
    """The network that a method trains, what it minimises, and the settings that suit it.

    needs_start: it goes on from the weights of a trained plain network.
    """

    network: Callable[[Architecture], CifarResNet]
    objective: Objective
    settings: TrainingSettings
    needs_start: bool = False


METHODS: dict[str, Method] = {
    "plain": Method(CifarResNet, CrossEntropy(), TrainingSettings()),
    "decoupled": Method(
        DecoupledResNet,
        DecoupledObjective(),
        TrainingSettings(epochs=10, learning_rate=0.1, small_epochs=0),
        needs_start=True,
    ),
    "class_gates": Method(
        ClassGatedResNet,
        ClassGatesObjective(),
        TrainingSettings(epochs=9, learning_rate=0.05, small_epochs=0),
        needs_start=True,
    ),
    "selective": Method(
        CifarResNet,
        SelectiveObjective(),
        TrainingSettings(epochs=6, learning_rate=0.05, small_epochs=0),
        needs_start=True,
    ),
}


def method_named(name: str) -> Method:
    """Return the table's row `name`; ConfigError names the nearest one otherwise."""
    if name not in METHODS:
        raise ConfigError(f"no training method '{name}'{nearest(name, METHODS)}")
    return METHODS[name]
