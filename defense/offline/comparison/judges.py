"""What a path tells of attacks: detectors common to all routers, and those of the CDRP paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defense.types import Routed

SEEDS = (0, 1, 2)
TREES = 100
FEW_PER_CLASS = (1, 5, 10)
"""Images per class that the published detectors were fitted to (Wang et al., CVPR 2018)."""


def detect(
    runs: dict[str, Routed], features: Callable[[Routed], Tensor] = lambda run: run.path
) -> dict[str, dict[str, list[float]]]:
    """Return the AUROC of a logistic regression and a forest for every attack, one per seed.

    Fitted to one half of the images (clean ones and their successful attacks), judged on the other.
    """
    clean = runs["clean"]
    found: dict[str, dict[str, list[float]]] = {}
    for label, attacked in runs.items():
        if label == "clean":
            continue
        won = attacked.predicted != clean.predicted
        found[label] = {"success": [float(won.double().mean())]}
        for name, build in classifiers().items():
            found[label][name] = [
                judge(build(seed), features(clean), features(attacked), won, halves(won, seed))
                for seed in SEEDS
            ]
    return found


def halves(won: Tensor, seed: int) -> Tensor:
    """Return (N,) True for the images that a detector is fitted to."""
    order = torch.randperm(len(won), generator=torch.Generator().manual_seed(seed))
    fitted = torch.zeros(len(won), dtype=torch.bool)
    fitted[order[: len(won) // 2]] = True
    return fitted


def judge(model: Any, clean: Tensor, attacked: Tensor, won: Tensor, fitted: Tensor) -> float:
    """Return the AUROC of `model` fitted to the `fitted` images, on all others; nan without any."""
    from sklearn.metrics import roc_auc_score

    def rows(which: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        x = torch.cat([clean[which & won], attacked[which & won]]).double().numpy()
        return x, np.repeat([0, 1], len(x) // 2)

    (x, y), (unseen, truth) = rows(fitted), rows(~fitted)
    if len(set(y)) < 2 or len(set(truth)) < 2 or len(x) < 10:
        return float("nan")
    scores = model.fit(x, y).predict_proba(unseen)[:, 1]
    return float(roc_auc_score(truth, scores))


def classifiers() -> dict[str, Callable[[int], Any]]:
    """Return what judges every path: the common detectors."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return {
        "logistic": lambda seed: make_pipeline(
            StandardScaler(), LogisticRegression(C=0.01, max_iter=500, random_state=seed)
        ),
        "forest": lambda seed: RandomForestClassifier(TREES, random_state=seed, n_jobs=2),
    }


def published_classifiers() -> dict[str, Callable[[int], Any]]:
    """Return the three classifiers of the CDRP paper."""
    from sklearn.ensemble import (
        AdaBoostClassifier,
        GradientBoostingClassifier,
        RandomForestClassifier,
    )

    return {
        "random forest": lambda seed: RandomForestClassifier(TREES, random_state=seed, n_jobs=2),
        "AdaBoost": lambda seed: AdaBoostClassifier(random_state=seed),
        "gradient boosting": lambda seed: GradientBoostingClassifier(
            random_state=seed, max_features="sqrt"
        ),
    }


def detect_with_few(
    runs: dict[str, Routed], labels: Tensor, attack: str = "CDRP"
) -> dict[str, dict[str, list[float]]]:
    """Return AUROC by classifier and images per class, one per seed: the CDRP paper's protocol.

    With what its release lacks: only right answers that the attack turned, probabilities instead
    of hard decisions, and a fresh optimiser for every pass.
    """
    clean, attacked = runs["clean"], runs[attack]
    won = attacked.predicted != clean.predicted
    found: dict[str, dict[str, list[float]]] = {}
    for name, build in published_classifiers().items():
        found[name] = {
            str(count): [
                judge(build(seed), clean.path, attacked.path, won, few(labels, won, count, seed))
                for seed in SEEDS
            ]
            for count in FEW_PER_CLASS
        }
    return found


def few(labels: Tensor, won: Tensor, count: int, seed: int) -> Tensor:
    """Return (N,) True for `count` images of every class whose attack succeeded."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        of_class = order[(labels[order] == label) & won[order]]
        chosen[of_class[:count]] = True
    return chosen
