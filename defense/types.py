"""The values that flow from a forward pass to an answer.

Shapes: N requests (rows), D path columns, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from defense.errors import ArtifactError, GuardFailure


class Verdict(StrEnum):
    """What the guard says of one request."""

    ACCEPT = "accept"
    FLAG = "flag"
    REJECT = "reject"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the backbone whose output channels are observed.

    `call` counts the calls of that module within one forward pass from 0, because a module may be
    used more than once; `axis` is the channel axis: 1 for feature maps (N, C, ...), -1 for tokens
    (N, ..., C) and for vectors (N, C).
    """

    module: str
    call: int
    channels: int
    axis: int

    @property
    def name(self) -> str:
        return f"{self.module}#{self.call}"


@dataclass(frozen=True)
class PathLayout:
    """Maps sites to the columns of a path: site after site, statistic after statistic."""

    sites: tuple[Site, ...]
    statistics: tuple[str, ...]

    @cached_property
    def columns(self) -> tuple[slice, ...]:
        """The columns of every site, in the order of `sites`."""
        stops: list[int] = [0]
        for site in self.sites:
            stops.append(stops[-1] + site.channels * len(self.statistics))
        return tuple(slice(a, b) for a, b in pairwise(stops))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Module names, with the number of the call where a module has several sites."""
        modules = [site.module for site in self.sites]
        return tuple(
            site.name if modules.count(site.module) > 1 else site.module for site in self.sites
        )

    @property
    def length(self) -> int:
        """D, the number of columns."""
        return self.columns[-1].stop if self.sites else 0


@dataclass(frozen=True)
class Routed:
    """What is known of N requests; all tensors on the same device.

    logits: (N, K) and path: (N, D), left behind by the one forward pass that answers.
    witness: (N, K), the logits of the guard's witness on the same inputs.
    echoes: (N, P, K), the backbone's logits under P small fixed perturbations of the inputs.
    """

    logits: Tensor
    path: Tensor
    witness: Tensor | None = None
    echoes: Tensor | None = None

    def __len__(self) -> int:
        return self.logits.shape[0]

    @cached_property
    def predicted(self) -> Tensor:
        """(N,) predicted class."""
        # After a forward pass the caches are cold, and even this costs a tenth of a millisecond.
        return self.logits.argmax(dim=1)

    @property
    def look(self) -> str:
        """What these runs carry: one of LOOKS."""
        return look_of(self.witness is not None, self.echoes is not None)

    def shows(self, look: str) -> bool:
        """Say whether these runs carry all that `look` shows."""
        return set(look.split("+")) <= set(self.look.split("+"))

    def at(self, look: str) -> Routed:
        """Return these runs as `look` shows them; GuardFailure where they lack a part of it."""
        if not self.shows(look):
            raise GuardFailure(
                "score",
                f"the runs carry '{self.look}' and not '{look}'; collect them with its parts",
            )
        return replace(
            self,
            witness=self.witness if carries(look, "witness") else None,
            echoes=self.echoes if carries(look, "echoes") else None,
        )

    def take(self, rows: Tensor) -> Routed:
        """Return the given rows (indices or a boolean mask)."""
        return self._map(lambda part: part[rows])

    def cpu(self) -> Routed:
        return self._map(Tensor.cpu)

    @staticmethod
    def concat(parts: Sequence[Routed]) -> Routed:
        """Stack batches of the same layout; GuardFailure where some carry more than others."""
        if len({part.look for part in parts}) > 1:
            raise GuardFailure(
                "score", "some runs carry a witness or echoes and others do not; collect all alike"
            )
        return _built(
            None if column[0] is None else torch.cat(column)
            for column in ([getattr(part, f.name) for part in parts] for f in fields(Routed))
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> Routed:
        parts = (getattr(self, field.name) for field in fields(self))
        return _built(None if part is None else change(part) for part in parts)


@dataclass(frozen=True)
class Views:
    """Which rows of a batch are a request's, all runs of the backbone for it one after the other.

    A handler may show its backbone several views of a request, such as five crops, in one run or in
    several. number: views per request. grouped: those of a request stand together (r0v0, r0v1, r1v0,
    ...); else one view of all requests follows the other (r0v0, r1v0, ..., r0v1, ...).
    """

    number: int = 1
    grouped: bool = True

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ArtifactError(
                f"a guard says that a request has {self.number} views, and it has 1 or more; fit it "
                "again"
            )

    def arranged(self, rows: Tensor) -> Tensor:
        """Return rows (N x number, ...) by request: (N, number, ...), or (N, ...) of a single view.

        GuardFailure where the requests would have different numbers of views.
        """
        if self.number == 1:
            return rows
        if len(rows) % self.number:
            raise GuardFailure(
                "rows", f"the backbone ran {len(rows)} rows; expected {self.number} per request"
            )
        if self.grouped:
            return rows.reshape(-1, self.number, *rows.shape[1:])
        return rows.reshape(self.number, -1, *rows.shape[1:]).transpose(0, 1)

    def mean(self, routed: Routed) -> Routed:
        """Return one run per request, the mean of its views'.

        Most handlers answer with that mean: as one larger network, whose sites are read over all
        views. An attack has to move most of them, and calibration ranks requests as they are served.
        """
        if self.number == 1:
            return routed
        return routed._map(lambda part: self.arranged(part).mean(1))


ONE_VIEW = Views()
"""What most handlers show their backbone of a request."""


def _built(parts: Iterable[Tensor | None]) -> Routed:
    logits, path, *rest = parts
    assert logits is not None
    assert path is not None
    return Routed(logits, path, *rest)


LOOKS = ("path", "path+witness", "path+echoes", "path+witness+echoes")
"""What a detector may be shown of a request."""


def carries(look: str, part: str) -> bool:
    """Say whether `look` shows "witness" or "echoes"."""
    return part in look.split("+")


def look_of(witness: bool, echoes: bool) -> str:
    """Name the look that shows these parts beside the path."""
    return "path" + "+witness" * witness + "+echoes" * echoes


@dataclass(frozen=True)
class FitData:
    """Runs to fit a detector on: clean ones with their labels (N,), and what was made of them.

    attacked: runs that attacks turned. shifted: runs of harmless changes. judged: (N,), marks the
    clean runs whose images those were made of; views are then shaped by the others, for what was
    shaped by an image finds it more usual than one it has not seen. None leaves that to chance.
    """

    clean: Routed
    labels: Tensor
    attacked: Routed | None = None
    shifted: Routed | None = None
    judged: Tensor | None = None


@dataclass(frozen=True)
class Scored:
    """The detector's opinion of N requests, on the CPU in float64.

    score: (N,), larger = more suspicious. p_value: (N,) rank among all clean calibration scores.
    class_p_value: (N,) rank among those of the predicted class. predicted: (N,) class index.
    """

    score: Tensor
    p_value: Tensor
    class_p_value: Tensor
    predicted: Tensor

    def __len__(self) -> int:
        return self.score.shape[0]

    def take(self, rows: Tensor) -> Scored:
        """Return the given rows (indices or a boolean mask)."""
        return Scored(*(getattr(self, field.name)[rows] for field in fields(Scored)))

    @staticmethod
    def concat(parts: Sequence[Scored]) -> Scored:
        """Stack the opinions of several batches."""
        columns = ([getattr(part, field.name) for part in parts] for field in fields(Scored))
        return Scored(*(torch.cat(column) for column in columns))
