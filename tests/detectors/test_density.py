"""The density detector against its own definition, written down site by site."""

from __future__ import annotations

import torch
from torch import Tensor

from defense.detectors.density import (
    DISTANCE_FLOOR,
    IMAGES_PER_DIRECTION,
    DensityRecipe,
    DensityView,
    fit_density_view,
    halves,
)
from defense.detectors.gaussian import fit_standardiser
from defense.types import Routed
from tests.synthetic import LAYOUT, clean_runs, fit_data, shifted_runs


def by_definition(view: DensityView, run: Routed) -> Tensor:
    """Return (N, 2 S) log-distances, one site after the other, in double precision."""
    columns = []
    for site, where in zip(view.sites, LAYOUT.columns, strict=True):
        x = site.standardise(run.path[:, where]).double()
        inside = x @ site.directions.double()
        offset = (
            inside - site.gaussian.mean.double()[run.predicted]
        ) @ site.gaussian.whiten.double().T
        missed = x - inside @ site.directions.double().T
        for distance in (offset.square().mean(1), missed.square().sum(1) / x.shape[1]):
            columns.append((distance + DISTANCE_FLOOR).log())
    return torch.stack(columns, dim=1)


def test_its_features_are_the_log_distances_inside_and_off_the_leading_directions() -> None:
    view = fit_density_view(fit_data(), LAYOUT, rank=3)
    run = Routed.concat([clean_runs(30, seed=7)[0], shifted_runs(30, seed=8)])
    torch.testing.assert_close(
        view.features(run).double(), by_definition(view, run), rtol=1e-3, atol=1e-3
    )


def test_its_score_is_the_mean_square_of_what_exceeds_the_usual() -> None:
    data = fit_data()
    shape, judge = halves(data, 5)
    view = fit_density_view(shape, LAYOUT, rank=32)
    usual = fit_standardiser(view.features(judge.clean))
    run = shifted_runs(20, seed=3)
    expected = usual(view.features(run)).clamp(min=0).double().square().mean(1)
    detector = DensityRecipe().fit(data, LAYOUT, seed=5)
    torch.testing.assert_close(detector.score(run), expected, rtol=1e-5, atol=1e-7)


def test_a_path_in_the_middle_of_its_class_is_not_suspicious_at_all() -> None:
    data = fit_data()
    detector = DensityRecipe().fit(data, LAYOUT, seed=0)
    label = int(data.labels[0])
    centre = data.clean.path[data.labels == label].mean(0, keepdim=True)
    logits = torch.eye(4)[label : label + 1]
    assert float(detector.score(Routed(logits, centre))) < 0.05


def test_the_predicted_class_decides_what_is_usual() -> None:
    detector = DensityRecipe().fit(fit_data(), LAYOUT, seed=0)
    run, _ = clean_runs(40, seed=9)
    confused = Routed(run.logits.roll(1, dims=1), run.path)
    assert bool((detector.score(confused) > detector.score(run)).all())


def test_directions_are_orthonormal_and_never_more_than_the_images_carry() -> None:
    view = fit_density_view(fit_data(4 * IMAGES_PER_DIRECTION), LAYOUT, rank=32)
    for site in view.sites:
        rank = site.directions.shape[1]
        assert rank == 4
        torch.testing.assert_close(
            site.directions.T @ site.directions, torch.eye(rank), rtol=0, atol=1e-5
        )


def test_the_two_halves_share_no_image_and_lose_none() -> None:
    data = fit_data(100)
    first, second = halves(data, 3)
    rows = torch.cat([first.clean.path, second.clean.path])
    assert (len(first.clean), len(second.clean)) == (67, 33)
    assert sorted(rows[:, 0].tolist()) == sorted(data.clean.path[:, 0].tolist())
    assert first.attacked is None
    assert second.attacked is data.attacked
    for half in (first, second):
        positions = [int((data.clean.path == row).all(1).nonzero()) for row in half.clean.path]
        assert torch.equal(half.labels, data.labels[positions])
