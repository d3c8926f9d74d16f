"""The overlap detector: class paths, the shares that lie in them, and which side is suspicious."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from defense.detectors.overlap import OverlapRecipe, OverlapView, fit_overlap_view
from defense.errors import DataError
from defense.types import FitData, PathLayout, Routed, Site
from tests.synthetic import LAYOUT, clean_runs, fit_data, shifted_runs

SMALL = PathLayout((Site("a", 0, 4, 1), Site("b", 0, 3, 1), Site("c", 0, 4, 1)), ("share",))


def binary_runs(count: int = 40, seed: int = 0) -> Routed:
    """Return runs of three classes with paths of zeros and ones, none of them empty."""
    draw = torch.Generator().manual_seed(seed)
    path = (torch.rand(count, SMALL.length, generator=draw) < 0.4).float()
    path[:, [0, 4, 7]] = 1.0
    return Routed(torch.rand(count, 3, generator=draw), path)


def view_of(run: Routed, images: int = 50) -> OverlapView:
    return fit_overlap_view(FitData(run, run.predicted), SMALL, images_per_class=images)


def test_overlap_of_zeros_and_ones_is_the_published_ratio_of_sets() -> None:
    view, run = view_of(binary_runs()), binary_runs(6, seed=1)
    ranked = run.logits.argsort(dim=1, descending=True)
    for row, features in enumerate(view.features(run).view(6, 2, 3)):
        for rank in range(2):
            for site, columns in enumerate(SMALL.columns):
                own = set(run.path[row, columns].nonzero().flatten().tolist())
                known = set(view.paths[ranked[row, rank], columns].nonzero().flatten().tolist())
                assert float(features[rank, site]) == pytest.approx(len(own & known) / len(own))


def test_a_run_that_a_class_path_was_made_of_lies_inside_it() -> None:
    run = binary_runs()
    features = view_of(run).features(run)
    torch.testing.assert_close(features[:, :3], torch.ones(40, 3))
    assert bool((view_of(run, images=2).features(run)[:, :3] < 0.99).any())


def test_real_columns_that_a_class_path_was_made_of_lie_inside_it_too() -> None:
    clean, _ = clean_runs(60, seed=1)
    view = fit_overlap_view(FitData(clean, clean.predicted), LAYOUT, images_per_class=60)
    torch.testing.assert_close(view.features(clean)[:, :3], torch.ones(60, 3))
    features = view.features(clean_runs(300, seed=2)[0])
    assert bool(((features >= 0) & (features <= 1 + 1e-5)).all())


def test_a_class_path_is_the_maximum_of_its_right_runs_and_of_no_more_than_asked() -> None:
    run = Routed(
        torch.eye(2)[torch.tensor([0, 0, 0, 1])],
        torch.tensor([[1.0, -2, 0], [0, -1, 3], [9, 9, 9], [4, 4, 4]]),
    )
    layout = PathLayout((Site("a", 0, 3, 1),), ("mean",))
    labels = torch.tensor([0, 0, 1, 1])
    view = fit_overlap_view(FitData(run, labels), layout, images_per_class=2)
    assert view.paths.tolist() == [[1, 0, 3], [4, 4, 4]]
    view = fit_overlap_view(FitData(run, labels), layout, images_per_class=1)
    assert view.paths.tolist() == [[1, 0, 0], [4, 4, 4]]


def test_a_class_without_a_right_run_has_the_mean_of_the_others() -> None:
    run = binary_runs()
    kept = run.take(run.predicted != 1)
    paths = view_of(kept).paths
    assert torch.equal(paths[1], (paths[0] + paths[2]) / 2)


def test_an_empty_path_contradicts_nothing() -> None:
    run = binary_runs()
    empty = Routed(run.logits, run.path.clone())
    empty.path[:, SMALL.columns[1]] = -1.0
    features = view_of(run).features(empty)
    assert torch.equal(features[:, [1, 4]], torch.ones(40, 2))


def test_many_rows_are_scored_as_few_are() -> None:
    run, view = binary_runs(600), view_of(binary_runs())
    parts = [view.features(run.take(rows)) for rows in torch.arange(600).split(50)]
    torch.testing.assert_close(view.features(run), torch.cat(parts))


def moved(path: Tensor, to: Tensor) -> Tensor:
    """Return the first site of `path` set to `to`."""
    return torch.cat([to.expand(len(path), -1), path[:, to.shape[0] :]], dim=1)


def test_only_less_of_its_own_class_and_more_of_the_next_is_suspicious() -> None:
    detector = OverlapRecipe().fit(fit_data(), LAYOUT, seed=0)
    paths = detector.view.paths
    logits = torch.tensor([[9.0, 4.0, 0.0, 0.0]])
    first, next_, mean = paths[:1], paths[1:2], detector.usual.mean[0]

    def features(path: Tensor) -> Tensor:
        return detector.view.features(Routed(logits, path))[0]

    inside, outside = features(first), features(next_)
    assert bool((inside[:3] >= mean[:3]).all())
    assert bool((outside[:3] < mean[:3]).all())
    assert bool((outside[3:] > mean[3:]).all())
    scores = [float(detector.score(Routed(logits, path))) for path in (first, next_)]
    assert scores[0] < scores[1]
    harmless = first * (paths[:1] > paths[1:2])
    assert bool((features(harmless)[3:] <= mean[3:]).any())
    assert float(detector.score(Routed(logits, harmless))) <= scores[1]


def test_a_run_on_the_paths_of_another_class_is_suspicious() -> None:
    detector = OverlapRecipe().fit(fit_data(), LAYOUT, seed=0)
    clean, other = clean_runs(60, seed=4)[0], shifted_runs(60, seed=5)
    assert float(detector.score(other).median()) > float(detector.score(clean).amax())


def test_data_without_a_right_run_is_refused() -> None:
    run = binary_runs()
    with pytest.raises(
        DataError, match="none of the 40 clean runs is classified as its label says"
    ):
        fit_overlap_view(FitData(run, (run.predicted + 1) % 3), SMALL, images_per_class=5)
