"""The generator of masks: its quantiser in closed form, and what a fitted one does to a network."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from defense.backbone import GatedBackbone
from defense.errors import ConfigError, DataError
from defense.offline.collect import route
from defense.offline.pathways import faithfulness
from defense.routers.activation import ActivationRouter
from defense.routers.generative import (
    GenerativeRecipe,
    GenerativeRouter,
    class_overlap,
    quantise,
)
from defense.sites import discover_sites
from defense.types import PathLayout
from tests.conftest import TRAINED_ON, Digits
from tests.served import SmallNet, hook_count, images_like_noise, seeded_net

EDGES = torch.tensor([0.0, 0.5, math.nextafter(0.5, 0), math.nextafter(0.5, 1), 1.0])
RECIPE = GenerativeRecipe()


def fitted(
    net: SmallNet, inputs: Tensor, recipe: GenerativeRecipe = RECIPE, *, seed: int = 0
) -> GenerativeRouter:
    sites = recipe.sites(net, inputs[:2], None)
    return recipe.fit(net, sites, inputs, seed=seed, progress=lambda _: None)


@pytest.fixture(scope="module")
def router(trained: SmallNet, digits: Digits) -> GenerativeRouter:
    return fitted(trained, digits.images[:TRAINED_ON])


@pytest.fixture(scope="module")
def masks(router: GenerativeRouter, trained: SmallNet, digits: Digits) -> Tensor:
    """Masks of images that nothing was fitted to."""
    return route(trained, router, digits.images[TRAINED_ON:]).path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantised_scores_are_zero_or_one(dtype: torch.dtype) -> None:
    drawn = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    scores = torch.cat([drawn, EDGES]).to(dtype)
    expected = (scores > 0.5).to(dtype)
    torch.testing.assert_close(quantise(scores), expected, rtol=0, atol=1e-6)


def test_the_gradient_of_the_quantiser_is_finite_and_opens_what_it_should() -> None:
    scores = torch.cat([torch.linspace(0, 1, 101), EDGES]).requires_grad_()
    (gradient,) = torch.autograd.grad(quantise(scores).sum(), scores)
    assert bool(gradient.isfinite().all())
    assert 0.1 < float(gradient.min()) <= float(gradient.max()) < 10


def test_the_quantiser_is_that_of_the_formula() -> None:
    """The published 1-bit form, term by term, with its gradient where the sharpness is held."""
    score = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    levels = torch.tensor([0.0, 1.0], dtype=torch.float64)
    closeness = (-(score - levels).abs()).exp()
    similarity = closeness * (-((levels - levels[closeness.argmax()]) ** 2) / 2.0**2).exp()
    sharpness = 2.0 / (similarity[0] - similarity[1]).abs().detach()
    shifted = torch.tensor([-1 / math.expm1(2), 1 + 1 / math.expm1(2)], dtype=torch.float64)
    expected = ((sharpness * similarity).softmax(0) * shifted).sum()
    found = quantise(score).sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, score), torch.autograd.grad(expected, score)
    )


def test_masks_are_exactly_zero_or_one(masks: Tensor) -> None:
    assert masks.unique().tolist() == [0, 1]


def test_most_answers_survive_the_closing_of_channels(
    trained: SmallNet, digits: Digits, router: GenerativeRouter, masks: Tensor
) -> None:
    inputs, sites = digits.images[TRAINED_ON:], router.layout.sites
    shuffled = masks[:, torch.randperm(36, generator=torch.Generator().manual_seed(0))]
    assert float(masks.mean()) < 0.8
    kept = faithfulness(trained, sites, inputs, masks).agreement
    assert kept > 0.7
    assert kept > faithfulness(trained, sites, inputs, shuffled).agreement + 0.2


def test_images_differ_in_how_much_they_close(masks: Tensor) -> None:
    assert float(masks.mean(1).var()) > 1e-3


def test_images_of_one_class_share_more_of_their_masks_than_others(
    masks: Tensor, digits: Digits
) -> None:
    labels = digits.labels[TRAINED_ON:]
    everyone = class_overlap(masks, torch.zeros_like(labels))
    assert float(class_overlap(masks, labels)) > float(everyone) + 0.05


def test_a_heavier_price_closes_more_channels(
    trained: SmallNet, digits: Digits, masks: Tensor
) -> None:
    free = fitted(trained, digits.images[:TRAINED_ON], GenerativeRecipe(beta=0.0))
    path = route(trained, free, digits.images[TRAINED_ON:]).path
    assert float(path.mean()) > float(masks.mean()) + 0.1


def test_the_seed_decides_the_router() -> None:
    net, inputs = seeded_net(), images_like_noise(40, 1)
    first, again, other = (fitted(net, inputs, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.generator.modulate[0].weight, again.generator.modulate[0].weight)
    assert not torch.equal(first.generator.modulate[0].weight, other.generator.modulate[0].weight)


def test_fitting_neither_uses_nor_moves_the_global_random_state() -> None:
    before = torch.random.get_rng_state()
    fitted(seeded_net(), images_like_noise(5, 1), GenerativeRecipe(epochs=1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_fitted_wants_no_gradient(router: GenerativeRouter, trained: SmallNet) -> None:
    scores, code = router.generate(torch.rand(2, router.layout.length))
    assert not scores.requires_grad
    assert not code.requires_grad
    assert hook_count(trained) == 0


def test_pooled_channels_are_means_over_positions(
    router: GenerativeRouter, trained: SmallNet, digits: Digits
) -> None:
    sites = discover_sites(trained, digits.images[:2])
    with GatedBackbone(trained, ActivationRouter(PathLayout(sites, ("mean",)))) as gated:
        expected = gated.run(digits.images[:50]).path
    with GatedBackbone(trained, router) as gated:
        path = gated.run(digits.images[:50]).path
    assert torch.equal(path, router.finish(expected, torch.empty(0)))


def test_progress_rises_to_the_end() -> None:
    told: list[float] = []
    recipe, net, inputs = GenerativeRecipe(epochs=2, batch=3), seeded_net(), images_like_noise(7, 1)
    recipe.fit(net, recipe.sites(net, inputs, None), inputs, seed=0, progress=told.append)
    assert told == [pytest.approx((step + 1) / 6) for step in range(6)]


def test_a_single_image_and_a_dead_channel_are_enough_to_fit() -> None:
    router = fitted(seeded_net(), torch.zeros(1, 1, 8, 8))
    path = route(seeded_net(), router, 1e6 * images_like_noise(3, 1)).path
    assert set(path.unique().tolist()) <= {0, 1}


def test_overlap_is_that_of_pairs_of_one_class() -> None:
    masks = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]])
    assert float(class_overlap(masks, torch.tensor([0, 0, 1]))) == pytest.approx(1 / 3)
    assert float(class_overlap(masks, torch.tensor([0, 1, 2]))) == 0


@pytest.mark.parametrize("name", ["epochs", "batch", "learning_rate", "hidden"])
def test_a_hyper_parameter_that_must_be_positive_is_refused_at_zero(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be above 0, got 0"):
        GenerativeRecipe(**{name: 0})


@pytest.mark.parametrize("name", ["alpha", "beta", "delta"])
def test_a_negative_weight_of_the_loss_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be at least 0, got -1"):
        GenerativeRecipe(**{name: -1.0})  # type: ignore[arg-type]


def test_no_inputs_are_refused() -> None:
    net = seeded_net()
    sites = discover_sites(net, images_like_noise(2, 1))
    with pytest.raises(DataError, match="'generative' has no inputs to learn from"):
        RECIPE.fit(net, sites, images_like_noise(0, 1), seed=0, progress=lambda _: None)
