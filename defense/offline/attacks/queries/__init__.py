"""Attacks that only ask: without the weights, from answers and refusals, on one's own models."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from defense.errors import DataError
from defense.offline.attacks.queries.lockstep import POINTS, Queried, QueryAttack
from defense.offline.attacks.queries.oracle import Oracle


def compare(
    attack: QueryAttack,
    stock: Oracle,
    guarded: Oracle,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
) -> dict[str, Any]:
    """Run the same attack against a model and its guarded form; return plain figures.

    images: (N, C, H, W) in [0, 1]; labels: (N,). Those that the stock model gets wrong are left out
    and `n` counts the others. Successes are shares of `n`; `ratio` is guarded over stock, None
    where stock is 0. `median_queries` is of successes, None for none. `curve`: [queries, median
    L-infinity, median L2] after each tenth of the budget, None where half have found nothing.
    """
    answers = stock.ask(images)
    right = ~answers.refused & (answers.labels == labels.cpu())
    if not bool(right.any()):
        raise DataError(
            f"the stock model gets all {len(images)} images wrong, so there is nothing to attack; "
            "give images that it was trained for"
        )
    oracles = {"stock": stock, "guarded": guarded}
    runs = {
        name: attack.run(oracle, images[right], labels[right], seed=seed)
        for name, oracle in oracles.items()
    }
    success = {name: float(run.success.double().mean()) for name, run in runs.items()}
    return {
        "n": int(right.sum()),
        "budget": attack.budget,
        "stock_success": success["stock"],
        "guarded_success": success["guarded"],
        "ratio": success["guarded"] / success["stock"] if success["stock"] else None,
        "median_queries": {name: _median_queries(run) for name, run in runs.items()},
        "curve": {name: _curve(run, attack.budget) for name, run in runs.items()},
    }


def _median_queries(run: Queried) -> float | None:
    spent = run.queries[run.success]
    return float(spent.double().quantile(0.5)) if len(spent) else None


def _curve(run: Queried, budget: int) -> list[list[float | None]]:
    rows: list[list[float | None]] = []
    for point, distances in enumerate(run.curve.sort(dim=1).values):
        middle = distances[(len(run.success) - 1) // 2]
        found = [float(value) if value.isfinite() else None for value in middle]
        rows.append([float(budget * (point + 1) // POINTS), *found])
    return rows
