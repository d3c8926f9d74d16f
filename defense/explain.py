"""Why one request was judged as it was: everything that helps an analyst, in one document.

What the guard saw (`defense.reasons`), the neurons that the answer rests on, and which pixels speak
for it. The last two run the backbone again, so they have a budget; what does not fit in is left out
and said.
"""

from __future__ import annotations

import base64
import io
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from defense.config import Explanations
from defense.errors import ConfigError, GuardFailure, PathGuardError
from defense.figures import rounded
from defense.gate import Answer, Examined, Gate, Outcome
from defense.guard import AttachedGuard
from defense.influence import influential
from defense.keys import KeyFile
from defense.metrics import ModelMetrics
from defense.patience import within
from defense.reasons import reasons

logger = logging.getLogger(__name__)

GRID = 16
"""Rows and columns at most of the attribution in numbers."""
BRIGHTEST = 0.99
"""Share of the pixels that stay below full colour: a single one would leave the others pale."""


class UnknownClass(ConfigError):
    """An explanation was asked for a class that the model does not have."""


@dataclass(frozen=True)
class Explained:
    """What became of a request for an explanation; no document where it could not be judged."""

    outcome: Outcome
    document: dict[str, Any] | None = None


class Explainer:
    """Explains requests to whoever holds the key; ConfigError where it could not."""

    def __init__(self, settings: Explanations, metrics: ModelMetrics) -> None:
        self.settings = settings
        self._metrics = metrics
        self._key = KeyFile(settings.key_file)
        self._key.check()
        try:
            from defense.attributions import attribute, method_named
        except ImportError as error:
            missing = (error.name or "captum").partition(".")[0]
            raise ConfigError(
                f"explanations by '{settings.method}' need the package '{missing}', which is not "
                "installed here; install it, or set explanations to off"
            ) from error
        method_named(settings.method)
        self._attribute = attribute

    def opens(self, key: object) -> bool:
        """Say whether who shows `key` may have explanations; None shows nothing."""
        if key is None:
            return False
        if self._key.opens(key):
            return True
        self._metrics.explained("wrong_key")
        return False

    def explain(
        self, gate: Gate, payload: object, answer: Answer, *, about: str | None, started: float
    ) -> Explained:
        """Explain one request; it is judged whatever the mode is, and not counted among the others.

        answer: runs the archive's handler on it. about: the class to explain, by name or index; None
        for the predicted one. started: when the batch was begun, on the monotonic clock; all of its
        explanations share one budget. Raises UnknownClass.
        """
        guard = gate.attached.guard
        try:
            chosen = None if about is None else class_index(about, guard.class_names)
        except UnknownClass:
            self._metrics.explained("invalid")
            raise
        try:
            examined = gate.examine(payload, answer)
        except Exception as error:
            examined = Examined(Outcome(failure=error))
        outcome = examined.outcome
        if outcome.invalid is not None or outcome.failure is not None:
            self._metrics.explained("invalid" if outcome.invalid else "failed")
            return Explained(outcome)
        document: dict[str, Any] = {
            "verdict": None if outcome.verdict is None else outcome.verdict.value,
            "p_value": outcome.p_value,
            "score": outcome.score,
            "fingerprint": guard.fingerprint[:16],
            "reasons": None,
            "influential": [],
            "attribution": None,
        }
        until = started + self.settings.budget_ms / 1000
        left_out = self._fill(gate.attached, examined, chosen, until, document)
        document["left_out"] = {} if left_out is None else {"attribution": left_out}
        self._metrics.explained(left_out or "given")
        return Explained(outcome, document)

    def _fill(
        self,
        attached: AttachedGuard,
        examined: Examined,
        chosen: int | None,
        until: float,
        document: dict[str, Any],
    ) -> str | None:
        """Add what the run and gradients say to `document`; return why the attribution is left out."""
        guard, routed = attached.guard, examined.routed
        if routed is None:
            return "failed"
        _tried("reasons", lambda: document.update(reasons=reasons(guard, routed)[0].as_json()))
        if examined.inputs is None:
            return "failed"
        # Of several views of a request the first is explained.
        image = examined.inputs if guard.inputs.views.number == 1 else examined.inputs[:, 0]
        label = int(routed.predicted[0]) if chosen is None else chosen

        def tell(part: str, found: Callable[[], Any]) -> str | None:
            seconds = until - time.monotonic()
            if seconds <= 0:
                return "out_of_time"
            return _tried(part, lambda: document.update({part: within(seconds, found)}))

        tell("influential", lambda: self._influential(attached, image, label))
        if image.dim() != 4:
            return "failed"
        if image.shape[2] * image.shape[3] > self.settings.max_pixels:
            return "too_large"
        return tell("attribution", lambda: self._attributed(attached, image, label))

    def _influential(
        self, attached: AttachedGuard, image: Tensor, label: int
    ) -> list[dict[str, Any]]:
        layout = attached.backbone.router.layout
        found = influential(attached.backbone.model, layout, image, label)
        return [one.as_json() for one in found]

    def _attributed(self, attached: AttachedGuard, image: Tensor, label: int) -> dict[str, Any]:
        target = torch.tensor([label], device=image.device)
        found = self._attribute(self.settings.method, attached.backbone.model, image, target)
        return {
            "method": self.settings.method,
            "class": attached.guard.class_names[label],
            **pictured(found[0].float().cpu()),
        }


