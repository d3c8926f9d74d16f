"""Published detectors: each finds an obvious attack, nothing in clean images, and judges row by row."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from scipy.ndimage import median_filter  # type: ignore[import-untyped]
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from torch import Tensor, nn

from defense.errors import ConfigError, DataError, SiteError
from defense.offline.benchmark.metrics import auroc
from defense.offline.benchmark.peers import PEERS, Case, Sample, Score, controls, peer_named, routes
from defense.offline.benchmark.peers.features import (
    network_of,
    penultimate,
    pooled_sites,
    with_noise,
)
from defense.offline.benchmark.peers.layers import deep_knn, local_dimension, mahalanobis
from defense.offline.benchmark.peers.outputs import pytorch_ood
from defense.offline.benchmark.peers.squeezing import fewer_bits, median, non_local_means
from defense.offline.collect import route
from defense.offline.fit import fit_router
from defense.offline.pixels import PixelSpace
from defense.routers import Router
from defense.routers.activation import ActivationRecipe
from defense.types import PathLayout, Routed, Site
from tests import synthetic
from tests.coloured import coloured_images

NAMES = sorted(PEERS)
BLIND = {"deep_knn", "shuffled_path", "shuffled_path_forest"}
"""Rows that are asked for something else than to find the attack at hand."""
SCALE = torch.full((3, 1, 1), 4.0)
SPACE = PixelSpace(SCALE, -SCALE / 2, "RGB")
CLASSES = 3


class PooledNet(nn.Module):
    """Two convolutions, an average over positions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.down = nn.MaxPool2d(2)
        self.conv2, self.act2 = nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        maps: Tensor = self.act2(self.conv2(self.down(self.act1(self.conv1(x)))))
        return self.pool(maps).flatten(1)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


@dataclass(frozen=True)
class World:
    """A model of pixels that knows its colours, and what it was shown."""

    model: nn.Module
    network: PooledNet
    router: Router
    clean: Sample
    labels: Tensor
    other: Sample
    attacked: Sample
    unseen: Sample

    def sample(self, pixels: Tensor) -> Sample:
        return Sample(pixels, route(self.network, self.router, SPACE.to_input(pixels)))

    def case(self) -> Case:
        return Case(self.model, self.router.layout, self.clean, self.labels, self.attacked, 0)


@cache
def world() -> World:
    """Return a network of random features and a fitted head, and images; attacked ones stop where
    the answer turns, so that everything about them is unusual.
    """
    images = coloured_images(600)
    pixels, labels = images.pixels.float() / 255, images.labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = PooledNet().eval().requires_grad_(False)
    features = network.features(SPACE.to_input(pixels[:200])).double()
    centre, spread = features.mean(0), features.std(0) + 1e-6
    x = (features - centre) / spread
    target = 6 * nn.functional.one_hot(labels[:200], CLASSES).double()
    weight = torch.linalg.solve(x.T @ x + torch.eye(16, dtype=x.dtype), x.T @ target)
    weight = weight / spread[:, None]
    network.head.weight.copy_(weight.T)
    network.head.bias.copy_(target.mean(0) - centre @ weight)
    model = SPACE.model(network)
    router = fit_router(network, ActivationRecipe(), SPACE.to_input(pixels[:2]))
    empty = Sample(pixels[:0], Routed(torch.zeros(0, CLASSES), torch.zeros(0, 24)))
    bare = World(model, network, router, empty, labels[:200], empty, empty, empty)
    return replace(
        bare,
        clean=bare.sample(pixels[:200]),
        other=bare.sample(pixels[200:400]),
        attacked=bare.sample(_turned(model, pixels[200:300], labels[200:300])),
        unseen=bare.sample(_turned(model, pixels[400:], labels[400:])),
    )


