"""A guarded worker whose parts fail on demand: the file named by `PATHGUARD_FAULT` says which.

Everything around the failing part is the product: the worker, its gate, its metrics.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ts.context import Context

from defense.types import Routed
from handlers.torchserve import TorchServeGuard

FAULT_VARIABLE = "PATHGUARD_FAULT"
SLOW_SECONDS = 3.0
HANDLER_SOURCE = """\
from tests.campaigns.injected import FaultyGuard


class PathGuardHandler(FaultyGuard):
    pass
"""


class Fault:
    """What is wrong at the moment, by the content of a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def now(self, name: str) -> bool:
        return self._path.read_text() == name

    def detector(self, score: Callable[[Routed], Tensor]) -> Callable[[Routed], Tensor]:
        """Return a detector's `score`, failing on demand."""

        def faulty(routed: Routed) -> Tensor:
            if self.now("detector raises"):
                raise RuntimeError("raised on demand")
            if self.now("detector out of memory"):
                raise torch.cuda.OutOfMemoryError("CUDA out of memory, on demand")
            if self.now("detector hangs"):
                time.sleep(3600)
            if self.now("detector hangs in native code"):
                _deadlock()
            scores = score(routed)
            return scores * torch.nan if self.now("detector gives NaN") else scores

        return faulty

    def witness(self, logits: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return a witness's `logits`, failing on demand."""

        def faulty(inputs: Tensor) -> Tensor:
            if self.now("witness fails"):
                raise RuntimeError("raised on demand")
            return logits(inputs)

        return faulty

    def forward(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """Fail, or be slow, where the backbone begins."""
        if self.now("slow forward"):
            time.sleep(SLOW_SECONDS)
        batches = self.now("forward out of memory in batches") and len(args[0]) > 1
        if batches or self.now("forward out of memory"):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory, on demand")


def _deadlock() -> None:
    """Wait for a mutex that is never released: no signal ends that."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    for _ in range(2):
        library.pthread_mutex_lock(mutex)


class FaultyGuard(TorchServeGuard):
    """The product's handler with `Fault` in its detector, its witness and its backbone."""

    def initialize(self, context: Context) -> None:
        super().initialize(context)
        fault = Fault(Path(os.environ[FAULT_VARIABLE]))
        attached = self._gate._attached
        guard = attached.guard
        # Their dataclasses are frozen; an attribute of the object stands before the class's method.
        object.__setattr__(guard.detector, "score", fault.detector(guard.detector.score))
        if guard.witness is not None:
            object.__setattr__(guard.witness, "logits", fault.witness(guard.witness.logits))
        attached.backbone.model.register_forward_pre_hook(fault.forward)