def _tried(part: str, work: Callable[[], object]) -> str | None:
    """Do work; return why it failed, if it did."""
    try:
        work()
    except Exception as error:
        if isinstance(error, GuardFailure) and error.stage == "timeout":
            return "out_of_time"
        # Only our own sentences are known to hold nothing that a client sent.
        said = str(error) if isinstance(error, PathGuardError) else type(error).__name__
        logger.warning("an explanation lacks its part '%s': %s", part, said)
        return "failed"
    return None


def class_index(about: str, names: Sequence[str]) -> int:
    """Return the class that is called `about`, or that has this index; UnknownClass if there is none."""
    if about in names:
        return names.index(about)
    if about.isascii() and about.isdigit() and len(about) < 9 and int(about) < len(names):
        return int(about)
    raise UnknownClass(
        f"the class to explain is none of the model's {len(names)}; give a class's name or an index "
        f"from 0 to {len(names) - 1}"
    )


def pictured(attribution: Tensor) -> dict[str, Any]:
    """Return an attribution (C, H, W) for people: a picture and a coarse table of numbers.

    scale: what full colour stands for. heat_map: a PNG of (H, W) in base64, see `heat_map`. grid: sums
    over channels, averaged over a raster of at most 16 x 16 fields.
    """
    heat = attribution.sum(0).nan_to_num(0.0, 0.0, 0.0)
    height, width = heat.shape
    coarse = functional.adaptive_avg_pool2d(heat[None], (min(GRID, height), min(GRID, width)))[0]
    return {
        "height": height,
        "width": width,
        "scale": rounded(_scale(heat)),
        "heat_map": base64.b64encode(heat_map(heat)).decode(),
        "grid": [[rounded(value) for value in row] for row in coarse.tolist()],
    }


def heat_map(heat: Tensor) -> bytes:
    """Draw attributions (H, W) as a PNG: red speaks for the class, blue against it, white neither."""
    strength = (heat / max(_scale(heat), 1e-30)).clamp(-1, 1)
    pale = 1 - strength.abs()
    one = torch.ones_like(pale)
    red, blue = torch.where(strength < 0, pale, one), torch.where(strength > 0, pale, one)
    pixels = (torch.stack([red, pale, blue], dim=2) * 255).round().to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def _scale(heat: Tensor) -> float:
    """Return the magnitude that all but the strongest pixels of (H, W) stay below."""
    sizes = heat.abs().flatten().sort().values
    return float(sizes[min(len(sizes) - 1, int(BRIGHTEST * len(sizes)))])
