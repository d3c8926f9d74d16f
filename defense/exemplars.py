"""Clean images by name, and their paths: what a suspicious path is held against by people.

A guard keeps a few exemplars of every class, as sketches of their paths and the names of their files.
The images themselves stay where they are: whoever has the data can look them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from defense.errors import ArtifactError
from defense.figures import rounded
from defense.types import PathLayout


@dataclass(frozen=True)
class Neighbour:
    """An exemplar near a request. distance: of the two paths, in deviations of a column of clean ones.

    In the shipped guard two clean images of different classes are 1.4 apart, of one class 1.1 (medians).
    """

    image: str
    label: int
    distance: float

    def as_json(self, names: Sequence[str]) -> dict[str, Any]:
        """Return plain values; `names` are those of the classes."""
        return {
            "image": self.image,
            "class": names[self.label],
            "distance": rounded(self.distance),
        }


@dataclass(frozen=True)
class Exemplars:
    """E clean images that the network classifies right.

    sketches: (E, S) of their paths, see `defense.memory.Nearness`. labels: (E,) class indices.
    images: names of their files, relative to the data that the guard was fitted to. pathways: (K, D)
    of 0 and 1, the channels that most clean images of a class leave open (the class pathway of Lin et
    al. 2023, arXiv 2309.09887); None where the guard's paths are no masks.
    """

    sketches: Tensor
    labels: Tensor
    images: tuple[str, ...]
    pathways: Tensor | None = None

    def __post_init__(self) -> None:
        if not len(self.sketches) == len(self.labels) == len(self.images):
            raise ArtifactError(
                f"the guard names {len(self.images)} clean images and holds {len(self.sketches)} "
                f"paths of them and {len(self.labels)} classes; fit it again"
            )

    def check(self, classes: int, width: int) -> None:
        """Raise ArtifactError where these do not belong to so many classes and sketches so long."""
        known = bool(((self.labels >= 0) & (self.labels < classes)).all())
        rows = classes if self.pathways is None else len(self.pathways)
        if not known or rows != classes or self.sketches.shape[1:] != (width,):
            raise ArtifactError(
                f"the guard's clean images are not of its {classes} classes, or not compared as it "
                "compares requests; fit it again"
            )

    def nearest(
        self, sketches: Tensor, *, most: int, labels: Tensor | None = None
    ) -> list[tuple[Neighbour, ...]]:
        """Return, for each of N sketches (N, S), its nearest exemplars, nearest first.

        labels: (N,) to ask for exemplars of one class each.
        """
        distances = torch.cdist(
            sketches.float().cpu(), self.sketches, compute_mode="donot_use_mm_for_euclid_dist"
        )
        if labels is not None:
            distances = distances.masked_fill(labels.cpu()[:, None] != self.labels, torch.inf)
        found = distances.nan_to_num(torch.inf, torch.inf).topk(
            min(most, len(self.images)), dim=1, largest=False
        )
        return [
            tuple(
                Neighbour(self.images[index], int(self.labels[index]), distance)
                for index, distance in zip(order, row, strict=True)
                if distance < torch.inf
            )
            for order, row in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class Strays:
    """A site where a request opens channels that the pathway of its class keeps closed."""

    site: str
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Pathway:
    """A request's open channels beside the pathways of classes; all numbers in [0, 1].

    open: share of channels that the request opens. own: intersection over union with the pathway of
    the predicted class. best: the class whose pathway it overlaps most. strays: where most lie first.
    """

    open: float
    own: float
    best: int
    best_overlap: float
    strays: tuple[Strays, ...]

    def as_json(self, names: Sequence[str]) -> dict[str, Any]:
        """Return plain values; `names` are those of the classes."""
        return {
            "open": round(self.open, 4),
            "own": round(self.own, 4),
            "best": {"class": names[self.best], "share": round(self.best_overlap, 4)},
            "strays": [{"site": s.site, "channels": list(s.channels)} for s in self.strays],
        }


def follow_pathway(
    mask: Tensor, label: int, pathways: Tensor, layout: PathLayout, *, most: int
) -> Pathway:
    """Hold a mask (D,) of 0 and 1, predicted `label`, against the class pathways (K, D).

    most: sites, and stray channels of a site, that are named at most.
    """
    opened, kept = mask.cpu() > 0.5, pathways.bool()
    both, either = (opened & kept).sum(1), (opened | kept).sum(1)
    overlap = torch.where(either > 0, both / either.clamp(min=1), 1.0)
    best = int(overlap.argmax())
    stray = opened & ~kept[label]
    found = [
        Strays(name, tuple(stray[columns].nonzero().flatten().tolist()))
        for name, columns in zip(layout.names, layout.columns, strict=True)
    ]
    found = sorted((s for s in found if s.channels), key=lambda s: len(s.channels), reverse=True)
    return Pathway(
        open=opened.double().mean().item(),
        own=float(overlap[label]),
        best=best,
        best_overlap=float(overlap[best]),
        strays=tuple(Strays(s.site, s.channels[:most]) for s in found[:most]),
    )
