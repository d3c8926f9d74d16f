"""What single units (channels at sites) of a network tell: measures to compare networks by.

Class selectivity is the index of https://arxiv.org/abs/2108.05312 over classes, mutual information
that of the code of https://arxiv.org/abs/2007.08194. Consistency and prediction difference are
reconstructions: of https://arxiv.org/abs/1708.05493 no formulas could be recovered.

Shapes: N images, U units, K channels of the last feature map, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from defense.errors import DataError
from defense.offline.collect import route
from defense.routers.activation import ActivationRouter
from defense.routers.class_gates import answer, last_map
from defense.routers.gating import gated
from defense.sites import device_of, discover_sites
from defense.types import PathLayout, Routed, Site

EPSILON = 1e-6
INFORMATION_IMAGES = 500
INFORMATION_UNITS = 64
INFLUENCE_IMAGES = 32
INFLUENTIAL = 5


@dataclass(frozen=True)
class Layer:
    """A site and the class selectivity of each of its units, in [0, 1]."""

    site: str
    selectivity: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.selectivity) / len(self.selectivity)


@dataclass(frozen=True)
class Consistency:
    """Attacked images that changed the answer, against the mean clean image of classes.

    true, target: mean cosine to the right class and to the answered one, in [-1, 1]. ratio: mean of
    the distance to the right class over that to the answered one, r; above 1 they look like it.
    """

    images: int
    true: float
    target: float
    ratio: float


@dataclass(frozen=True)
class UnitReport:
    """Measures of one network. `last` names the site that all but the selectivity belong to.

    information: nats, mean over units of what a unit tells of the class it tells most of;
    information_share: the same, of all that it tells of classes, in [0, 1]. influence: how far the
    answered class's logit falls without the most influential unit of an image, the second, and so
    on, means over images. consistency: None without attacked images, or where none is comparable.
    """

    network: str
    images: int
    accuracy: float
    layers: tuple[Layer, ...]
    last: str
    information: float
    information_share: float
    influence: tuple[float, ...]
    consistency: Consistency | None

    @property
    def selectivity(self) -> float:
        """The mean over layers of their mean."""
        return sum(layer.mean for layer in self.layers) / len(self.layers)

    @property
    def last_selectivity(self) -> float:
        return next(layer.mean for layer in self.layers if layer.site == self.last)

    def as_dict(self) -> dict[str, object]:
        """Return the report as JSON takes it, with its means."""
        means = {"selectivity": self.selectivity, "last_selectivity": self.last_selectivity}
        return asdict(self) | means


def measure_units(
    network: str,
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    attacked: Tensor | None = None,
    seed: int = 0,
) -> UnitReport:
    """Measure the units of `model` on clean backbone inputs (N, ...) and labels (N,).

    network: its name in the report. attacked: inputs of the same shape, row by row. Mutual
    information and influence are measured on samples, which `seed` draws. Raises DataError where
    rows do not match or fewer than two classes are there.
    """
    check_rows(inputs, labels, attacked)
    example = inputs[:2].to(device_of(model))
    router = ActivationRouter(PathLayout(discover_sites(model, example), ("mean",)))
    columns = dict(zip(router.layout.sites, router.layout.columns, strict=True))
    last = last_map(model, example)
    clean, labels = route(model, router, inputs), labels.cpu()
    check_classes(labels, clean.logits.shape[1])
    selectivity = class_selectivity(clean.path, labels, clean.logits.shape[1])
    end = at(clean, columns[last])
    information, share = mutual_information(end.path, labels, seed=seed)
    consistent = None
    if attacked is not None:
        consistent = consistency(end, at(route(model, router, attacked), columns[last]), labels)
    return UnitReport(
        network=network,
        images=len(clean),
        accuracy=(clean.predicted == labels).float().mean().item(),
        layers=tuple(Layer(s.name, tuple(selectivity[c].tolist())) for s, c in columns.items()),
        last=last.name,
        information=information,
        information_share=share,
        influence=tuple(influence(model, last, sampled(inputs, INFLUENCE_IMAGES, seed)).tolist()),
        consistency=consistent,
    )


def check_rows(inputs: Tensor, labels: Tensor, attacked: Tensor | None) -> None:
    """Raise DataError where images, labels and attacked images are not one each."""
    if labels.shape != inputs.shape[:1]:
        raise DataError(
            f"{len(inputs)} images came with labels of shape {tuple(labels.shape)}; give one a row"
        )
    if attacked is not None and attacked.shape != inputs.shape:
        raise DataError(
            f"attacked images have shape {tuple(attacked.shape)}, clean ones {tuple(inputs.shape)}; "
            "give the attacked version of every image, in the same order"
        )


def check_classes(labels: Tensor, classes: int) -> None:
    """Raise DataError where labels are no classes of the network, or all the same."""
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(
            f"labels run from {int(labels.min())} to {int(labels.max())} and the network knows the "
            f"classes 0 to {classes - 1}; give labels in the network's order"
        )
    if len(labels.unique()) < 2:
        raise DataError("all images are of one class; units are compared over at least two")


def at(run: Routed, columns: slice) -> Routed:
    """Return `run` with these columns of its path alone."""
    return Routed(run.logits, run.path[:, columns])


def class_means(pooled: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return the mean rows of every class, (C, U), 0 where it has none, and which have any, (C,)."""
    member = functional.one_hot(labels, classes).to(pooled.dtype)
    counts = member.sum(0)
    return (member.T @ pooled) / counts.clamp(min=1)[:, None], counts > 0


