"""Choose the clean images that a guard names: a few of every class, classified right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from defense.backbone import GatedBackbone
from defense.errors import DataError
from defense.exemplars import Exemplars
from defense.guard import Guard, check_backbone
from defense.memory import Nearness
from defense.offline.collect import Served, collect
from defense.offline.data import ImageSet
from defense.offline.pathways import class_pathways
from defense.offline.progress import Progress
from defense.routers import ForwardRouter
from defense.routers.generative import GenerativeRouter
from defense.types import Routed

PER_CLASS = 20
MOST = 20_000
"""Exemplars of a guard at most: their sketches then take 5 MB."""


def choose_exemplars(
    clean: Routed,
    labels: Tensor,
    images: Sequence[str],
    nearness: Nearness,
    router: ForwardRouter,
) -> Exemplars:
    """Return the first clean runs of every class that are classified as their labels (N,) say.

    The rows of a fit are in random order, so the first are a random choice. images: a name per row.
    """
    classes = clean.logits.shape[1]
    most = max(1, min(PER_CLASS, MOST // classes))
    right = clean.predicted == labels
    rows = torch.cat([(right & (labels == c)).nonzero()[:most, 0] for c in range(classes)])
    pathways = None
    if isinstance(router, GenerativeRouter) and len(labels[right].unique()) == classes:
        pathways = class_pathways(clean.path[right], labels[right], classes).to(torch.uint8)
    return Exemplars(
        sketches=nearness.sketch(clean.path[rows]),
        labels=labels[rows],
        images=tuple(images[row] for row in rows.tolist()),
        pathways=pathways,
    )


def name_exemplars(guard: Guard, served: Served, images: ImageSet, progress: Progress) -> Guard:
    """Return `guard` with exemplars chosen among `images`; what it scores and decides stays.

    For guards that were fitted before guards kept any, or to images that are gone. The images are
    taken as they come: shuffle them. ArtifactError for another network than the guard's, DataError
    where folders are not called as its classes.
    """
    check_backbone(guard, served.backbone)
    if guard.nearness is None:
        raise DataError(
            "this guard was fitted before guards could tell how near two paths are; fit it again"
        )
    unknown = [name for name in images.class_names if name not in guard.class_names]
    if unknown:
        raise DataError(
            f"the guard has no class '{unknown[0]}'; give images in folders that are called as its "
            f"classes: {', '.join(guard.class_names)}"
        )
    with GatedBackbone(served.backbone, guard.router) as gated:
        clean = collect(served, gated, images.stream(), progress, views=guard.inputs.views)
    labels = clean.predicted
    if images.labels is not None:
        index = torch.tensor([guard.class_names.index(name) for name in images.class_names])
        labels = index[torch.tensor(images.labels)]
    chosen = choose_exemplars(clean, labels, images.names, guard.nearness, guard.router)
    return replace(guard, exemplars=chosen)
