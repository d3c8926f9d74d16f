"""Effective paths: the vectorised walk against plain loops, and what the rule promises."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defense.errors import ConfigError, SiteError
from defense.routers import cumulative
from defense.routers.cumulative import cells, smallest_set, windows
from defense.routers.effective_backward import (
    EffectiveBackwardRecipe,
    Walk,
    effective_neurons,
    trace,
)
from defense.sites import discover_sites
from defense.types import Site
from tests.effective_nets import branches, decided_net, positive
from tests.served import images_like_noise


def walked(model: nn.Module, image: Tensor, theta: float = 0.5) -> tuple[dict[str, Tensor], ...]:
    """Return values and masks of one image by node name."""
    graph, _ = trace(model.eval())
    walk = Walk(model, graph, theta)
    masks = walk.back(image)
    return ({n.name: x for n, x in walk.values.items()}, {n.name: x for n, x in masks.items()})


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(model: nn.Module) -> nn.Module:
    """Give every weight a value from a seed."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=index))
    return model


def naive_set(products: list[float], theta: float) -> set[int]:
    """Return the places of the fewest products that reach theta of the total."""
    order = sorted(range(len(products)), key=lambda i: -products[i])
    total, taken, reached = sum(products), set[int](), 0.0
    for place in order:
        taken.add(place)
        reached += products[place]
        if total <= 0 or reached >= theta * total:
            break
    return {place for place in taken if products[place] != 0}


def naive_conv(conv: nn.Conv2d, value: Tensor, output: Tensor, mask: Tensor) -> Tensor:
    """Return the inputs on the path, by a loop over outputs and another over their inputs."""
    kept = torch.zeros_like(value, dtype=torch.bool)
    (kh, kw), (sh, sw) = cast(tuple[int, int], conv.kernel_size), conv.stride
    (ph, pw), (dh, dw) = cast(tuple[int, int], conv.padding), conv.dilation
    width = conv.in_channels // conv.groups
    for out, y, x in mask[0].nonzero().tolist():
        first = out // (conv.out_channels // conv.groups) * width
        places, products = [], []
        for channel in range(width):
            for i in range(kh):
                for j in range(kw):
                    row, column = y * sh - ph + i * dh, x * sw - pw + j * dw
                    if 0 <= row < value.shape[2] and 0 <= column < value.shape[3]:
                        places.append((first + channel, row, column))
                        weighted = conv.weight[out, channel, i, j] * value[0, *places[-1]]
                        products.append(float(weighted.detach()))
        if output[0, out, y, x] < 0:
            products = [-product for product in products]
        for chosen in naive_set(products, 0.5):
            kept[0, *places[chosen]] = True
    return kept


CONVOLUTIONS = [
    nn.Conv2d(2, 3, 3),
    nn.Conv2d(2, 3, 3, padding=1, bias=False),
    nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
    nn.Conv2d(4, 4, (1, 3), padding=(0, 1), groups=4),
]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("chunk", [2**21, 50])
def test_a_convolution_rests_on_what_a_plain_loop_finds(
    conv: nn.Conv2d, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cumulative, "PRODUCTS", chunk)
    image = noise(1, conv.in_channels, 6, 5, seed=9)
    seeded(conv)
    signs = conv(image).detach().flatten().sign()
    head = nn.Linear(len(signs), 2)
    with torch.no_grad():  # outputs of both signs speak for class 1
        head.weight.copy_(torch.outer(torch.tensor([-1.0, 1.0]), signs * noise(len(signs)).abs()))
    model = nn.Sequential(conv, nn.Flatten(), head)
    values, masks = walked(model, image)
    value, mask = values["_0"], masks["_0"]
    assert 4 < int(mask.sum()) < mask.numel() - 4
    assert bool((value[mask] < 0).any())
    assert torch.equal(masks["input_1"], naive_conv(conv, image, value, mask))


def test_a_linear_layer_rests_on_what_a_plain_loop_finds() -> None:
    model = seeded(nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 4)))
    values, masks = walked(model, noise(1, 20))
    head, hidden = model[2], model[0]  # type: ignore[index]
    answer = int(values["_2"].argmax())
    expected = naive_set((head.weight[answer] * values["_1"][0]).tolist(), 0.5)
    assert set(masks["_1"][0].nonzero().flatten().tolist()) == expected
    inputs = [naive_set((hidden.weight[o] * values["input_1"][0]).tolist(), 0.5) for o in expected]
    assert set(masks["input_1"][0].nonzero().flatten().tolist()) == set[int]().union(*inputs)


