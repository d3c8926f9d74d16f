"""What several test modules share: a trained network, a guard for it, and fresh metrics."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, settings
from prometheus_client import CollectorRegistry
from sklearn.datasets import load_digits
from torch import Tensor, nn

from defense.guard import Guard
from defense.metrics import ModelMetrics, make_instruments
from defense.offline.fit import FitOptions, fit_module
from tests.served import SmallNet, seeded_net

TRAINED_ON = 400

# Deadlines are timing assertions. Fixtures that examples share are frozen or leave nothing behind.
settings.register_profile(
    "tests", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("deep", settings.get_profile("tests"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "tests"))


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits. images: (1797, 1, 8, 8) in 8-bit steps of [0, 1]; labels: (1797,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Counts:
    """Metrics of one model in a registry of their own, and a way to read them back."""

    registry: CollectorRegistry
    metrics: ModelMetrics

    def value(self, name: str, **labels: str) -> float:
        """Return the value of `pathguard_<name>` for the model `small`."""
        found = self.registry.get_sample_value(f"pathguard_{name}", {"model": "small", **labels})
        assert found is not None, f"no series {name} {labels}"
        return found

    def verdicts(self) -> dict[str, float]:
        """Return the requests counted so far by verdict, zeros left out."""
        kinds = ("accept", "flag", "reject", "error")
        found = {v: self.value("requests_total", version="1.0", verdict=v) for v in kinds}
        return {verdict: count for verdict, count in found.items() if count}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Keep torch from starting threads for tensors as small as ours: they only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> Digits:
    data = load_digits()
    images = (torch.tensor(data.images) * (255 / 16)).floor()[:, None].float() / 255
    return Digits(images, torch.tensor(data.target))


@pytest.fixture(scope="session")
def trained(digits: Digits) -> SmallNet:
    """A network that reads most digits. Shared by all tests: leave nothing attached to it.

    Its features are random and its head is a ridge regression, which takes no training.
    """
    net = seeded_net().requires_grad_(False)
    features = net.features(digits.images[:TRAINED_ON]).double()
    shift, scale = features.mean(0), features.std(0) + 1e-3
    x = (features - shift) / scale
    target = 10 * nn.functional.one_hot(digits.labels[:TRAINED_ON], 10).double()
    gram = x.T @ x + 20 * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, x.T @ target) / scale[:, None]
    net.head.weight.copy_(weight.T)
    net.head.bias.copy_(target.mean(0) - shift @ weight)
    return net


@pytest.fixture
def net(trained: SmallNet) -> SmallNet:
    """A copy of the trained network for one test."""
    return copy.deepcopy(trained)


@pytest.fixture(scope="session")
def guard(trained: SmallNet, digits: Digits) -> Guard:
    """A density guard for the trained network that can promise one false alarm in a thousand."""
    rest = (digits.images[TRAINED_ON:], digits.labels[TRAINED_ON:])
    return fit_module(
        trained, [rest], options=FitOptions(detector="density", calibration_share=0.75)
    )


@pytest.fixture
def counts() -> Counts:
    registry = CollectorRegistry()
    return Counts(registry, ModelMetrics(make_instruments(registry), model="small", version="1.0"))


@pytest.fixture(scope="session")
def clean(trained: SmallNet, guard: Guard, digits: Digits) -> Callable[[int], Tensor]:
    """Return a function that picks n images (n, 1, 8, 8) that the guard finds nothing about."""
    with guard.attach(trained) as attached, torch.inference_mode():
        calm = attached(digits.images).scored.p_value > 0.3

    def pick(count: int) -> Tensor:
        return digits.images[calm][:count]

    return pick
