"""What every router promises, run over every row of the name table: a new row is tested by itself."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from defense.errors import ConfigError, SiteError
from defense.offline.collect import route
from defense.offline.fit import FitOptions, fit_router, make_recipe
from defense.routers import ROUTERS, ForwardRouter, Router, router_named, serves
from defense.state import join, split, to_device
from tests.decoupled_net import decoupled_net
from tests.effective_nets import decided_net
from tests.served import hook_count, images_like_noise, seeded_net

pytestmark = pytest.mark.parametrize("name", ROUTERS)
BATCH = images_like_noise(6, 1)


EXAMPLES = images_like_noise(40, 2)
BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "decoupled": decoupled_net,
    "effective_backward": decided_net,
}
"""A network of their own for routers that not every network can have."""


@pytest.fixture
def model(name: str) -> nn.Module:
    return BACKBONES.get(name, seeded_net)()


@pytest.fixture
def router(name: str, model: nn.Module) -> Router:
    return made(name, model)


def made(name: str, model: nn.Module) -> Router:
    return fit_router(model, make_recipe(name), EXAMPLES)


def forward_router(name: str, model: nn.Module) -> ForwardRouter:
    router = made(name, model)
    if not serves(router):
        pytest.skip(f"{name} is for offline studies")
    return router


def path_of(router: Router, model: nn.Module, batch: Tensor) -> Tensor:
    return route(model, router, batch).path


def test_its_name_is_that_of_its_row(name: str, router: Router) -> None:
    assert router.name == name
    assert isinstance(router, router_named(name).fitted)


def test_it_is_a_frozen_dataclass(name: str, router: Router) -> None:
    fields = dataclasses.fields(router_named(name).fitted)  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(router, fields[0].name, None)


def test_a_path_is_finite_single_precision_and_as_long_as_the_layout_says(
    name: str, router: Router, model: nn.Module
) -> None:
    path = path_of(router, model, BATCH)
    assert path.shape == (len(BATCH), router.layout.length)
    assert path.dtype == torch.float32
    assert bool(path.isfinite().all())


def test_different_images_take_different_paths(name: str, router: Router, model: nn.Module) -> None:
    assert len(path_of(router, model, BATCH).unique(dim=0)) == len(BATCH)


def test_the_same_image_takes_the_same_path_every_time(
    name: str, router: Router, model: nn.Module
) -> None:
    assert torch.equal(path_of(router, model, BATCH), path_of(router, model, BATCH))
    assert torch.equal(path_of(made(name, model), model, BATCH), path_of(router, model, BATCH))


def test_a_path_does_not_depend_on_the_batch_nor_on_its_order(
    name: str, router: Router, model: nn.Module
) -> None:
    together = path_of(router, model, BATCH)
    alone = torch.cat([path_of(router, model, row) for row in BATCH.split(1)])
    torch.testing.assert_close(alone, together)
    torch.testing.assert_close(path_of(router, model, BATCH.flip(0)), together.flip(0))


def test_the_logits_are_bit_identical_and_no_hook_stays(
    name: str, router: Router, model: nn.Module
) -> None:
    with torch.inference_mode():
        bare = model(BATCH)
        routed = route(model, router, BATCH)
        outside = model(BATCH)
    assert torch.equal(routed.logits, bare)
    assert torch.equal(outside, bare)
    assert hook_count(model) == 0


def test_the_network_is_left_as_it_was(name: str, model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    wants = [value.requires_grad for value in model.parameters()]
    path_of(made(name, model), model, BATCH)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [value.requires_grad for value in model.parameters()] == wants
    assert all(value.grad is None for value in model.parameters())
    assert not any(module.training for module in model.modules())


def test_reducing_leaves_what_the_layer_returned_alone(name: str, model: nn.Module) -> None:
    router = forward_router(name, model)
    for site in router.layout.sites:
        output = (
            torch.randn(2, site.channels, 3, 3) if site.axis == 1 else torch.randn(2, site.channels)
        )
        before = output.clone()
        router.reduce(output, site)
        assert torch.equal(output, before)


def test_memory_layout_does_not_matter(name: str, router: Router, model: nn.Module) -> None:
    strided = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(path_of(router, strided, BATCH), path_of(router, model, BATCH))


def test_it_serves_or_says_that_it_does_not(name: str) -> None:
    if router_named(name).fitted.one_forward:
        assert FitOptions(router=name).router == name
    else:
        with pytest.raises(ConfigError, match=f"router '{name}' .* cannot serve; .* choose one of"):
            FitOptions(router=name)


def test_it_comes_back_from_json_and_tensors(name: str, router: Router, model: nn.Module) -> None:
    described, tensors = split(router, "router")
    again: Router = join(router_named(name).fitted, json.loads(json.dumps(described)), tensors)
    assert again.layout == router.layout
    assert torch.equal(path_of(again, model, BATCH), path_of(router, model, BATCH))


def test_it_works_on_a_copy_of_the_backbone(name: str, router: Router, model: nn.Module) -> None:
    copied = copy.deepcopy(model)
    assert torch.equal(path_of(router, copied, BATCH), path_of(router, model, BATCH))


def test_it_is_refused_by_a_backbone_without_its_sites(name: str, router: Router) -> None:
    missing = router.layout.sites[0].module
    with pytest.raises(SiteError, match=f"no module '{missing}' in this backbone"):
        route(nn.Sequential(nn.Linear(2, 2)), router, torch.zeros(2, 2))


def test_a_site_that_does_not_exist_is_named(name: str, model: nn.Module) -> None:
    with pytest.raises(SiteError, match="no site 'nowhere' in this backbone"):
        fit_router(model, make_recipe(name), EXAMPLES, sites=["nowhere"])


def test_a_network_with_nothing_to_observe_is_refused(name: str) -> None:
    with pytest.raises(SiteError, match="nothing to observe in Identity"):
        fit_router(nn.Identity(), make_recipe(name), torch.zeros(2, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_path(name: str, router: Router, model: nn.Module) -> None:
    expected = path_of(router, model, BATCH)
    found = path_of(to_device(router, torch.device("cuda")), model.cuda(), BATCH)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_misspelt_name_is_an_error_that_names_the_right_one(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"no router '{name}x'; did you mean '{name}'\?"):
        router_named(f"{name}x")
