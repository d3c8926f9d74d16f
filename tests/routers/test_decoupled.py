"""Paths that a backbone decides by itself, read off its controllers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from defense.errors import SiteError
from defense.offline.collect import route
from defense.offline.fit import FitOptions, fit_module, fit_router
from defense.offline.networks import Architecture, DecoupledResNet
from defense.routers.decoupled import DecoupledRecipe
from defense.types import Site
from tests.decoupled_net import DecoupledNet, decoupled_net
from tests.served import images_like_noise, seeded_net

BATCH = images_like_noise(5, 7)
TINY = Architecture(depths=(1, 2), widths=(8, 12), stem=4, classes=3)


@pytest.fixture
def net() -> DecoupledNet:
    return decoupled_net()


def test_the_path_is_the_masks_of_all_controllers(net: DecoupledNet) -> None:
    router = fit_router(net, DecoupledRecipe(), BATCH)
    masks: list[Tensor] = []
    for control in (net.control1, net.control2):
        control.register_forward_hook(lambda _module, _args, output: masks.append(output))
    path = route(net, router, BATCH).path
    assert router.layout.sites == (Site("control1", 0, 8, -1), Site("control2", 0, 8, -1))
    assert router.layout.statistics == ("mask",)
    assert torch.equal(path, torch.cat(masks, 1))
    assert set(path.unique().tolist()) == {0.0, 1.0}


def test_a_decoupled_residual_network_has_a_site_per_controlled_layer() -> None:
    net = DecoupledResNet(TINY).eval()
    x = torch.rand(3, 3, 8, 8)
    router = fit_router(net, DecoupledRecipe(), x)
    names = [site.module for site in router.layout.sites]
    blocks = ("stages.0.0", "stages.1.0", "stages.1.1")
    assert names == [f"{block}.control{number}" for block in blocks for number in (1, 2)]
    assert router.layout.length == 2 * (8 + 12 + 12)
    with torch.no_grad(), net.recorded() as decisions:
        net(x)
    recorded = torch.cat([decision.mask for decision in decisions], 1)
    assert torch.equal(route(net, router, x).path, recorded)


def test_skipping_closed_channels_leaves_the_path_as_it_is() -> None:
    net = DecoupledResNet(TINY).eval()
    x = torch.rand(1, 3, 8, 8)
    router = fit_router(net, DecoupledRecipe(), x)
    masked = route(net, router, x)
    net.skip_closed = True
    skipped = route(net, router, x)
    assert torch.equal(skipped.path, masked.path)
    torch.testing.assert_close(skipped.logits, masked.logits, rtol=1e-5, atol=1e-5)


def test_names_restrict_the_sites(net: DecoupledNet) -> None:
    sites = DecoupledRecipe().sites(net, BATCH, ["control2"])
    assert [site.module for site in sites] == ["control2"]


def test_a_name_that_emits_no_path_is_refused(net: DecoupledNet) -> None:
    message = r"no site 'conv1' in this backbone emits a path; did you mean 'control1'\?"
    with pytest.raises(SiteError, match=message):
        DecoupledRecipe().sites(net, BATCH, ["control1", "conv1"])


def test_a_backbone_that_emits_no_path_is_told_how_to_get_one() -> None:
    message = r"nothing to observe in SmallNet: .* 'pathguard train --method decoupled', or choose"
    with pytest.raises(SiteError, match=message):
        DecoupledRecipe().sites(seeded_net(), BATCH, None)


def test_a_network_in_training_is_refused_before_it_runs(net: DecoupledNet) -> None:
    unsettled = nn.Sequential(nn.BatchNorm2d(1), net).train()
    with pytest.raises(SiteError, match="is in training mode"):
        DecoupledRecipe().sites(unsettled, BATCH, None)
    assert isinstance(unsettled[0].num_batches_tracked, Tensor)
    assert unsettled[0].num_batches_tracked.item() == 0


def test_a_class_that_nobody_knows_emits_its_path_by_an_attribute_alone() -> None:
    class Foreign(nn.Module):
        emits_path = True

        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(1)[:, :4] > 0.5)[:, :, None, None]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gates = Foreign()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x[:, 0, 0, :4] * self.gates(x).flatten(1)
            return out

    model = Net().eval()
    router = fit_router(model, DecoupledRecipe(), BATCH)
    path = route(model, router, BATCH).path
    assert path.dtype == torch.float32
    assert torch.equal(path, (BATCH.flatten(1)[:, :4] > 0.5).float())


def test_a_guard_is_fitted_to_the_paths(net: DecoupledNet) -> None:
    images = images_like_noise(60, 8)
    guard = fit_module(net, images.split(20), options=FitOptions(router="decoupled"))
    assert guard.router.layout.length == 16