def test_theta_towards_1_keeps_all_products_of_a_positive_network() -> None:
    model = positive(nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)))
    _, masks = walked(model, noise(1, 9).abs(), theta=1 - 1e-6)
    assert bool(masks["input_1"].all())
    assert bool(masks["_1"].all())
    assert int(masks["_2"].sum()) == 1


def test_theta_0_keeps_one_neuron_per_layer() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )
    _, masks = walked(positive(network), noise(1, 1, 6, 6).abs(), theta=0.0)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == dict.fromkeys(masks, 1)
    assert len(masks) == 6


def test_what_is_kept_gives_every_neuron_at_least_theta_of_its_sum() -> None:
    conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
    model = nn.Sequential(positive(conv), nn.Flatten(), positive(nn.Linear(100, 3)))
    image = noise(1, 2, 5, 5).abs()
    values, masks = walked(model, image, theta=0.5)
    partial, whole, kept = conv(image * masks["input_1"]), values["_0"], masks["_0"]
    assert bool((partial[kept] >= 0.5 * whole[kept]).all())
    assert not bool(masks["input_1"].all())


@pytest.mark.parametrize("theta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_set_reaches_theta_of_its_total_and_none_smaller_does(theta: float) -> None:
    products = noise(200, 30).double()
    chosen = smallest_set(products, theta)
    total = products.sum(1)
    sums = (products * chosen).sum(1)
    smallest = products.where(chosen, torch.inf).amin(1)
    some, more = total > 0, chosen.sum(1) > 1
    assert bool((sums[some] >= theta * total[some] - 1e-12).all())
    assert bool((sums[some & more] - smallest[some & more] < theta * total[some & more]).all())
    assert torch.equal(chosen[~some].int().argmax(1), products[~some].argmax(1))
    assert bool((chosen[~some].sum(1) == 1).all())


def test_what_adds_nothing_is_never_kept() -> None:
    products = torch.tensor([[0.0, 0.0, -1.0], [2.0, 0.0, 0.0]])
    assert smallest_set(products, 0.5).tolist() == [[False] * 3, [True, False, False]]


def test_a_negative_output_rests_on_what_makes_it_negative() -> None:
    hidden, head = nn.Linear(3, 1, bias=False), nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        hidden.weight.copy_(torch.tensor([[1.0, -4.0, -1.0]]))
        head.weight.copy_(torch.tensor([[-1.0], [1.0]]))
    _, masks = walked(nn.Sequential(hidden, head), torch.ones(1, 3))
    assert masks["input_1"].tolist() == [[False, True, False]]


@pytest.mark.parametrize("size", [(4, 4), (3, 2), (1, 1), (5, 9)])
def test_cells_hold_the_positions_that_adaptive_pooling_averages(size: tuple[int, int]) -> None:
    maps = noise(1, 1, 7, 5)
    output = F.adaptive_avg_pool2d(maps, size)
    index = cells(maps, output)
    padded = F.pad(maps.flatten(), (0, 1))
    means = padded[index].sum(1) / (index < 35).sum(1)
    torch.testing.assert_close(means, output.flatten())


def test_windows_hold_the_positions_that_a_pool_averages() -> None:
    maps = noise(1, 1, 7, 5)
    index = windows(maps, 3, 1, 1, 2)
    sums = F.pad(maps.flatten(), (0, 1))[index].sum(1)
    torch.testing.assert_close(sums / 9, F.avg_pool2d(maps, 3, 2, 1).flatten())


def test_max_pooling_leads_to_the_maximum() -> None:
    image = torch.tensor([[[[1.0, 2, 0, 1], [3, -1, 0, 5]]]])
    model = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), positive(nn.Linear(2, 2)))
    _, masks = walked(model, image, theta=1.0)
    assert masks["input_1"].nonzero()[:, 2:].tolist() == [[1, 0], [1, 3]]


def test_a_sum_rests_on_the_larger_part() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :2].relu() + torch.relu(x).flatten(1)

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Identity()
            nn.init.constant_(self.a.weight, 1.0)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.a(x) + self.b(x))

    _, masks = walked(Halves(), torch.tensor([[1.0, 5.0]]))
    assert masks["a"].tolist() == [[False, True]]
    assert masks["b"].tolist() == [[False, False]]
    with pytest.raises(SiteError, match="the effective path meets 'getitem' at 'getitem' in Sum,"):
        walked(Sum(), torch.tensor([[1.0, 5.0]]))


