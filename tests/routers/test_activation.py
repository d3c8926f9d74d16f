"""Pooled channel statistics, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from defense.errors import ConfigError
from defense.routers.activation import STATISTICS, ActivationRouter
from defense.types import PathLayout, Site

MAPS, TOKENS = Site("maps", 0, 3, 1), Site("tokens", 0, 3, -1)


def router(*statistics: str) -> ActivationRouter:
    return ActivationRouter(PathLayout((MAPS, TOKENS), statistics))


def test_every_statistic_of_a_feature_map_is_that_of_numpy_side_by_side() -> None:
    maps = torch.randn(2, 3, 4, 5)
    array = maps.numpy().reshape(2, 3, 20)
    expected = np.concatenate([array.mean(2), array.max(2), array.std(2)], axis=1)
    found = router("mean", "max", "deviation").reduce(maps, MAPS)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_tokens_are_pooled_over_the_sequence() -> None:
    tokens = torch.randn(2, 7, 3)
    found = router("mean", "max", "deviation").reduce(tokens, TOKENS).numpy()
    array = tokens.numpy()
    expected = np.concatenate([array.mean(1), array.max(1), array.std(1)], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_vector_is_its_own_mean_and_maximum_and_does_not_deviate() -> None:
    vector = torch.randn(2, 3)
    found = router("mean", "max", "deviation").reduce(vector, TOKENS)
    assert torch.equal(found, torch.cat([vector, vector, torch.zeros(2, 3)], dim=1))


def test_the_order_of_statistics_is_that_of_the_layout() -> None:
    maps = torch.randn(2, 3, 4, 4)
    first, second = (
        router(*names).reduce(maps, MAPS) for names in (("max", "mean"), ("mean", "max"))
    )
    assert torch.equal(first[:, :3], second[:, 3:])


def test_half_precision_sums_do_not_overflow() -> None:
    maps = torch.full((1, 3, 64, 64), 60_000.0, dtype=torch.float16)
    found = router("mean", "deviation").reduce(maps, MAPS)
    torch.testing.assert_close(found[:, :3], maps.amax((2, 3)).float(), rtol=1e-5, atol=0)
    assert float(found[:, 3:].amax()) < 1


def test_a_mean_of_half_precision_is_finer_than_half_precision() -> None:
    above_one = 1 + 2.0**-10
    maps = torch.tensor([1.0, above_one], dtype=torch.float16).repeat(1, 3, 8, 4)
    assert router("mean").reduce(maps, MAPS).tolist() == [[1 + 2.0**-11] * 3]


def test_a_deviation_far_from_zero_is_not_lost_to_cancellation() -> None:
    maps = 10_000 + torch.tensor([-1.0, 1.0]).repeat(1, 3, 8, 1)
    assert torch.equal(router("deviation").reduce(maps, MAPS), torch.ones(1, 3))


def test_the_path_owns_its_memory() -> None:
    """A path that shared a layer's output would keep the whole feature map alive."""
    vector = torch.randn(2, 3)
    found = router("mean").reduce(vector, TOKENS)
    assert found.data_ptr() != vector.data_ptr()


def test_an_unknown_statistic_is_an_error_that_names_the_nearest() -> None:
    assert STATISTICS == ("mean", "max", "deviation")
    with pytest.raises(ConfigError, match=r"no statistic 'maen'; did you mean 'mean'\?"):
        router("maen")


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
    shape: tuple[int, ...], axis: int, dtype: torch.dtype, device: str
) -> None:
    site = Site("anything", 0, 5, axis)
    output = torch.rand(shape, device=device).to(dtype)
    reduced = router(*STATISTICS).reduce(output, site)
    assert (reduced.shape, reduced.dtype) == ((2, 15), torch.float32)
    assert reduced.device.type == device


def test_channels_are_the_same_wherever_their_axis_lies() -> None:
    maps = torch.randn(2, 5, 4, 3)
    first = router(*STATISTICS).reduce(maps, Site("a", 0, 5, 1))
    last = router(*STATISTICS).reduce(maps.permute(0, 2, 3, 1), Site("a", 0, 5, -1))
    torch.testing.assert_close(first, last)


def test_memory_layout_does_not_matter() -> None:
    maps, site = torch.randn(2, 5, 4, 3), Site("a", 0, 5, 1)
    strided = maps.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        router(*STATISTICS).reduce(maps, site), router(*STATISTICS).reduce(strided, site)
    )
