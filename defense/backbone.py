"""The backbone with its sites observed: one forward pass gives logits and path.

Hooks only read. Outside of `record()` and `probe()` they return at once, so a model that carries
them answers as it did before. What runs as a graph calls its hooks from there (`defense.graphs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from defense.errors import GuardFailure, SiteError, nearest
from defense.graphs import make_observable
from defense.routers import ForwardRouter
from defense.sites import first_tensor
from defense.types import ONE_VIEW, Routed, Views


class ReachedBackbone(BaseException):
    """Stops a handler at the door of its backbone, so that its preprocessing alone is run.

    Not an `Exception`: handlers catch those.
    """


@dataclass
class Run:
    """One forward pass: its input (N, ...), its logits (N, K) and the statistics of its sites."""

    inputs: Tensor | None
    logits: Tensor | None = None
    statistics: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


@dataclass
class Recording:
    """All forward passes that ran inside one `record()`; `failure` is what capturing them met."""

    runs: list[Run] = field(default_factory=list)
    stop_at_input: bool = False
    failure: Exception | None = None


class GatedBackbone:
    """A module with hooks at the router's sites. Remove them with `close()` or a `with` block."""

    def __init__(self, model: nn.Module, router: ForwardRouter) -> None:
        self.model = model
        self.router = router
        self._recording: ContextVar[Recording | None] = ContextVar("recording", default=None)
        make_observable(model)
        modules = dict(model.named_modules())
        self._sites: dict[tuple[str, int], int] = {}
        for index, site in enumerate(router.layout.sites):
            if site.module not in modules:
                raise SiteError(
                    f"no module '{site.module}' in this backbone{nearest(site.module, modules)}"
                )
            self._sites[site.module, site.call] = index
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            *(
                modules[name].register_forward_hook(self._observer(name))
                for name in dict.fromkeys(site.module for site in router.layout.sites)
            ),
            model.register_forward_hook(self._end),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """Capture every forward pass made inside the block, whoever calls the model."""
        with self._recorded(Recording()) as recording:
            yield recording

    @contextmanager
    def probe(self) -> Iterator[Recording]:
        """Stop every forward pass inside the block at its input; `runs` then holds the inputs."""
        with self._recorded(Recording(stop_at_input=True)) as recording, suppress(ReachedBackbone):
            yield recording

    @contextmanager
    def _recorded(self, recording: Recording) -> Iterator[Recording]:
        token = self._recording.set(recording)
        try:
            yield recording
        finally:
            self._recording.reset(token)

    def run(self, inputs: Tensor) -> Routed:
        """Return logits and path of a batch (N, ...), from one forward pass."""
        with self.record() as recording:
            self.model(inputs)
        return self.routed(recording)

    def routed(self, recording: Recording, views: Views = ONE_VIEW) -> Routed:
        """Return the runs of `recording` as logits (N, K) and path (N, D), one row per request.

        Raises GuardFailure where there was no run, or where a site was not reached in one.
        """
        if recording.failure is not None:
            raise GuardFailure("capture", f"a site could not be read: {recording.failure}")
        if not recording.runs:
            raise GuardFailure(
                "capture", "the handler ran the backbone 0 times for one batch; expected 1 or more"
            )
        runs = [self._finished(run) for run in recording.runs]
        return views.mean(runs[0] if len(runs) == 1 else Routed.concat(runs))

    def _finished(self, run: Run) -> Routed:
        """Return logits and path of one run, a row for every row of its input."""
        if run.logits is None or run.logits.dim() != 2:
            raise GuardFailure("capture", "the backbone did not return logits of shape (N, K)")
        sites = self.router.layout.sites
        if len(run.statistics) != len(sites):
            missed = next(s.name for i, s in enumerate(sites) if i not in run.statistics)
            raise GuardFailure("capture", f"site '{missed}' was not reached in the forward pass")
        try:
            reduced = torch.cat([run.statistics[i] for i in range(len(sites))], dim=1)
            path = self.router.finish(reduced, run.logits)
        except Exception as error:
            raise GuardFailure("capture", f"the path could not be finished: {error}") from error
        if path.shape[1] != self.router.layout.length:
            raise GuardFailure(
                "capture",
                f"the path has {path.shape[1]} columns; the guard expects {self.router.layout.length}",
            )
        return Routed(run.logits, path)

    def deliver(self, statistics: Sequence[Tensor]) -> None:
        """Take the statistics of all sites for the pass under way from a graph that has no hooks."""
        recording = self._recording.get()
        if recording is not None and recording.runs:
            recording.runs[-1].statistics.update(enumerate(statistics))

    def _begin(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        recording = self._recording.get()
        if recording is None:
            return
        inputs = first_tensor(args[0]) if args else None
        recording.runs.append(Run(inputs))
        if recording.stop_at_input:
            raise ReachedBackbone

    def _observer(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def observe(_module: nn.Module, _args: Any, output: Any) -> None:
            recording = self._recording.get()
            if recording is None or not recording.runs:
                return
            run = recording.runs[-1]
            call = run.calls.get(name, 0)
            run.calls[name] = call + 1
            index = self._sites.get((name, call))
            tensor = output if isinstance(output, Tensor) else first_tensor(output)
            if index is None or tensor is None:
                return
            if tensor.requires_grad:  # a call per site is worth sparing
                tensor = tensor.detach()
            try:
                site = self.router.layout.sites[index]
                run.statistics[index] = self.router.reduce(tensor, site)
            except Exception as error:
                # The guard must never break the prediction that it observes.
                recording.failure = error

        return observe

    def _end(self, _module: nn.Module, _args: Any, output: Any) -> None:
        recording = self._recording.get()
        if recording is not None and recording.runs:
            logits = first_tensor(output)
            recording.runs[-1].logits = None if logits is None else logits.detach()
