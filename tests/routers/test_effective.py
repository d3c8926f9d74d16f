"""Forward effective paths: thresholds, and the shares above them."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from defense.errors import ConfigError
from defense.offline.collect import route
from defense.routers.effective import EffectiveRecipe, EffectiveRouter
from defense.routers.effective_backward import effective_neurons
from defense.routers.gating import observed
from defense.types import PathLayout, Site
from tests.effective_nets import decided_net
from tests.served import images_like_noise

MAPS, AGAIN, TOKENS = Site("maps", 0, 2, 1), Site("maps", 1, 2, 1), Site("tokens", 0, 2, -1)


def router(*thresholds: float) -> EffectiveRouter:
    layout = PathLayout((MAPS, AGAIN, TOKENS), ("share",))
    return EffectiveRouter(layout, thresholds, "backward")


def fitted(
    model: nn.Module, inputs: Tensor, recipe: EffectiveRecipe | None = None
) -> EffectiveRouter:
    recipe = recipe or EffectiveRecipe()
    sites = recipe.sites(model, inputs, None)
    return recipe.fit(model, sites, inputs, seed=0, progress=lambda _: None)


def test_thresholds_of_minus_infinity_keep_everything() -> None:
    model, batch = decided_net(), images_like_noise(4, 1)
    sites = EffectiveRecipe().sites(model, batch, None)
    everything = EffectiveRouter(PathLayout(sites, ("share",)), (-math.inf,) * len(sites), "")
    assert torch.equal(route(model, everything, batch).path, torch.ones(4, 36))


def test_thresholds_of_infinity_keep_nothing() -> None:
    assert torch.equal(router(math.inf, 0, 0).reduce(torch.randn(3, 2, 4), MAPS), torch.zeros(3, 2))


def test_a_path_is_the_share_of_positions_above_the_threshold_of_the_site_and_call() -> None:
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [-5.0, 9.0]]]])
    at = router(2.0, 0.0, 3.0)
    assert at.reduce(maps, MAPS).tolist() == [[0.5, 0.25]]
    assert at.reduce(maps, AGAIN).tolist() == [[1.0, 0.25]]
    assert at.reduce(maps.flatten(2).mT, TOKENS).tolist() == [[0.25, 0.25]]
    assert at.reduce(torch.tensor([[4.0, 2.0]]), TOKENS).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_outputs_of_every_dtype_are_reduced(dtype: torch.dtype) -> None:
    for shape, site in (((2, 2, 3, 3), MAPS), ((2, 3, 2), TOKENS), ((2, 2), TOKENS)):
        reduced = router(0, 0, 0).reduce(torch.rand(shape).to(dtype), site)
        assert (reduced.shape, reduced.dtype) == ((2, 2), torch.float32)


def test_a_threshold_is_reached_by_as_many_outputs_as_the_backward_path_keeps() -> None:
    model, image = decided_net(), images_like_noise(1, 1)
    found = fitted(model, image)
    assert found.source == "backward"
    neurons = next(effective_neurons(model, found.layout.sites, image, 0.5))
    counts = [
        (int((output >= threshold).sum()), int(kept.sum()))
        for threshold, (output, kept) in zip(found.thresholds, neurons.values(), strict=True)
    ]
    assert [reached for reached, kept in counts if kept] == [kept for _, kept in counts if kept]
    assert [kept > 0 for _, kept in counts] == [True, False, True]
    # No path goes through the block's first activation: a fifth of its 12 x 64 outputs stands in.
    assert counts[1] == (154, 0)


def test_thresholds_are_averages_over_the_first_images() -> None:
    model, images = decided_net(), images_like_noise(20, 1)
    alone = [torch.tensor(fitted(model, image).thresholds) for image in images[:16].split(1)]
    torch.testing.assert_close(
        torch.tensor(fitted(model, images).thresholds), torch.stack(alone).mean(0)
    )


def test_a_higher_theta_keeps_more_of_every_image() -> None:
    model, images = decided_net(), images_like_noise(4, 1)
    low, high = (
        route(model, fitted(model, images, EffectiveRecipe(theta)), images).path.mean()
        for theta in (0.2, 0.8)
    )
    assert float(low) < float(high)


class Untraceable(nn.Module):
    """Has no graph of its own: what it does depends on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.head = nn.Softplus(), nn.Linear(40, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return cast(Tensor, self.head(x if x.sum() > 0 else -x))


def test_a_network_that_cannot_be_walked_gets_thresholds_that_keep_a_share() -> None:
    model, images = Untraceable().eval(), torch.randn(5, 40)
    told: list[float] = []
    sites = EffectiveRecipe().sites(model, images, None)
    found = EffectiveRecipe(share=0.25).fit(model, sites, images, seed=0, progress=told.append)
    with observed(model, sites) as seen, torch.no_grad():
        model(images)
    tenth = seen[sites[0]].sort(dim=1, descending=True).values[:, 9]
    assert found.source == "quantile"
    assert found.thresholds == pytest.approx((float(tenth.mean()),))
    assert told == [0.2, 0.4, 0.6, 0.8, 1.0]


@pytest.mark.parametrize("name", ["theta", "share"])
def test_hyper_parameters_are_shares(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} of an effective path is 1.5; give one from"):
        EffectiveRecipe(**{name: 1.5})
