"""What every router promises, run over every row of the name table: a new row is tested by itself."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn

from defense.backbone import GatedBackbone
from defense.errors import ConfigError, SiteError
from defense.offline.fit import FitOptions, make_router
from defense.routers import ROUTERS, Router, router_named
from defense.state import join, split, to_device
from defense.types import Site
from tests.served import SmallNet, hook_count, images_like_noise, seeded_net

pytestmark = pytest.mark.parametrize("name", ROUTERS)
BATCH = images_like_noise(6, 1)


@pytest.fixture
def model() -> SmallNet:
    return seeded_net()


@pytest.fixture
def router(name: str, model: SmallNet) -> Router:
    return made(name, model)


def made(name: str, model: nn.Module) -> Router:
    return make_router(model, BATCH[:2], FitOptions(router=name))


def path_of(router: Router, model: nn.Module, batch: Tensor) -> Tensor:
    with torch.inference_mode(), GatedBackbone(model, router) as gated:
        return gated.run(batch).path.clone()


def test_its_name_is_that_of_its_row(name: str, router: Router) -> None:
    assert router.name == name
    assert isinstance(router, router_named(name))


def test_it_is_a_frozen_dataclass(name: str, router: Router) -> None:
    fields = dataclasses.fields(router_named(name))  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(router, fields[0].name, None)


def test_a_path_is_finite_single_precision_and_as_long_as_the_layout_says(
    name: str, router: Router, model: SmallNet
) -> None:
    path = path_of(router, model, BATCH)
    assert path.shape == (len(BATCH), router.layout.length)
    assert path.dtype == torch.float32
    assert bool(path.isfinite().all())


def test_different_images_take_different_paths(name: str, router: Router, model: SmallNet) -> None:
    assert len(path_of(router, model, BATCH).unique(dim=0)) == len(BATCH)


def test_the_same_image_takes_the_same_path_every_time(
    name: str, router: Router, model: SmallNet
) -> None:
    assert torch.equal(path_of(router, model, BATCH), path_of(router, model, BATCH))
    assert torch.equal(path_of(made(name, model), model, BATCH), path_of(router, model, BATCH))


def test_a_path_does_not_depend_on_the_batch_nor_on_its_order(
    name: str, router: Router, model: SmallNet
) -> None:
    together = path_of(router, model, BATCH)
    alone = torch.cat([path_of(router, model, row) for row in BATCH.split(1)])
    torch.testing.assert_close(alone, together)
    torch.testing.assert_close(path_of(router, model, BATCH.flip(0)), together.flip(0))


def test_the_logits_are_bit_identical_and_no_hook_stays(
    name: str, router: Router, model: SmallNet
) -> None:
    with torch.inference_mode():
        bare = model(BATCH)
        with GatedBackbone(model, router) as gated:
            routed = gated.run(BATCH)
            outside = model(BATCH)
    assert torch.equal(routed.logits, bare)
    assert torch.equal(outside, bare)
    assert hook_count(model) == 0


def test_reducing_leaves_what_the_layer_returned_alone(name: str, router: Router) -> None:
    for site in router.layout.sites:
        output = (
            torch.randn(2, site.channels, 3, 3) if site.axis == 1 else torch.randn(2, site.channels)
        )
        before = output.clone()
        router.reduce(output, site)
        assert torch.equal(output, before)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((2, 5), -1),
        ((2, 5, 4), 1),
        ((2, 5, 4, 3), 1),
        ((2, 5, 4, 3, 2), 1),
        ((2, 4, 5), -1),
        ((2, 4, 3, 5), -1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_outputs_of_every_shape_dtype_and_device_are_reduced_where_they_are(
    name: str, router: Router, shape: tuple[int, ...], axis: int, dtype: torch.dtype, device: str
) -> None:
    site = Site("anything", 0, 5, axis)
    moved: Router = to_device(router, torch.device(device))
    reduced = moved.reduce(torch.rand(shape, device=device).to(dtype), site)
    columns = 5 * len(router.layout.statistics)
    assert (reduced.shape, reduced.dtype) == ((2, columns), torch.float32)
    assert reduced.device.type == device


def test_channels_are_the_same_wherever_their_axis_lies(name: str, router: Router) -> None:
    maps = torch.randn(2, 5, 4, 3)
    first = router.reduce(maps, Site("a", 0, 5, 1))
    last = router.reduce(maps.permute(0, 2, 3, 1), Site("a", 0, 5, -1))
    torch.testing.assert_close(first, last)


def test_memory_layout_does_not_matter(name: str, router: Router) -> None:
    maps, site = torch.randn(2, 5, 4, 3), Site("a", 0, 5, 1)
    strided = maps.to(memory_format=torch.channels_last)
    torch.testing.assert_close(router.reduce(maps, site), router.reduce(strided, site))


def test_it_comes_back_from_json_and_tensors(name: str, router: Router, model: SmallNet) -> None:
    described, tensors = split(router, "router")
    again: Router = join(router_named(name), json.loads(json.dumps(described)), tensors)
    assert again.layout == router.layout
    assert torch.equal(path_of(again, model, BATCH), path_of(router, model, BATCH))


def test_it_works_on_a_copy_of_the_backbone(name: str, router: Router, model: SmallNet) -> None:
    copied = copy.deepcopy(model)
    assert torch.equal(path_of(router, copied, BATCH), path_of(router, model, BATCH))


def test_it_is_refused_by_a_backbone_without_its_sites(name: str, router: Router) -> None:
    with pytest.raises(SiteError, match="no module 'act' in this backbone"):
        GatedBackbone(nn.Sequential(nn.Linear(2, 2)), router)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_path(name: str, router: Router, model: SmallNet) -> None:
    expected = path_of(router, model, BATCH)
    found = path_of(to_device(router, torch.device("cuda")), model.cuda(), BATCH.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)


def test_a_misspelt_name_is_an_error_that_names_the_right_one(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"no router '{name}x'; did you mean '{name}'\?"):
        router_named(f"{name}x")
