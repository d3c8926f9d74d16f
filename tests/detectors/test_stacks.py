"""Sites of any mix of widths, stacked, give what they give one by one."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from defense.detectors.gaussian import Standardiser
from defense.detectors.stacks import pad, stack_sites
from defense.types import PathLayout, Site

widths_and_ranks = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=6)


@given(widths_and_ranks, st.integers(0, 5), st.integers(0, 2**31))
def test_stacked_sites_give_the_maps_and_energies_of_every_site(
    sites: list[tuple[int, int]], rows: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    layout = PathLayout(tuple(Site(f"s{i}", 0, w, 1) for i, (w, _) in enumerate(sites)), ("mean",))
    weights = [torch.randn(w, k, generator=draw) for w, k in sites]
    standardisers = [
        Standardiser(torch.randn(w, generator=draw), torch.rand(w, generator=draw) + 0.5)
        for w, _ in sites
    ]
    stacks = stack_sites(layout, standardisers, weights)
    path = torch.randn(rows, layout.length, generator=draw)
    stacked = stacks.rows(path)
    maps, energies = stacks.maps(stacked), stacks.energies(stacked)
    for index, columns in enumerate(layout.columns):
        x = standardisers[index](path[:, columns])
        rank = sites[index][1]
        torch.testing.assert_close(maps[index, :, :rank], x @ weights[index])
        torch.testing.assert_close(energies[index], x.square().sum(1))
        assert not bool(maps[index, :, rank:].any())


def test_padding_adds_zeros_behind_the_last_axes() -> None:
    small, large = pad([torch.ones(1, 1), torch.ones(2, 2)], axes=2)
    assert small.tolist() == [[1, 0], [0, 0]]
    assert large.tolist() == [[1, 1], [1, 1]]
