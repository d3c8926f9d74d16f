"""The fitted guard, and the guard at work on a live module."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from defense.backbone import GatedBackbone, Recording
from defense.calibration import Calibration
from defense.config import ModelSettings
from defense.detectors import Detector
from defense.errors import ArtifactError, GuardFailure
from defense.fingerprint import fingerprint
from defense.policy import Policy, make_policy
from defense.routers import ForwardRouter
from defense.sites import check_settled, device_of
from defense.state import to_device
from defense.types import Routed, Scored, Verdict


@dataclass(frozen=True)
class InputSpec:
    """What one row of the backbone's input looks like; a dimension of -1 may vary."""

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ArtifactError(
                f"the guard names the unknown input type '{self.dtype}'; fit it again"
            )

    def accepts(self, inputs: Tensor) -> bool:
        """Say whether rows of `inputs` (N, ...) have this shape."""
        row = tuple(inputs.shape[1:])
        return len(row) == len(self.shape) and all(
            want in (-1, got) for want, got in zip(self.shape, row, strict=True)
        )

    def example(self, rows: int = 1) -> Tensor:
        """Return zeros of this shape; a dimension that may vary is made 32 long."""
        shape = [32 if size == -1 else size for size in self.shape]
        return torch.zeros(rows, *shape, dtype=getattr(torch, self.dtype))


@dataclass(frozen=True)
class Guard:
    """The fitted artefact: bound to one backbone by its fingerprint."""

    fingerprint: str
    router: ForwardRouter
    detector: Detector
    calibration: Calibration
    class_names: tuple[str, ...]
    inputs: InputSpec
    facts: dict[str, Any]
    """Provenance for people: counts, seed, command, versions, report card. Never read to decide."""

    @torch.inference_mode()
    def score(self, routed: Routed) -> Scored:
        """Score a run, each row by itself; GuardFailure where the detector fails or gives no number."""
        try:
            score = self.detector.score(routed).cpu()
        except Exception as error:
            raise GuardFailure("score", f"the detector failed: {type(error).__name__}") from error
        if score.shape != (len(routed),):
            raise GuardFailure(
                "score",
                f"the detector gave scores of shape {tuple(score.shape)} for {len(routed)} requests",
            )
        if not bool(torch.isfinite(score).all()):
            raise GuardFailure("score", "the detector gave a score that is no finite number")
        return self.calibration.rank(score, routed.predicted)

    def attach(self, model: nn.Module, settings: ModelSettings | None = None) -> AttachedGuard:
        """Hook this guard to the backbone that it was fitted for, on that backbone's device.

        Raises ArtifactError for any other backbone, and where a trial run gives another path.
        """
        return AttachedGuard(self, model, settings or ModelSettings())


@dataclass(frozen=True)
class Guarded:
    """A guarded batch: logits (N, K), their scores, and one verdict per row."""

    logits: Tensor
    scored: Scored
    verdicts: list[Verdict]


class AttachedGuard:
    """A guard at work on a live module. Take it off with `close()` or a `with` block."""

    def __init__(self, guard: Guard, model: nn.Module, settings: ModelSettings) -> None:
        check_backbone(guard, model)
        check_settled(model)
        self.policy: Policy = make_policy(settings, guard.calibration, guard.class_names)
        self.device = device_of(model)
        self.guard = dataclasses.replace(
            guard,
            router=to_device(guard.router, self.device),
            detector=to_device(guard.detector, self.device),
        )
        if settings.optimize:
            # Convolutions follow their weights' layout: logits equal to rounding, not to the bit.
            model.to(memory_format=torch.channels_last)
        self.backbone = GatedBackbone(model, self.guard.router)
        try:
            self._trial()
        except BaseException:
            self.close()
            raise

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
        """Take the hooks off the model."""
        self.backbone.close()

    def __call__(self, inputs: Tensor) -> Guarded:
        """Run a batch (N, ...) once: its logits, and what the guard says of every row."""
        with self.backbone.record() as recording:
            self.backbone.model(inputs)
        scored = self.score(recording)
        logits = recording.runs[0].logits
        assert logits is not None
        return Guarded(logits, scored, self.policy.decide(scored))

    def score(self, recording: Recording) -> Scored:
        """Score the one forward pass in `recording`; GuardFailure says at which stage it failed."""
        return self.guard.score(self.backbone.routed(recording))

    def _trial(self) -> None:
        """Run zeros through: silently empty paths would look like "no attacks"."""
        try:
            with torch.inference_mode(), self.backbone.record() as recording:
                self.backbone.model(self.guard.inputs.example().to(self.device))
            self.score(recording)
        except GuardFailure as error:
            raise ArtifactError(
                f"the guard does not fit the backbone it was fitted for: {error}; fit it again"
            ) from error


def check_backbone(guard: Guard, model: nn.Module) -> None:
    """Raise ArtifactError where `model` is not the backbone that `guard` was fitted for."""
    found = fingerprint(model)
    if found != guard.fingerprint:
        raise ArtifactError(
            f"the guard was fitted for the backbone {guard.fingerprint[:16]} and this one is "
            f"{found[:16]}; fit a guard for these weights with 'pathguard fit'"
        )
