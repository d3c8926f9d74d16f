"""What every detector promises, run over every row of the name table: a new row is tested by itself."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor

from defense.artifact import load_guard, save_guard
from defense.calibration import Calibration
from defense.detectors import DETECTORS, Detector, detector_named
from defense.errors import ConfigError, DataError
from defense.guard import Guard, InputSpec
from defense.offline.benchmark.metrics import auroc
from defense.routers.activation import ActivationRouter
from defense.state import to_device
from defense.types import FitData, Routed
from tests.looks import ECHO, NAMES, small_witness
from tests.synthetic import (
    CLASSES,
    LAYOUT,
    clean_looks,
    clean_runs,
    fit_data,
    full_data,
    misled_looks,
    shifted_runs,
)

pytestmark = pytest.mark.parametrize("name", DETECTORS)
CLEAN, SHIFTED = clean_runs(60, seed=50)[0], shifted_runs(60, seed=60)
BOTH = Routed.concat([CLEAN, SHIFTED])
FULL = Routed.concat([clean_looks(30, seed=50)[0], misled_looks(30, seed=60)])
_fitted: dict[str, Detector] = {}
_full: dict[str, Detector] = {}


def fit(name: str, data: FitData | None = None, *, seed: int = 0) -> Detector:
    return DETECTORS[name].recipe().fit(data or fit_data(), LAYOUT, seed=seed)


@pytest.fixture
def detector(name: str) -> Detector:
    """A fitted detector, fitted once: it cannot change."""
    if name not in _fitted:
        _fitted[name] = fit(name)
    return _fitted[name]


@pytest.fixture
def full(name: str) -> Detector:
    """A detector fitted to runs that carry witness and echoes, fitted once."""
    if name not in _full:
        _full[name] = fit(name, full_data())
    return _full[name]


def looks_of(detector: Detector) -> tuple[str, ...]:
    """Return the looks that a detector says it can score; most know the path alone."""
    return getattr(detector, "looks", ("path",))


def test_its_name_is_that_of_its_row(name: str) -> None:
    kind = detector_named(name)
    assert kind.fitted.name == name
    assert isinstance(fit(name), kind.fitted)


def test_it_is_a_frozen_dataclass(name: str, detector: Detector) -> None:
    fields = dataclasses.fields(DETECTORS[name].fitted)  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(detector, fields[0].name, None)


def test_it_gives_one_finite_double_per_row(name: str, detector: Detector) -> None:
    score = detector.score(BOTH)
    assert score.shape == (len(BOTH),)
    assert score.dtype == torch.float64
    assert bool(score.isfinite().all())


def test_larger_is_more_suspicious(name: str, detector: Detector) -> None:
    value = auroc(detector.score(CLEAN), detector.score(SHIFTED))
    assert value is not None
    assert value > 0.9


def test_a_path_far_from_everything_is_more_suspicious_than_clean_ones(
    name: str, detector: Detector
) -> None:
    if DETECTORS[name].attacks == "needed":
        pytest.skip("a detector fitted with attacks promises nothing about what it was not shown")
    draw = torch.Generator().manual_seed(1)
    far = Routed(CLEAN.logits, CLEAN.path + 30 * torch.randn(CLEAN.path.shape, generator=draw))
    value = auroc(detector.score(CLEAN), detector.score(far))
    assert value is not None
    assert value > 0.9


def test_the_same_data_and_seed_give_the_same_scores(name: str, detector: Detector) -> None:
    torch.manual_seed(99)
    assert torch.equal(fit(name).score(BOTH), detector.score(BOTH))


def test_scoring_draws_no_random_number(name: str, detector: Detector) -> None:
    state = torch.get_rng_state()
    first = detector.score(BOTH)
    assert torch.equal(first, detector.score(BOTH))
    assert torch.equal(state, torch.get_rng_state())


def test_fitting_leaves_the_callers_random_state_and_data_alone(name: str) -> None:
    data = fit_data()
    before, state = copy.deepcopy(data), torch.get_rng_state()
    fit(name, data)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(data.clean.path, before.clean.path)
    assert torch.equal(data.labels, before.labels)


def test_a_row_scores_the_same_alone_and_in_any_batch_and_order(
    name: str, detector: Detector
) -> None:
    together = detector.score(BOTH)
    order = torch.randperm(len(BOTH), generator=torch.Generator().manual_seed(3))
    alone = torch.cat([detector.score(BOTH.take(row)) for row in torch.arange(len(BOTH)).split(1)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        detector.score(BOTH.take(order)), together[order], rtol=1e-4, atol=1e-6
    )


def test_at_every_look_a_row_scores_the_same_alone_and_in_any_batch_and_order(
    name: str, full: Detector
) -> None:
    order = torch.randperm(len(FULL), generator=torch.Generator().manual_seed(3))
    for look in looks_of(full):
        run = FULL.at(look)
        together = full.score(run)
        assert bool(together.isfinite().all())
        alone = torch.cat([full.score(run.take(row)) for row in torch.arange(len(run)).split(1)])
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            full.score(run.take(order)), together[order], rtol=1e-4, atol=1e-5
        )


def test_it_knows_the_path_and_does_not_mind_that_the_fit_showed_more(
    name: str, detector: Detector, full: Detector
) -> None:
    assert looks_of(full)[0] == looks_of(detector)[0] == "path"
    torch.testing.assert_close(full.score(BOTH), detector.score(BOTH))


def test_scoring_leaves_its_input_alone(name: str, detector: Detector) -> None:
    run = copy.deepcopy(BOTH)
    detector.score(run)
    assert torch.equal(run.path, BOTH.path)
    assert torch.equal(run.logits, BOTH.logits)


def test_no_rows_have_no_scores(name: str, detector: Detector) -> None:
    assert detector.score(BOTH.take(torch.zeros(len(BOTH), dtype=torch.bool))).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_another_precision_are_scored(
    name: str, detector: Detector, dtype: torch.dtype
) -> None:
    score = detector.score(Routed(BOTH.logits.to(dtype), BOTH.path))
    assert score.dtype == torch.float64
    torch.testing.assert_close(score, detector.score(BOTH), rtol=1e-2, atol=1e-2)


def test_it_works_wholly_on_the_device_of_the_path(name: str, detector: Detector) -> None:
    """The meta device stands for any other: a tensor left on the CPU would not mix with it."""
    meta = torch.device("meta")
    moved: Detector = to_device(detector, meta)
    score = moved.score(Routed(BOTH.logits.to(meta), BOTH.path.to(meta)))
    assert score.device == meta
    assert score.shape == (len(BOTH),)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_scores(name: str, detector: Detector) -> None:
    cuda = torch.device("cuda")
    moved: Detector = to_device(detector, cuda)
    score = moved.score(Routed(BOTH.logits.to(cuda), BOTH.path.to(cuda)))
    torch.testing.assert_close(score.cpu(), detector.score(BOTH), rtol=1e-3, atol=1e-4)


def test_it_comes_back_from_an_artefact(name: str, detector: Detector, tmp_path: Path) -> None:
    guard = Guard(
        fingerprint="0" * 64,
        router=ActivationRouter(LAYOUT),
        detector=detector,
        calibrations={"path": Calibration(detector.score(CLEAN), CLEAN.predicted)},
        class_names=tuple(map(str, range(CLASSES))),
        inputs=InputSpec((1,), "float32"),
        facts={},
    )
    save_guard(guard, tmp_path / "first")
    again = load_guard(tmp_path / "first")
    torch.testing.assert_close(
        again.detector.score(BOTH), detector.score(BOTH), rtol=1e-5, atol=1e-7
    )
    save_guard(again, tmp_path / "second")
    assert torch.equal(
        load_guard(tmp_path / "second").detector.score(BOTH), again.detector.score(BOTH)
    )


def test_every_look_comes_back_from_an_artefact(name: str, full: Detector, tmp_path: Path) -> None:
    looks = looks_of(full)
    guard = Guard(
        fingerprint="0" * 64,
        router=ActivationRouter(LAYOUT),
        detector=full,
        calibrations={
            look: Calibration(full.score(FULL.at(look)), FULL.predicted) for look in looks
        },
        class_names=NAMES,
        inputs=InputSpec((1,), "float32"),
        facts={},
        witness=small_witness(),
        echo=ECHO,
    )
    save_guard(guard, tmp_path)
    again = load_guard(tmp_path)
    assert looks_of(again.detector) == looks
    assert set(again.calibrations) == set(looks)
    for look in looks:
        run = FULL.at(look)
        torch.testing.assert_close(again.detector.score(run), full.score(run), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_witness_and_echoes_of_another_precision_are_scored(
    name: str, full: Detector, dtype: torch.dtype
) -> None:
    assert FULL.witness is not None
    assert FULL.echoes is not None
    rounded = dataclasses.replace(
        FULL, witness=FULL.witness.to(dtype), echoes=FULL.echoes.to(dtype)
    )
    for look in looks_of(full):
        score = full.score(rounded.at(look))
        assert score.dtype == torch.float64
        torch.testing.assert_close(score, full.score(FULL.at(look)), rtol=2e-2, atol=5e-2)


def test_every_look_works_wholly_on_the_device_of_the_path(name: str, full: Detector) -> None:
    meta = torch.device("meta")
    moved: Detector = to_device(full, meta)
    run: Routed = to_device(FULL, meta)
    for look in looks_of(full):
        assert moved.score(run.at(look)).device == meta


def test_a_channel_that_never_varied_does_not_matter(name: str) -> None:
    """Dead channels are the rule in trained networks."""

    def dead(run: Routed) -> Routed:
        path = run.path.clone()
        path[:, [1, 8]] = 0.0
        return Routed(run.logits, path)

    data = fit_data()
    assert data.attacked is not None
    detector = fit(name, FitData(dead(data.clean), data.labels, dead(data.attacked)))
    score = detector.score(dead(BOTH))
    assert bool(score.isfinite().all())
    torch.testing.assert_close(detector.score(dead(BOTH)), score)


def test_a_predicted_class_without_a_single_image_is_scored(name: str) -> None:
    data = fit_data()
    kept = data.labels != 2
    detector = fit(name, FitData(data.clean.take(kept), data.labels[kept], data.attacked))
    unseen = BOTH.take(BOTH.predicted == 2)
    assert len(unseen) > 0
    assert bool(detector.score(unseen).isfinite().all())


def test_fewer_images_than_columns_are_enough_to_fit(name: str) -> None:
    score = fit(name, fit_data(24)).score(BOTH)
    assert bool(score.isfinite().all())


def test_it_scores_under_inference_mode(name: str, detector: Detector) -> None:
    with torch.inference_mode():
        score: Tensor = detector.score(BOTH)
    torch.testing.assert_close(score.clone(), detector.score(BOTH))


def test_it_does_with_attacks_what_its_row_says(name: str) -> None:
    data = fit_data()
    without = FitData(data.clean, data.labels)
    if DETECTORS[name].attacks == "needed":
        with pytest.raises(DataError, match="is fitted with attacks and there are none; name some"):
            fit(name, without)
    else:
        alike = torch.equal(fit(name, without).score(BOTH), fit(name).score(BOTH))
        assert alike == (DETECTORS[name].attacks == "ignored")


def test_its_hyper_parameters_all_have_defaults(name: str) -> None:
    parameters = inspect.signature(DETECTORS[name].recipe).parameters.values()
    assert all(parameter.default is not parameter.empty for parameter in parameters)


def test_a_misspelt_name_is_an_error_that_names_the_right_one(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"no detector '{name}x'; did you mean '{name}'\?"):
        detector_named(f"{name}x")
