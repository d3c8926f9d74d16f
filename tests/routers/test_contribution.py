"""Neurons by their contribution, against gradients worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defense.errors import ConfigError, SiteError
from defense.routers.contribution import METHODS, ContributionRecipe, ContributionRouter
from defense.routers.gating import gated, observed
from defense.sites import discover_sites
from defense.types import PathLayout, Site
from tests.served import SmallNet, images_like_noise, seeded_net

IMAGES = images_like_noise(6, 4)
NEURONS = 3 * 12 * 8 * 8
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)


def fitted(net: nn.Module, inputs: Tensor = IMAGES, **options: Any) -> ContributionRouter:
    recipe = ContributionRecipe(**options)
    sites = recipe.sites(net, inputs, None)
    return recipe.fit(net, sites, inputs, seed=0, progress=lambda _: None)


def flat(masks: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([mask.flatten(1) for mask in masks], dim=1)


def outputs_of(net: nn.Module, router: ContributionRouter, inputs: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad(), observed(net, router.layout.sites) as seen:
        net(inputs)
    return tuple(seen[site] for site in router.layout.sites)


@pytest.fixture
def net() -> SmallNet:
    return seeded_net()


@EVERY_METHOD
def test_the_whole_network_as_path_answers_as_the_network(net: SmallNet, method: str) -> None:
    router = fitted(net, keep=1.0, method=method)
    masks = router.pathway(net, IMAGES)
    assert all(bool(mask.all()) for mask in masks)
    with gated(net, router.layout.sites, masks):
        assert torch.equal(net(IMAGES), net(IMAGES))
        masked = net(IMAGES)
    assert torch.equal(masked, net(IMAGES))
    assert (router.route(net, IMAGES).path == 1).all()


@EVERY_METHOD
@pytest.mark.parametrize("keep", [0.02, 0.15, 0.3])
def test_every_image_keeps_its_share_of_all_neurons(
    net: SmallNet, method: str, keep: float
) -> None:
    masks = fitted(net, keep=keep, method=method, steps=2).pathway(net, IMAGES)
    assert (flat(masks).sum(1) == round(keep * NEURONS)).all()
    shares = torch.stack([mask.flatten(1).float().mean(1) for mask in masks], dim=1)
    assert (shares.amax(1) - shares.amin(1) > 0.005).all(), "the share is a joint one"


def test_the_path_is_the_share_of_each_channel(net: SmallNet) -> None:
    router = fitted(net)
    assert router.layout.statistics == ("share",)
    masks = router.pathway(net, IMAGES)
    expected = torch.cat([mask.sum((2, 3)) / 64 for mask in masks], dim=1)
    assert torch.equal(router.route(net, IMAGES).path, expected)


@EVERY_METHOD
def test_the_dead_are_kept_only_when_all_the_living_are(net: SmallNet, method: str) -> None:
    living = flat(tuple(o > 0 for o in outputs_of(net, fitted(net), IMAGES)))
    kept = flat(fitted(net, method=method, steps=2).pathway(net, IMAGES))
    assert not (kept & ~living).any()
    kept = flat(fitted(net, method=method, steps=2, keep=0.99).pathway(net, IMAGES))
    assert kept[living].all()
    assert (kept & ~living).any()


def test_negative_outputs_of_an_unrectified_site_are_dead() -> None:
    first = nn.Linear(2, 4)
    with torch.no_grad():
        first.weight.zero_()
        first.bias.copy_(torch.tensor([-9.0, 1, -9, 2]))
    net = nn.Sequential(first, nn.Linear(4, 2)).eval()
    inputs = torch.rand(3, 2)
    (mask,) = fitted(net, inputs, keep=0.5).pathway(net, inputs)
    assert mask.tolist() == [[False, True, False, True]] * 3


def test_scores_are_activations_times_gradients(net: SmallNet) -> None:
    router = fitted(net, keep=0.1)
    last = Site("block.relu", 1, 12, 1)
    assert router.layout.sites[-1].channels == 12
    only = ContributionRouter(PathLayout((last,), ("share",)), router.recipe)
    (features,) = outputs_of(net, only, IMAGES)
    features.requires_grad_()
    logits = net.head(net.pool(features).flatten(1))
    (slope,) = torch.autograd.grad(logits.amax(1).sum(), features)
    scores = (features * slope).abs().flatten(1)
    expected = torch.zeros_like(scores).scatter_(1, scores.topk(round(0.1 * 768)).indices, 1)
    (mask,) = only.pathway(net, IMAGES)
    assert torch.equal(mask.flatten(1), expected.bool())


@EVERY_METHOD
def test_neurons_of_a_batch_are_those_of_each_image_alone(net: SmallNet, method: str) -> None:
    router = fitted(net, method=method, steps=3)
    alone = torch.cat([flat(router.pathway(net, image)) for image in IMAGES.split(1)])
    assert torch.equal(flat(router.pathway(net, IMAGES)), alone)


def test_equal_scores_do_not_depend_on_the_batch() -> None:
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 2)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1)
    inputs = torch.ones(5, 1)
    (mask,) = fitted(net, inputs, keep=0.25).pathway(net, inputs)
    assert mask[:, :10].all()
    assert not mask[:, 10:].any()


def test_both_methods_agree_where_the_network_is_linear_in_its_site(net: SmallNet) -> None:
    last = discover_sites(net, IMAGES)[-1]
    layout = PathLayout((last,), ("share",))
    simple, integrated = (
        ContributionRouter(layout, ContributionRecipe(method=method)) for method in METHODS
    )
    assert torch.equal(flat(simple.pathway(net, IMAGES)), flat(integrated.pathway(net, IMAGES)))


def test_the_methods_differ_where_the_network_bends(net: SmallNet) -> None:
    simple, integrated = (flat(fitted(net, method=m).pathway(net, IMAGES)) for m in METHODS)
    assert not torch.equal(simple, integrated)


class Bent(nn.Module):
    """A classifier whose answer is a polynomial of its one site (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        a = self.site(x)
        return torch.stack([a[:, 0] ** 2 + 2 * a[:, 1], a[:, 0] * 0], dim=1)


def test_the_integral_takes_scales_up_to_one_and_no_further() -> None:
    # a * dz/da is 2 * 1.2^2 = 2.88 at the activations themselves; over scales 1/10 ... 10/10 the
    # mean is 0.55 of that, 1.58; over the released 0, .1, .3, .6, ... 5.5 it would be above 5.
    inputs = torch.tensor([[1.2, 1.2]])  # the second neuron scores 2.4 either way
    first = {m: fitted(Bent(), inputs, method=m, keep=0.5) for m in METHODS}
    masks = {m: router.pathway(Bent(), inputs)[0].tolist() for m, router in first.items()}
    assert masks == {"mct": [[True, False]], "integrated": [[False, True]]}


def test_the_gradient_of_a_path_is_that_of_its_own_network(net: SmallNet) -> None:
    router = fitted(net, keep=0.2)
    masks = router.pathway(net, IMAGES)
    found = router.pathway_gradient(net, IMAGES)
    inputs = IMAGES.clone().requires_grad_()
    stem = net.act(net.stem(inputs)) * masks[0]
    inner = nn.functional.relu(net.block.conv1(stem)) * masks[1]
    block = nn.functional.relu(net.block.conv2(inner) + stem) * masks[2]
    logits = net.head(net.pool(block).flatten(1)).gather(1, net(IMAGES).argmax(1)[:, None])
    (expected,) = torch.autograd.grad(logits.sum(), inputs)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, fitted(net, keep=1.0).pathway_gradient(net, IMAGES))


