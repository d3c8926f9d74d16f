"""A guard works on the one backbone that it was fitted for, and says so of every other."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from defense import optimize
from defense.config import ModelSettings
from defense.detectors import Detector
from defense.errors import ArtifactError, CalibrationError, GuardFailure, SiteError
from defense.fingerprint import fingerprint
from defense.guard import Guard, InputSpec
from defense.offline.fit import FitOptions, fit_module
from defense.routers.activation import ActivationRouter
from defense.types import PathLayout, Routed, Site, Verdict
from tests.conftest import Digits
from tests.served import SmallNet, hook_count


@dataclass(frozen=True)
class Constant:
    """A detector that says the same of everything."""

    name: ClassVar[str] = "constant"

    value: Tensor

    def score(self, routed: Routed) -> Tensor:
        return self.value.expand(len(routed))


@dataclass(frozen=True)
class Raising:
    name: ClassVar[str] = "raising"

    def score(self, routed: Routed) -> Tensor:
        raise RuntimeError("no kernel image")


@dataclass(frozen=True)
class OneTooMany:
    name: ClassVar[str] = "one-too-many"

    def score(self, routed: Routed) -> Tensor:
        return torch.zeros(len(routed) + 1)


def judged_by(guard: Guard, detector: Detector) -> Guard:
    return dataclasses.replace(guard, detector=detector)


def test_a_guarded_batch_is_its_logits_its_scores_and_a_verdict_per_row(
    guard: Guard, net: SmallNet, clean: Callable[[int], Tensor]
) -> None:
    batch = torch.cat([clean(3), torch.rand(1, 1, 8, 8)])
    with guard.attach(net) as attached:
        guarded = attached(batch)
    assert torch.equal(guarded.logits, net(batch))
    assert guarded.verdicts == [Verdict.ACCEPT] * 3 + [Verdict.REJECT]
    assert torch.equal(guarded.scored.predicted, guarded.logits.argmax(1))


def test_the_settings_decide_what_is_refused(guard: Guard, net: SmallNet) -> None:
    settings = ModelSettings.model_validate({"mode": "flag"})
    with guard.attach(net, settings) as attached:
        assert attached(torch.rand(1, 1, 8, 8)).verdicts == [Verdict.FLAG]


def test_a_guard_that_is_taken_off_leaves_no_hook(guard: Guard, net: SmallNet) -> None:
    with guard.attach(net):
        assert hook_count(net) > 0
    assert hook_count(net) == 0
    with pytest.raises(KeyError), guard.attach(net):
        raise KeyError
    assert hook_count(net) == 0


def test_a_guard_for_other_weights_is_refused_and_both_fingerprints_are_named(
    guard: Guard, net: SmallNet
) -> None:
    with torch.no_grad():
        net.head.bias[0] += 1e-3
    other = fingerprint(net)
    with pytest.raises(
        ArtifactError,
        match=f"backbone {guard.fingerprint[:16]} and this one is {other[:16]}; fit a",
    ):
        guard.attach(net)
    assert hook_count(net) == 0


def test_a_backbone_in_training_mode_is_refused_and_left_as_it_is() -> None:
    layers = (nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    net = nn.Sequential(*layers).eval()
    guard = fit_module(net, [torch.rand(2000, 4, generator=torch.Generator().manual_seed(0))])
    net.train()
    with pytest.raises(SiteError, match=r"the layer '1' \(BatchNorm1d\) is in training mode"):
        guard.attach(net)
    assert fingerprint(net) == guard.fingerprint
    assert hook_count(net) == 0


def test_a_guard_goes_with_a_copy_of_its_backbone(guard: Guard, net: SmallNet) -> None:
    with guard.attach(copy.deepcopy(net)) as attached:
        assert len(attached(torch.rand(2, 1, 8, 8)).verdicts) == 2


def test_a_rate_that_the_guard_cannot_promise_is_refused_before_a_hook_is_set(
    guard: Guard, net: SmallNet
) -> None:
    settings = ModelSettings.model_validate({"reject": {"target_fpr": 1e-4}})
    with pytest.raises(CalibrationError, match="needs at least 10000 calibration images"):
        guard.attach(net, settings)
    assert hook_count(net) == 0


def test_a_site_that_is_not_reached_is_found_before_the_first_request(
    guard: Guard, net: SmallNet
) -> None:
    sites = (*guard.router.layout.sites, Site("act", 1, 12, 1))
    longer = dataclasses.replace(guard, router=ActivationRouter(PathLayout(sites, ("mean",))))
    with pytest.raises(
        ArtifactError, match="does not fit the backbone it was fitted for: site 'act#1' was not"
    ):
        longer.attach(net)
    assert hook_count(net) == 0


def test_a_detector_for_another_path_is_found_before_the_first_request(
    guard: Guard, net: SmallNet
) -> None:
    layout = PathLayout(guard.router.layout.sites[:1], ("mean",))
    shorter = dataclasses.replace(guard, router=ActivationRouter(layout))
    with pytest.raises(ArtifactError, match="the detector failed: RuntimeError; fit it again"):
        shorter.attach(net)


def test_a_backbone_that_fails_on_the_trial_is_left_without_hooks(
    guard: Guard, net: SmallNet
) -> None:
    colour = dataclasses.replace(guard, inputs=InputSpec((3, 8, 8), "float32"))
    with pytest.raises(RuntimeError, match="channels"):
        colour.attach(net)
    assert hook_count(net) == 0


@pytest.mark.parametrize(
    ("detector", "sentence"),
    [
        (Raising(), "the detector failed: RuntimeError"),
        (Constant(torch.tensor(torch.nan)), "gave a score that is no finite number"),
        (Constant(torch.tensor(torch.inf)), "gave a score that is no finite number"),
        (OneTooMany(), r"gave scores of shape \(4,\) for 3 requests"),
    ],
)
def test_a_detector_that_fails_is_a_failure_at_the_stage_score(
    guard: Guard, detector: Detector, sentence: str
) -> None:
    run = Routed(torch.zeros(3, 10), torch.zeros(3, guard.router.layout.length))
    with pytest.raises(GuardFailure, match=sentence) as caught:
        judged_by(guard, detector).score(run)
    assert caught.value.stage == "score"


def test_scores_come_out_on_the_cpu_in_double_precision(guard: Guard, digits: Digits) -> None:
    run = Routed(torch.zeros(2, 10), torch.zeros(2, guard.router.layout.length))
    scored = judged_by(guard, Constant(torch.tensor(1.0, dtype=torch.float16))).score(run)
    assert scored.score.dtype == scored.p_value.dtype == torch.float64


def test_scoring_keeps_no_graph(guard: Guard) -> None:
    run = Routed(torch.zeros(2, 10), torch.zeros(2, guard.router.layout.length, requires_grad=True))
    assert not guard.score(run).score.requires_grad


def test_a_guard_observes_a_backbone_that_is_being_differentiated(
    guard: Guard, net: SmallNet
) -> None:
    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    with guard.attach(net) as attached, attached.backbone.record() as recording:
        net(x).sum().backward()
        attached.score(recording)
    assert x.grad is not None


def test_optimising_keeps_the_class_and_the_logits_within_a_tolerance_until_it_is_taken_off(
    guard: Guard, net: SmallNet, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimize, "GAIN", 0)  # a small network gains nothing
    batch = digits.images[:20]
    with torch.no_grad():
        expected = net(batch)
        with guard.attach(net, ModelSettings.model_validate({"optimize": True})) as attached:
            guarded = attached(batch)
            assert attached.shortcut is not None
        strayed = (guarded.logits - expected).abs().amax(1) / expected.std(1)
        assert float(strayed.max()) < 0.1
        assert torch.equal(guarded.logits.argmax(1), expected.argmax(1))
        assert torch.equal(net(batch), expected)
    assert fingerprint(net) == guard.fingerprint


@pytest.mark.parametrize(
    ("shape", "accepted"),
    [
        ((2, 3, 8, 8), True),
        ((2, 3, 9, 8), True),
        ((2, 1, 8, 8), False),
        ((2, 3, 8), False),
        ((2,), False),
    ],
)
def test_an_input_spec_accepts_rows_of_its_shape(shape: tuple[int, ...], accepted: bool) -> None:
    assert InputSpec((3, -1, 8), "float32").accepts(torch.zeros(shape)) is accepted


def test_an_input_spec_makes_an_example_of_its_shape_and_type() -> None:
    example = InputSpec((3, -1), "int64").example(2)
    assert (example.shape, example.dtype) == ((2, 3, 32), torch.int64)


@pytest.mark.parametrize("dtype", ["float33", "nn", "save", ""])
def test_an_input_spec_refuses_what_is_no_type(dtype: str) -> None:
    with pytest.raises(
        ArtifactError, match=f"names the unknown input type '{dtype}'; fit it again"
    ):
        InputSpec((1,), dtype)


def test_a_module_with_buffers_alone_can_be_guarded() -> None:
    """The device is read from the state dict, not from parameters."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Buffer(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.act(x @ self.w)
            return hidden * 2

    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    guard = fit_module(Frozen(), [x], options=FitOptions())
    settings = ModelSettings.model_validate({"reject": {"target_fpr": 0.01}})
    with guard.attach(Frozen(), settings) as attached:
        assert len(attached(x[:5]).verdicts) == 5