def contrast(own: Tensor, rest: Tensor) -> Tensor:
    """Return (own - rest) / (own + rest) of responses of at least 0: in [-1, 1], 0 for silence."""
    return (own - rest) / (own + rest + EPSILON)


def class_selectivity(pooled: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return in [0, 1] how much more each unit of `pooled` (N, U) responds to one class: (U,).

    The response to a class is the mean magnitude; the class with the largest is compared with the
    mean of the others that are there.
    """
    means, present = class_means(pooled.abs(), labels, classes)
    means = means[present]
    top = means.amax(0)
    return contrast(top, (means.sum(0) - top) / (len(means) - 1)).clamp(min=0)


def mutual_information(pooled: Tensor, labels: Tensor, *, seed: int) -> tuple[float, float]:
    """Return what a unit of `pooled` (N, K) tells of its class: in nats, and as a share.

    The mean over units of the largest of the informations on "is it class c?"; for the share, a
    unit's informations are divided by their sum first. Estimated from neighbours (scikit-learn).
    """
    from sklearn.feature_selection import mutual_info_classif  # it takes a second to load

    rows = sampled(torch.arange(len(labels)), INFORMATION_IMAGES, seed)
    units = sampled(torch.arange(pooled.shape[1]), INFORMATION_UNITS, seed)
    values, classes = pooled[rows][:, units].double().numpy(), labels[rows].numpy()
    told = torch.stack(
        [
            torch.from_numpy(mutual_info_classif(values, classes == c, random_state=seed))
            for c in np.unique(classes)
        ]
    )
    shares = told / told.sum(0).clamp(min=EPSILON)
    return told.amax(0).mean().item(), shares.amax(0).mean().item()


def consistency(clean: Routed, attacked: Routed, labels: Tensor) -> Consistency | None:
    """Compare attacked rows, paths (N, K), with the mean clean rows of the right and answered class.

    Counts the images whose attack turned a right answer into that of another class in the data.
    """
    centres, present = class_means(clean.path, labels, clean.logits.shape[1])
    target = attacked.predicted
    chosen = (clean.predicted == labels) & (target != labels) & present[target]
    if not chosen.any():
        return None
    rows, true, wrong = attacked.path[chosen], centres[labels[chosen]], centres[target[chosen]]
    far = (rows - wrong).norm(dim=1).clamp(min=EPSILON)
    return Consistency(
        images=len(rows),
        true=functional.cosine_similarity(rows, true).mean().item(),
        target=functional.cosine_similarity(rows, wrong).mean().item(),
        ratio=((rows - true).norm(dim=1) / far).mean().item(),
    )


def influence(model: nn.Module, site: Site, inputs: Tensor) -> Tensor:
    """Return the mean prediction difference of images' most influential channels, (M,), in logits.

    Channels are ranked, for each image, by their first-order influence on the answered class (what
    a gate's gradient says at 1); the top `INFLUENTIAL` are then zeroed one by one.
    """
    with torch.inference_mode(False):
        gates = torch.ones(len(inputs), site.channels, device=device_of(model)).requires_grad_()
        with torch.enable_grad(), gated(model, (site,), (gates,)):
            top = answer(model, inputs).amax(1).sum()
        (slope,) = torch.autograd.grad(top, (gates,))
        ranked = slope.topk(min(INFLUENTIAL, site.channels), dim=1).indices
        drops = [prediction_difference(model, site, inputs, channel) for channel in ranked.T]
    return torch.stack(drops).mean(1).cpu()


def prediction_difference(model: nn.Module, site: Site, inputs: Tensor, channels: Tensor) -> Tensor:
    """Return by how much the answered class's logit falls without a channel per image: (N,).

    channels: (N,) the one of `site` that is zeroed.
    """
    gates = torch.ones(len(inputs), site.channels, device=device_of(model))
    gates.scatter_(1, channels.to(gates.device)[:, None], 0.0)
    with torch.no_grad():
        whole = answer(model, inputs)
        with gated(model, (site,), (gates,)):
            without = answer(model, inputs)
    answered = whole.argmax(1, keepdim=True)
    return (whole - without).gather(1, answered)[:, 0]


def sampled(rows: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` of `rows`, or all, in an order that `seed` draws."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:count].to(rows.device)]


def unit_table(reports: Sequence[UnitReport]) -> str:
    """Return one markdown table with a row per network."""
    head = (
        "network",
        "accuracy",
        "selectivity",
        "selectivity, last",
        "information, nats",
        "information, share",
        "cosine, true",
        "cosine, target",
        "r",
        "influence, top",
        f"influence, top {INFLUENTIAL}",
    )
    rows = [(report.network, *map(shown, row_of(report))) for report in reports]
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def row_of(report: UnitReport) -> tuple[float | None, ...]:
    """Return the numbers of a network's row."""
    found = report.consistency
    return (
        report.accuracy,
        report.selectivity,
        report.last_selectivity,
        report.information,
        report.information_share,
        *((found.true, found.target, found.ratio) if found else (None, None, None)),
        report.influence[0],
        sum(report.influence) / len(report.influence),
    )


def shown(value: float | None) -> str:
    """Return a number of the table to three digits."""
    return "-" if value is None else f"{value:.3f}"
