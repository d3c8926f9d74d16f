"""Runs of an imaginary backbone, for tests that need paths and no network."""

from __future__ import annotations

import torch
from torch import Tensor

from defense.types import FitData, PathLayout, Routed, Site

CLASSES = 4
ECHOES = 3
LAYOUT = PathLayout((Site("a", 0, 6, 1), Site("b", 0, 10, 1), Site("c", 0, 4, -1)), ("mean",))


def clean_runs(count: int, *, seed: int) -> tuple[Routed, Tensor]:
    """Return runs whose paths lie around the centre of their class, and the classes (count,)."""
    fixed = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(CLASSES, LAYOUT.length, generator=fixed)
    mixing = torch.randn(LAYOUT.length, LAYOUT.length, generator=fixed) / 5
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=draw)
    path = centres[labels] + torch.randn(count, LAYOUT.length, generator=draw) @ mixing
    logits = 6.0 * torch.nn.functional.one_hot(labels, CLASSES)
    return Routed(logits + torch.randn(count, CLASSES, generator=draw), path), labels


def shifted_runs(count: int, *, seed: int) -> Routed:
    """Return runs whose last site agrees with the answer and whose first ones say another class."""
    return misled_runs(count, seed=seed)[0]


def misled_runs(count: int, *, seed: int) -> tuple[Routed, Tensor]:
    """Return the same runs, and the classes (count,) that their first sites say."""
    answer, labels = clean_runs(count, seed=seed)
    other, other_labels = clean_runs(4 * count, seed=seed + 1)
    picks = [
        int((other_labels != label).nonzero()[i % 20]) for i, label in enumerate(labels.tolist())
    ]
    path = other.path[picks].clone()
    last = LAYOUT.columns[-1]
    path[:, last] = answer.path[:, last]
    return Routed(answer.logits, path), other_labels[picks]


def looked_at(run: Routed, truth: Tensor, *, seed: int) -> Routed:
    """Return `run` with a witness that says its true classes (N,); most echoes return to them."""
    draw = torch.Generator().manual_seed(seed)
    own, answer = (torch.nn.functional.one_hot(of, CLASSES) for of in (truth, run.predicted))
    witness = 4.0 * own + torch.randn(own.shape, generator=draw)
    returns = torch.rand(len(run), ECHOES, 1, generator=draw) < 0.8
    echoes = 4.0 * torch.where(returns, own[:, None], answer[:, None])
    noise = torch.randn(echoes.shape, generator=draw)
    return Routed(run.logits, run.path, witness, echoes + noise)


def clean_looks(count: int, *, seed: int) -> tuple[Routed, Tensor]:
    """Return clean runs with witness and echoes, and the classes (count,)."""
    run, labels = clean_runs(count, seed=seed)
    return looked_at(run, labels, seed=seed + 1000), labels


def misled_looks(count: int, *, seed: int) -> Routed:
    """Return attacked runs with witness and echoes."""
    return looked_at(*misled_runs(count, seed=seed), seed=seed + 1000)


def fit_data(count: int = 400, *, seed: int = 1) -> FitData:
    """Return clean runs with their labels, and attacked ones."""
    clean, labels = clean_runs(count, seed=seed)
    return FitData(clean, labels, shifted_runs(count // 2, seed=seed + 100))


def full_data(count: int = 400, *, seed: int = 1, attacks: bool = True) -> FitData:
    """Return the same with witness and echoes; without attacked runs where they are not wanted."""
    clean, labels = clean_looks(count, seed=seed)
    attacked = misled_looks(count // 2, seed=seed + 100) if attacks else None
    return FitData(clean, labels, attacked)
