"""Ways to train a backbone. One file per published method, one row in the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from defense.errors import ConfigError, nearest
from defense.offline.networks import Architecture, CifarResNet
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
}


def method_named(name: str) -> Method:
    """Return the table's row `name`; ConfigError names the nearest one otherwise."""
    if name not in METHODS:
        raise ConfigError(f"no training method '{name}'{nearest(name, METHODS)}")
    return METHODS[name]