def _turned(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    for _ in range(60):
        leaf = pixels.clone().requires_grad_()
        logits = model(leaf)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
        stays = (logits.argmax(1) == labels)[:, None, None, None]
        pixels = torch.where(stays, (pixels + 2 / 255 * gradient.sign()).clamp(0, 1), pixels)
    return (pixels * 255).round() / 255


def area(negative: Tensor, positive: Tensor) -> float:
    value = auroc(negative, positive)
    assert value is not None
    return value


def counts(name: str) -> tuple[int, int]:
    """Return how many images a row is fitted to and judged on."""
    return (24, 40) if PEERS[name].slow else (200, 200)


def fit(name: str, count: int, seed: int = 0) -> Score:
    w = world()
    rows = torch.arange(count)
    return PEERS[name].fit(
        w.model,
        w.router.layout,
        w.clean.take(rows),
        w.labels[rows],
        w.attacked.take(rows[: min(count, 100)]) if PEERS[name].needs_attacks else None,
        seed=seed,
    )


@cache
def fitted(name: str) -> Score:
    return fit(name, counts(name)[0])


@cache
def scores(name: str, which: str) -> Tensor:
    sample: Sample = getattr(world(), which)
    return fitted(name)(sample.take(torch.arange(counts(name)[1])))


def test_the_attack_of_these_tests_turns_every_answer() -> None:
    w = world()
    assert torch.equal(w.clean.routed.predicted, w.labels)
    assert bool((w.attacked.routed.predicted != coloured_images(600).labels[200:300]).all())


@pytest.mark.parametrize("name", NAMES)
def test_every_row_says_in_one_line_what_it_is(name: str) -> None:
    about = PEERS[name].about
    assert 20 < len(about) < 120
    assert "\n" not in about
    assert (PEERS[name].kind == "control") == about.startswith("Control")


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_one_finite_number_per_image(name: str) -> None:
    found = scores(name, "unseen")
    assert found.shape == (counts(name)[1],)
    assert found.dtype == torch.float64
    assert bool(found.isfinite().all())
    assert fitted(name)(world().unseen.take(torch.arange(0))).shape == (0,)


@pytest.mark.parametrize("name", sorted(set(NAMES) - BLIND))
def test_an_obvious_attack_is_found(name: str) -> None:
    assert area(scores(name, "other"), scores(name, "unseen")) > 0.8


@pytest.mark.parametrize("name", NAMES)
def test_clean_images_that_the_fit_has_not_seen_look_alike(name: str) -> None:
    found = scores(name, "other")
    assert abs(area(*found.chunk(2)) - 0.5) < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_an_image_has_the_same_score_alone_as_in_a_batch(name: str) -> None:
    together = scores(name, "unseen")[:2]
    alone = [fitted(name)(world().unseen.take(torch.tensor([row]))) for row in range(2)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_scores(name: str) -> None:
    few = world().unseen.take(torch.arange(4))
    count = 8 if PEERS[name].slow else 60
    assert torch.equal(fit(name, count, seed=1)(few), fit(name, count, seed=1)(few))


@pytest.mark.parametrize("name", [name for name in NAMES if PEERS[name].needs_attacks])
@pytest.mark.parametrize("empty", [True, False])
def test_a_row_that_is_fitted_with_attacks_asks_for_them(name: str, empty: bool) -> None:
    w = world()
    none = w.attacked.take(torch.arange(0)) if empty else None
    with pytest.raises(DataError, match="fitted with attacks and there are none"):
        PEERS[name].fit(w.model, w.router.layout, w.clean, w.labels, none, seed=0)


def test_a_row_that_needs_no_attacks_is_not_shown_any() -> None:
    w, peer = world(), PEERS["mahalanobis_sum"]
    found = [
        peer.fit(w.model, w.router.layout, w.clean, w.labels, attacked, seed=0)(w.other)
        for attacked in (None, w.attacked)
    ]
    assert torch.equal(*found)


def test_data_that_does_not_fit_together_is_refused() -> None:
    w, peer = world(), PEERS["energy"]
    with pytest.raises(DataError, match="200 clean images with 199 labels"):
        peer.fit(w.model, w.router.layout, w.clean, w.labels[1:], None, seed=0)
    with pytest.raises(DataError, match="24 columns and the layout has 20"):
        peer.fit(w.model, synthetic.LAYOUT, w.clean, w.labels, None, seed=0)


def test_paths_without_means_are_refused() -> None:
    layout = PathLayout((Site("a", 0, 2, 1),), ("max",))
    with pytest.raises(DataError, match=r"hold max of every channel .* 'activation' router"):
        pooled_sites(layout, Routed(torch.zeros(1, 3), torch.zeros(1, 2)))


def test_the_last_features_are_the_means_of_the_last_site() -> None:
    layout = PathLayout((Site("a", 0, 2, 1), Site("b", 0, 3, 1)), ("max", "mean"))
    routed = Routed(torch.zeros(1, 3), torch.arange(10.0)[None])
    assert penultimate(layout, routed).tolist() == [[7.0, 8.0, 9.0]]


def test_an_unknown_peer_is_answered_with_the_nearest_one() -> None:
    assert peer_named("lid") is PEERS["lid"]
    with pytest.raises(ConfigError, match=r"no peer 'mahalanobi'; did you mean 'mahalanobis'\?"):
        peer_named("mahalanobi")


def test_without_pytorch_ood_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_ood.detector", None)
    with pytest.raises(ConfigError, match=r"pip install 'pathguard\[report\]'"):
        pytorch_ood()


@pytest.mark.parametrize("name", ["vim", "react"])
def test_a_head_that_reads_something_else_is_refused(name: str) -> None:
    w = world()
    with pytest.raises(SiteError, match="no linear layer of Identity turns the 16 pooled channels"):
        PEERS[name].fit(nn.Identity(), w.router.layout, w.clean, w.labels, None, seed=0)


def test_the_network_behind_the_pixels_is_found_by_its_sites() -> None:
    w = world()
    behind = network_of(w.case())
    assert behind.network is w.network
    torch.testing.assert_close(
        behind.inputs(w.clean.pixels[:3]), SPACE.to_input(w.clean.pixels[:3])
    )
    assert network_of(replace(w.case(), model=w.network)).network is w.network
    with pytest.raises(SiteError, match="neither Identity nor a direct part of it has the module"):
        network_of(replace(w.case(), model=nn.Identity()))


def test_noise_that_stands_among_the_harmless_images_is_read_at_the_same_sites() -> None:
    w = world()
    found = with_noise(w.case())
    assert torch.equal(found.path[:200], w.clean.routed.path)
    moved = (found.path[200:] - w.clean.routed.path).abs().amax(1)
    assert found.path.shape == (400, 24)
    assert 0 < float(moved.min()) <= float(moved.max()) < 1


def test_mahalanobis_ranks_as_the_published_distance_does() -> None:
    clean, labels = synthetic.clean_runs(600, seed=1)
    other, _ = synthetic.clean_runs(200, seed=2)
    case = Case(nn.Identity(), synthetic.LAYOUT, Sample(clean.path, clean), labels, None, 0)
    published = pytorch_ood().Mahalanobis(None)
    published.fit_features(penultimate(case.layout, clean).float(), labels)
    theirs = published.predict_features(penultimate(case.layout, other).float())
    ours = mahalanobis(case)(Sample(other.path, other))
    assert spearmanr(ours, theirs).statistic > 0.99


def test_layers_that_contradict_each_other_have_few_neighbours_of_one_class() -> None:
    clean, labels = synthetic.clean_runs(400, seed=1)
    other, _ = synthetic.clean_runs(100, seed=2)
    shifted = synthetic.shifted_runs(100, seed=3)
    case = Case(nn.Identity(), synthetic.LAYOUT, Sample(clean.path, clean), labels, None, 0)
    score = deep_knn(case)
    usual, found = (score(Sample(run.path, run)) for run in (other, shifted))
    assert area(usual, found) > 0.9
    # Two of three sites hold one class: all their neighbours are of it, and none of the third's.
    assert float(found.median()) == pytest.approx(1 / 3, abs=0.1)


@pytest.mark.parametrize("dimension", [2, 5])
def test_the_local_dimension_is_that_of_the_surface_that_points_lie_on(dimension: int) -> None:
    draw = torch.Generator().manual_seed(0)
    points = torch.rand(2000, dimension, generator=draw, dtype=torch.float64)
    across = torch.randn(dimension, 12, generator=draw, dtype=torch.float64)
    found = local_dimension(points[:400] @ across, points[400:] @ across)
    assert float(found.median()) == pytest.approx(dimension, rel=0.15)


def test_the_local_dimension_of_points_that_coincide_is_a_number() -> None:
    found = local_dimension(torch.zeros(2, 3), torch.zeros(30, 3))
    assert found.tolist() == pytest.approx([1000, 1000])


def test_too_few_images_for_neighbours_are_refused() -> None:
    with pytest.raises(DataError, match="20 clean images are left to look for 20 neighbours"):
        fit("lid", 30)


def test_squeezed_bits_leave_32_levels() -> None:
    levels = fewer_bits(torch.arange(256.0) / 255)
    assert len(levels.unique()) == 32
    assert float((levels - torch.arange(256.0) / 255).abs().max()) <= 0.5 / 31 + 1e-6


def test_the_median_is_that_of_the_published_filter() -> None:
    pixels = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    theirs = median_filter(pixels.numpy(), size=(1, 1, 2, 2), mode="reflect")
    assert torch.equal(median(pixels), torch.from_numpy(theirs))


def test_non_local_means_calm_small_noise_and_keep_edges() -> None:
    edge = torch.zeros(1, 3, 12, 12)
    edge[..., 6:] = 0.5
    torch.testing.assert_close(non_local_means(edge), edge)
    noisy = edge + torch.randn(edge.shape, generator=torch.Generator().manual_seed(0)) / 255
    left = (non_local_means(noisy) - edge).square().mean()
    assert float(left) < 0.3 * float((noisy - edge).square().mean())


def test_a_shuffled_path_holds_the_same_numbers_wherever_it_stands() -> None:
    w = world()
    found = controls.shuffled_path(w.case(), w.clean)
    path = w.clean.routed.path.double()
    assert torch.equal(found.sort(1).values, path.sort(1).values)
    assert not torch.equal(found, path)
    assert torch.equal(
        controls.shuffled_path(w.case(), w.clean.take(torch.tensor([5])))[0], found[5]
    )


@pytest.mark.parametrize("name", ["shuffled_path", "shuffled_path_forest"])
def test_a_shuffled_path_cannot_tell_which_channels_spoke(name: str) -> None:
    """Attacked rows hold the numbers of clean ones, in other channels: order is all there is."""
    w, draw = world(), torch.Generator().manual_seed(0)

    def runs(roll: int) -> Sample:
        path = torch.rand(300, 24, generator=draw) + torch.arange(24)
        return Sample(torch.zeros(300, 3, 1, 1), Routed(torch.zeros(300, 3), path.roll(roll, 1)))

    def found(row: str) -> float:
        labels = torch.zeros(300, dtype=torch.long)
        score = PEERS[row].fit(w.model, w.router.layout, runs(0), labels, runs(3), seed=0)
        return area(score(runs(0)), score(runs(3)))

    assert found(name.replace("shuffled_path", "pooled_activations")) > 0.99
    assert found(name) == pytest.approx(0.5, abs=0.1)


def test_a_slow_row_is_fitted_to_a_few_images_drawn_by_the_seed() -> None:
    few = routes.few(world().clean, 7, seed=3)
    assert len(few) == 7
    assert torch.equal(few.pixels, routes.few(world().clean, 7, seed=3).pixels)
    assert not torch.equal(few.pixels, routes.few(world().clean, 7, seed=4).pixels)
