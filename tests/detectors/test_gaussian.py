"""Class-conditional Gaussians with a shrunk covariance, against the papers' formulas in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from defense.detectors.gaussian import ClassGaussian, fit_class_gaussian, fit_standardiser


def sample(count: int, width: int, *, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.eye(width) + torch.randn(width, width, generator=draw) / 4
    return torch.randn(count, width, generator=draw) @ mixing


def oracle_approximating(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the covariance of centred rows (n, p), shrunk as in Chen et al. 2010, equation 23.

    scikit-learn leaves out the 2 / p.
    """
    n, p = x.shape
    sample = x.T @ x / n
    squared, trace = np.trace(sample @ sample), np.trace(sample)
    rho = ((1 - 2 / p) * squared + trace**2) / ((n + 1 - 2 / p) * (squared - trace**2 / p))
    shrunk: np.ndarray[Any, Any] = (1 - rho) * sample + rho * trace / p * np.eye(p)
    return shrunk


def test_standardised_columns_have_mean_zero_and_deviation_one() -> None:
    x = sample(200, 5) * 10 + 3
    standardised = fit_standardiser(x)(x)
    torch.testing.assert_close(standardised.mean(0), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(standardised.std(0, correction=0), torch.ones(5))


def test_a_constant_column_stays_at_zero_whatever_comes_later() -> None:
    x = sample(50, 3)
    x[:, 1] = 7.0
    standardise = fit_standardiser(x)
    later = torch.tensor([[0.0, 1e6, 0.0], [0.0, -3.0, 0.0]])
    assert standardise(later)[:, 1].tolist() == [0.0, 0.0]


def test_a_column_constant_up_to_rounding_is_not_blown_up() -> None:
    x = torch.full((50, 1), 1000.0)
    x[::2] += 1e-4
    assert float(fit_standardiser(x)(torch.tensor([[1001.0]]))) == 0.0


def test_distances_are_those_of_mahalanobis_with_the_oracle_approximating_covariance() -> None:
    x = sample(300, 6)
    one_class = torch.zeros(len(x), dtype=torch.long)
    gaussian = fit_class_gaussian(x, one_class, 1)
    offset = (x.double() - x.double().mean(0)).numpy()
    inverse = np.linalg.inv(oracle_approximating(offset))
    expected = np.einsum("ni,ij,nj->n", offset, inverse, offset) / 6
    np.testing.assert_allclose(gaussian.distance(x, one_class).numpy(), expected, rtol=1e-3)


def test_the_whitening_matrix_whitens_what_it_was_fitted_to() -> None:
    x = sample(20_000, 4)
    gaussian = fit_class_gaussian(x, torch.zeros(len(x), dtype=torch.long), 1)
    white = (x - gaussian.mean[0]) @ gaussian.whiten.T
    torch.testing.assert_close(white.T @ white / len(x), torch.eye(4), rtol=0, atol=5e-3)


def test_a_class_mean_is_shrunk_to_the_overall_mean_by_one_image() -> None:
    x = torch.tensor([[0.0], [0.0], [6.0]])
    gaussian = fit_class_gaussian(x, torch.tensor([0, 0, 1]), 3)
    overall = 2.0
    expected = [(0 + 0 + overall) / 3, (6 + overall) / 2, overall]
    torch.testing.assert_close(gaussian.mean.flatten(), torch.tensor(expected))


def test_rows_are_measured_from_their_own_class() -> None:
    gaussian = ClassGaussian(torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.eye(2))
    x = torch.tensor([[10.0, 2.0], [10.0, 2.0]])
    assert gaussian.distance(x, torch.tensor([0, 1])).tolist() == [52.0, 2.0]


def test_data_without_any_variance_still_gives_finite_distances() -> None:
    x = torch.ones(10, 3)
    labels = torch.zeros(10, dtype=torch.long)
    assert bool(fit_class_gaussian(x, labels, 1).distance(x + 1, labels).isfinite().all())


def test_fewer_images_than_dimensions_give_a_usable_covariance() -> None:
    x = sample(5, 40)
    labels = torch.zeros(5, dtype=torch.long)
    distance = fit_class_gaussian(x, labels, 1).distance(
        sample(20, 40, seed=1), labels[:1].expand(20)
    )
    assert bool(distance.isfinite().all())
    assert float(distance.amin()) > 0


def test_one_dimension_is_enough() -> None:
    x = torch.tensor([[1.0], [2.0], [3.0]])
    labels = torch.zeros(3, dtype=torch.long)
    distance = fit_class_gaussian(x, labels, 1).distance(x, labels)
    torch.testing.assert_close(distance, torch.tensor([1.5, 0.0, 1.5]), rtol=1e-4, atol=1e-6)