def test_nothing_is_left_on_inputs_or_network(net: SmallNet) -> None:
    with torch.inference_mode():
        made = IMAGES + 0
        router = fitted(net, method="integrated", steps=1)
        gradient = router.pathway_gradient(net, made)
        shares = router.route(net, made).path
    assert made.grad is None
    assert not gradient.requires_grad
    assert not shares.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())
    assert gradient.shape == IMAGES.shape


def test_a_site_that_nothing_depends_on_scores_nothing() -> None:
    class Unused(Bent):
        def __init__(self) -> None:
            super().__init__()
            self.aside = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x)
            return super().forward(x)

    inputs = torch.ones(2, 2)
    for method in METHODS:
        masks = fitted(Unused(), inputs, method=method, keep=0.5).pathway(Unused(), inputs)
        assert [bool(mask.any()) for mask in masks] == [False, True]


def test_a_site_that_the_backbone_does_not_reach_is_named(net: SmallNet) -> None:
    layout = PathLayout((Site("block.relu", 7, 12, 1),), ("share",))
    router = ContributionRouter(layout, ContributionRecipe())
    with pytest.raises(SiteError, match=r"never reached the site 'block\.relu#7'; fit a router to"):
        router.pathway(net, IMAGES)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"method": "mtc"}, "no method 'mtc' of the router 'contribution'; did you mean 'mct'"),
        ({"keep": 0.0}, "keep .* must lie above 0 and at most at 1, got 0.0; its default is 0.15"),
        ({"keep": 1.5}, "keep .* must lie above 0 and at most at 1, got 1.5"),
        ({"steps": 0}, "steps .* must be at least 1, got 0; its default is 10"),
    ],
)
def test_what_selects_no_neuron_is_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ContributionRecipe(**wrong)
