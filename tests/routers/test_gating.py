"""Sites read and gated, on a network whose one activation runs twice and in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from defense.errors import SiteError
from defense.routers.gating import broadcast, channels_first, gated, observed
from defense.sites import discover_sites
from defense.types import Site
from tests.served import SmallNet, hook_count, images_like_noise, seeded_net

BATCH = images_like_noise(3, 1)


@pytest.fixture
def net() -> SmallNet:
    return seeded_net().requires_grad_(False)


def test_gates_of_one_change_no_bit_and_gates_of_zero_close_a_site(net: SmallNet) -> None:
    sites = discover_sites(net, BATCH)
    ones = [torch.ones(3, site.channels) for site in sites]
    with gated(net, sites, ones):
        assert torch.equal(net(BATCH), net(BATCH))
        opened = net(BATCH)
    assert torch.equal(opened, net(BATCH))
    with gated(net, sites[-1:], [torch.zeros(3, 12)]):
        torch.testing.assert_close(net(BATCH), net.head.bias.expand(3, -1))
    assert hook_count(net) == 0


def test_every_row_has_gates_of_its_own_and_gradients_reach_them(net: SmallNet) -> None:
    sites = discover_sites(net, BATCH)
    gates = [torch.ones(3, site.channels, requires_grad=True) for site in sites]
    with gated(net, sites, gates):
        (gradient, *_) = torch.autograd.grad(net(BATCH)[1].sum(), gates)
    assert gradient[1].abs().sum() > 0
    assert gradient[[0, 2]].abs().sum() == 0


def test_a_gate_per_neuron_and_a_site_left_alone(net: SmallNet) -> None:
    sites = discover_sites(net, BATCH)
    mask = torch.zeros(3, 12, 8, 8)
    mask[:, 2, 4, 4] = 1
    with gated(net, sites, [None] * (len(sites) - 1) + [mask]), observed(net, sites) as seen:
        net(BATCH)
    assert seen[sites[-1]].count_nonzero() <= 3


def test_what_is_observed_survives_what_happens_in_place_later(net: SmallNet) -> None:
    first = Site("block.conv1", 0, 12, 1)
    with observed(net, [first]) as seen:
        net(BATCH)
    torch.testing.assert_close(seen[first], net.block.conv1(net.act(net.stem(BATCH))))


def test_calls_of_a_module_are_counted_anew_in_every_pass(net: SmallNet) -> None:
    second = Site("block.relu", 1, 12, 1)
    with observed(net, [second]) as seen:
        net(BATCH)
        once = seen[second]
        net(BATCH)
    assert torch.equal(once, seen[second])


def test_outputs_line_up_channels_first_wherever_their_axis_lies() -> None:
    maps = torch.randn(2, 5, 4, 3)
    tokens = maps.movedim(1, -1)
    assert torch.equal(channels_first(maps, Site("a", 0, 5, 1)), maps.flatten(2))
    assert torch.equal(channels_first(tokens, Site("a", 0, 5, -1)), maps.flatten(2))
    assert channels_first(torch.randn(2, 5), Site("a", 0, 5, -1)).shape == (2, 5, 1)
    assert broadcast(torch.ones(2, 5), tokens, Site("a", 0, 5, -1)).shape == (2, 1, 1, 5)


def test_a_site_that_does_not_exist_is_named(net: SmallNet) -> None:
    with (
        pytest.raises(SiteError, match=r"no module 'block\.relo' in this backbone; did you mean"),
        gated(net, [Site("block.relo", 0, 12, 1)], [None]),
    ):
        pass
    assert hook_count(net) == 0


def test_a_site_that_returns_several_tensors_cannot_be_gated() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    net = nn.Sequential(Pair())
    with (
        pytest.raises(SiteError, match="the site '0#0' returns a tuple; only a site that returns"),
        gated(net, [Site("0", 0, 4, -1)], [torch.ones(1, 4)]),
    ):
        net(torch.ones(1, 4))
