"""What a killed study finds again, and what it does not mistake for its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from defense.offline.benchmark.store import Store, Tensors


class Maker:
    """Makes tensors and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Tensors:
        self.calls += 1
        return {"pixels": torch.arange(6, dtype=torch.uint8), "calls": torch.tensor(self.calls)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "kept", "these weights")


def the_file(store: Store) -> Path:
    (path,) = store.folder.iterdir()
    return path


def test_what_was_made_once_is_not_made_again(store: Store) -> None:
    make = Maker()
    first = store.keep("attack pgd/8", make, rows=[1, 2])
    again = Store(store.folder, store.about).keep("attack pgd/8", make, rows=[1, 2])
    assert make.calls == 1
    assert first.keys() == again.keys()
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert value.dtype == again[name].dtype


def test_the_order_in_which_it_is_said_what_a_result_depends_on_does_not_matter(
    store: Store,
) -> None:
    make = Maker()
    store.keep("runs", make, seed=1, rows=[2])
    store.keep("runs", make, rows=[2], seed=1)
    assert make.calls == 1


@pytest.mark.parametrize(
    "ask",
    [
        lambda store, make: store.keep("attack", make, rows=[1, 3]),
        lambda store, make: store.keep("attack", make, rows=[1, 2], eps=8),
        lambda store, make: store.keep("attack ", make, rows=[1, 2]),
        lambda store, make: Store(store.folder, "others").keep("attack", make, rows=[1, 2]),
    ],
    ids=["depends", "one more", "label", "about"],
)
def test_anything_else_that_it_depends_on_makes_it_anew(
    store: Store, ask: Callable[[Store, Maker], Tensors]
) -> None:
    make = Maker()
    first = store.keep("attack", make, rows=[1, 2])
    assert int(ask(store, make)["calls"]) == 2
    assert int(store.keep("attack", make, rows=[1, 2])["calls"]) == int(first["calls"]) == 1


@pytest.mark.parametrize("size", [0, 7, 40, -1])
def test_a_file_that_was_cut_off_is_made_again(store: Store, size: int) -> None:
    make = Maker()
    store.keep("runs", make)
    path = the_file(store)
    path.write_bytes(path.read_bytes()[:size])
    assert not store.kept("runs")
    assert int(store.keep("runs", make)["calls"]) == 2
    assert store.kept("runs")
    assert int(store.keep("runs", make)["calls"]) == 2


def test_a_run_that_was_killed_leaves_nothing(store: Store) -> None:
    def killed() -> Tensors:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.keep("runs", killed, rows=[1])
    assert not store.kept("runs", rows=[1])
    assert not store.folder.exists()
    assert int(store.keep("runs", Maker(), rows=[1])["calls"]) == 1


def test_what_a_killed_writer_left_beside_the_file_is_not_taken_for_it(store: Store) -> None:
    make = Maker()
    store.keep("runs", make)
    path = the_file(store)
    path.rename(path.with_name(path.name + ".partial"))
    assert not store.kept("runs")
    assert int(store.keep("runs", make)["calls"]) == 2


def test_it_says_what_is_kept(store: Store) -> None:
    assert not store.kept("runs", rows=[1])
    store.keep("runs", Maker(), rows=[1])
    assert store.kept("runs", rows=[1])
    assert not store.kept("runs", rows=[2])
    assert not store.kept("walks", rows=[1])
    assert not Store(store.folder, "others").kept("runs", rows=[1])


def test_names_with_spaces_and_slashes_are_files_of_the_folder(store: Store) -> None:
    store.keep("runs of pgd 8/255", Maker())
    assert the_file(store).name.startswith("runs-of-pgd-8-255-")


def test_tensors_in_any_layout_and_of_any_kind_are_kept(store: Store) -> None:
    base = torch.arange(12.0).view(3, 4)
    made = {
        "turned": base.T,
        "strided": base[:, ::2],
        "part": base[1:],
        "whole": base,
        "empty": torch.zeros(0, 3),
        "mask": base > 4,
        "half": base.to(torch.bfloat16),
        "number": torch.tensor(7),
    }
    first = store.keep("all", lambda: made)
    again = store.keep("all", lambda: made)
    for name, value in made.items():
        for found in (first[name], again[name]):
            assert torch.equal(found, value)
            assert found.dtype == value.dtype


def test_what_is_returned_does_not_depend_on_who_made_it(store: Store) -> None:
    weight = torch.ones(3, requires_grad=True)
    with torch.inference_mode():
        made = {"here": torch.ones(2)}
    first = store.keep("runs", lambda: made | {"graph": 2 * weight})
    again = store.keep("runs", lambda: made)
    assert first.keys() == again.keys()
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert not value.requires_grad
        assert not value.is_inference()
