"""No image serves two ends, whatever the seed, and what is sealed stays sealed."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from defense.errors import DataError
from defense.offline.benchmark.splits import Pools, make_pools, make_split

SEEDS = st.integers(0, 2**31)


def marked(count: int, seed: int) -> Tensor:
    """Mark (count,) about a third of all images."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 1 / 3


def pools_of(count: int = 900, seed: int = 0) -> Pools:
    return make_pools(marked(count, seed))


@given(count=st.integers(700, 1000), marks=SEEDS, seed=SEEDS)
def test_every_image_serves_exactly_one_end(count: int, marks: int, seed: int) -> None:
    pools = pools_of(count, marks)
    parts = make_split(pools, seed).parts() | {"sealed": pools.sealed}
    for first, second in combinations(parts, 2):
        assert not torch.isin(parts[first], parts[second]).any(), (first, second)
    assert torch.cat(list(parts.values())).sort().values.tolist() == list(range(count))
    assert torch.equal(pools.sealed.sort().values, marked(count, marks).nonzero().squeeze(1))


@given(seed=SEEDS)
def test_only_images_with_attacked_twins_are_fitted_against_and_tested(seed: int) -> None:
    pools = pools_of()
    split = make_split(pools, seed)
    attacked = torch.cat([split.fit, split.test])
    assert attacked.sort().values.equal(pools.attacked.sort().values)
    assert 1.9 < len(split.test) / len(split.fit) < 2.1
    assert abs(len(split.views) - len(split.calibration)) <= 1


def test_pools_are_always_the_same_so_that_attacks_can_be_kept() -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(pools_of())
    for part in ("sealed", "attacked", "plain"):
        assert torch.equal(getattr(found[0], part), getattr(found[1], part))


def test_a_seed_gives_its_split_again_and_another_seed_another_one() -> None:
    pools = pools_of()
    first, again, other = (make_split(pools, seed).parts() for seed in (0, 0, 1))
    for part, rows in first.items():
        assert torch.equal(rows, again[part])
        assert not torch.equal(rows.sort().values, other[part].sort().values)


def test_the_first_few_of_every_part_are_from_all_over_the_data() -> None:
    pools = pools_of()
    for rows in (pools.sealed, *make_split(pools, 0).parts().values()):
        few = rows[:40]
        assert few.min() < 225
        assert few.max() >= 675


@pytest.mark.parametrize(
    ("sealed", "said"),
    [
        (torch.arange(300) % 5 == 0, "60 would stay sealed and 72 be attacked"),
        (torch.arange(900) < 50, "50 would stay sealed and 255 be attacked"),
        (torch.arange(900) >= 100, "800 would stay sealed and 30 be attacked"),
    ],
)
def test_too_few_images_for_a_study_are_refused(sealed: Tensor, said: str) -> None:
    with pytest.raises(DataError, match=f"{len(sealed)} images are too few for a study: {said}"):
        make_pools(sealed)