class Functional(nn.Module):
    """What `Modules` does, written with functions and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        x = F.avg_pool2d(x, kernel_size=2, stride=1)
        return cast(Tensor, self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)))


class Mean(Functional):
    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.max_pool2d(self.conv(x).relu(), 2), 2, 1)
        return cast(Tensor, self.head(x.mean(dim=(2, 3))))


class Modules(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.relu, self.largest, self.average = nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2, 1)
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        x = self.average(self.largest(self.relu(self.conv(x))))
        return cast(Tensor, self.head(self.flatten(self.pool(x))))


@pytest.mark.parametrize("kind", [Functional, Mean])
def test_functions_and_methods_are_walked_as_modules_are(kind: type[nn.Module]) -> None:
    image = noise(1, 1, 10, 10)
    _, expected = walked(seeded(Modules()), image)
    _, found = walked(seeded(kind()), image)
    assert 0 < int(expected["conv"].sum()) < expected["conv"].numel()
    assert torch.equal(found["conv"], expected["conv"])
    assert torch.equal(found["x"], expected["x"])


def test_every_operation_of_a_residual_network_is_walked_to_the_image() -> None:
    values, masks = walked(branches(), noise(1, 2, 7, 7))
    assert set(masks) == set(values) - {"output"}
    assert bool(masks["x"].any())


def test_a_site_is_found_in_the_graph_by_module_and_call_in_place_or_not() -> None:
    model = decided_net()
    first, second, block = (
        Site("block.relu", 0, 12, 1),
        Site("block.relu", 1, 12, 1),
        Site("block", 0, 12, 1),
    )
    with torch.no_grad():
        model.block.conv2.weight *= 20
    neurons = next(effective_neurons(model, (first, second, block), images_like_noise(1, 1), 0.5))
    assert torch.equal(neurons[second][1], neurons[block][1])
    assert bool(neurons[first][1].any())
    assert not torch.equal(neurons[first][1], neurons[second][1])
    assert all(bool((value[kept] > 0).all()) for value, kept in neurons.values())


def test_the_path_is_the_share_of_neurons_per_channel() -> None:
    model, batch = decided_net(), images_like_noise(3, 1)
    sites = discover_sites(model, batch)
    router = EffectiveBackwardRecipe().fit(model, sites, batch, seed=0, progress=lambda _: None)
    expected = [
        torch.cat([kept.float().mean((2, 3)) for _, kept in neurons.values()], dim=1)
        for neurons in effective_neurons(model, sites, batch, 0.5)
    ]
    path = router.route(model, batch).path
    assert torch.equal(path, torch.cat(expected))
    assert router.layout.statistics == ("share",)
    assert router.route(model, batch[:0]).path.shape == (0, router.layout.length)


class Undecided(nn.Module):
    """Has no graph of its own: what it does depends on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.head = nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return cast(Tensor, self.head(x if x.sum() > 0 else -x))


def test_a_network_that_cannot_be_traced_is_refused() -> None:
    inputs, recipe = torch.rand(2, 4), EffectiveBackwardRecipe()
    sites = recipe.sites(Undecided().eval(), inputs, None)
    with pytest.raises(SiteError, match="Undecided cannot be traced for its effective path"):
        recipe.fit(Undecided().eval(), sites, inputs, seed=0, progress=lambda _: None)


@pytest.mark.parametrize(
    "unsupported",
    [
        nn.LayerNorm(4),
        nn.Unflatten(1, (4,)),
    ],
    ids=str,
)
def test_an_operation_that_is_not_supported_is_named(unsupported: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 4), unsupported, nn.Linear(4, 2)).eval()
    name = type(unsupported).__name__
    with pytest.raises(SiteError, match=rf"meets '{name}' at '_1' in Sequential, an operation"):
        walked(model, torch.rand(1, 3))


def test_an_option_that_is_not_supported_is_refused_as_well() -> None:
    conv = nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(32, 2))
    with pytest.raises(SiteError, match="meets 'Conv2d' at '_0'"):
        walked(model, torch.rand(1, 1, 4, 4))


def test_a_site_that_the_graph_lacks_is_named() -> None:
    sites = (Site("stemm", 0, 12, 1),)
    with pytest.raises(SiteError, match=r"no module 'stemm' .* call 0; did you mean 'stem'\?"):
        next(effective_neurons(decided_net(), sites, images_like_noise(1, 1), 0.5))


@pytest.mark.parametrize("theta", [-0.1, 1.5])
def test_theta_is_a_share(theta: float) -> None:
    with pytest.raises(ConfigError, match=f"theta of an effective path is {theta}; give one from"):
        EffectiveBackwardRecipe(theta)
