"""Ways to train a backbone. One file per published method, one row in the table."""

from __future__ import annotations

from dataclasses import dataclass, field

from defense.errors import ConfigError, nearest
from defense.offline.invertible import InvertibleResNet
from defense.offline.methods.class_gates import ClassGatesObjective
from defense.offline.methods.consistent import ConsistentObjective
from defense.offline.methods.decoupled import DecoupledObjective
from defense.offline.methods.invertible import InvertibleObjective
from defense.offline.methods.selective import SelectiveObjective
from defense.offline.networks import (
    Architecture,
    CifarResNet,
    ClassGatedResNet,
    DecoupledResNet,
    Network,
)
from defense.offline.training import CrossEntropy, Objective, TrainingSettings


@dataclass(frozen=True)
class Method:
    """The network that a method trains, what it minimises, and the settings that suit it.

    needs_start: it goes on from the weights of a trained plain network, and has its shape.
    architecture: the shape of a fresh network, but for its classes.
    half: its convolutions and linear maps are rounded to half precision, which halves the file.
    """

    network: type[Network]
    objective: Objective
    settings: TrainingSettings
    needs_start: bool = False
    architecture: Architecture = field(default_factory=Architecture)
    half: bool = False


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
    "consistent": Method(
        CifarResNet,
        ConsistentObjective(),
        TrainingSettings(epochs=10, learning_rate=0.2, cutout=0, small_epochs=7),
        needs_start=True,
        half=True,
    ),
    "invertible": Method(
        InvertibleResNet,
        InvertibleObjective(),
        TrainingSettings(epochs=10, learning_rate=0.2, cutout=0, small_epochs=7),
        architecture=Architecture((2, 3, 3), (64, 128, 256), stem=12),
        half=True,
    ),
    "small": Method(
        CifarResNet,
        CrossEntropy(),
        TrainingSettings(epochs=10, small_epochs=7),
        architecture=Architecture((1, 1, 1), (32, 64, 128), stem=16),
        half=True,
    ),
}


def method_named(name: str) -> Method:
    """Return the table's row `name`; ConfigError names the nearest one otherwise."""
    if name not in METHODS:
        raise ConfigError(f"no training method '{name}'{nearest(name, METHODS)}")
    return METHODS[name]
