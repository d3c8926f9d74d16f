"""What a guard may look at beside the path, and when: a witness, and echoes of a doubtful request.

An echo is the backbone's answer to a slightly changed input. Changes that leave a clean image's
answer alone often move an adversarial one's (Hu et al., https://arxiv.org/abs/1910.07629; Xu et al.,
https://arxiv.org/abs/1704.01155, compare answers before and after such a change). Echoes take extra
forward passes, so only doubtful requests get them, within a time budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from defense.calibration import Calibration
from defense.config import ModelSettings
from defense.errors import ConfigError, GuardFailure, nearest
from defense.sites import first_tensor
from defense.types import LOOKS, Routed, Scored, carries, look_of
from defense.witness import Witness


def _noise(inputs: Tensor, amount: float, index: int) -> Tensor:
    # One pattern for every row: a row's echo must not depend on where in a batch it stands.
    draw = torch.Generator().manual_seed(index)
    pattern = torch.randn(inputs.shape[1:], generator=draw)
    return inputs + amount * pattern.to(inputs.device, inputs.dtype)


def _mirror(inputs: Tensor, _amount: float, _index: int) -> Tensor:
    return inputs.flip(-1)


def _shift(inputs: Tensor, amount: float, _index: int) -> Tensor:
    pixels, width = int(amount), inputs.shape[-1]
    padded = functional.pad(inputs, (max(pixels, 0), max(-pixels, 0), 0, 0), mode="replicate")
    return padded[..., max(-pixels, 0) :][..., :width]


def _blur(inputs: Tensor, amount: float, _index: int) -> Tensor:
    channels = inputs.shape[1]
    line = inputs.new_tensor([0.25, 0.5, 0.25])
    kernel = line.outer(line).expand(channels, 1, 3, 3)
    padded = functional.pad(inputs, (1, 1, 1, 1), mode="replicate")
    return inputs.lerp(functional.conv2d(padded, kernel, groups=channels), amount)


PERTURBATIONS: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "noise": _noise,
    "mirror": _mirror,
    "shift": _shift,
    "blur": _blur,
}
"""Deterministic changes of inputs (N, C, H, W), by amount and by their place in an echo."""


@dataclass(frozen=True)
class Perturbation:
    """One small change of the backbone's input. `amount` by kind:

    noise: standard deviation of a fixed Gaussian pattern, in units of the input. mirror: none.
    shift: whole pixels to the right (to the left where negative), the border repeated.
    blur: share in (0, 1] of a 3x3 binomial blur.
    """

    kind: str
    amount: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in PERTURBATIONS:
            raise ConfigError(f"no perturbation '{self.kind}'{nearest(self.kind, PERTURBATIONS)}")
        allowed = {
            "noise": self.amount > 0,
            "mirror": self.amount == 0,
            "shift": self.amount != 0 and float(self.amount).is_integer(),
            "blur": 0 < self.amount <= 1,
        }
        if not allowed[self.kind]:
            raise ConfigError(
                f"the perturbation '{self.kind}' has the amount {self.amount:g}; noise takes more "
                "than 0, shift whole pixels, blur a share up to 1 and mirror none"
            )

    def apply(self, inputs: Tensor, index: int) -> Tensor:
        """Return changed inputs (N, C, H, W), each row by itself; `index` tells patterns apart."""
        return PERTURBATIONS[self.kind](inputs, self.amount, index)


@dataclass(frozen=True)
class Echo:
    """The perturbations of a second look, P of them."""

    perturbations: tuple[Perturbation, ...]

    def __post_init__(self) -> None:
        if not self.perturbations:
            raise ConfigError("an echo has no perturbation; give at least one")

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return the logits (N, P, K) of changed inputs (N, C, H, W), from one forward pass.

        Run it outside of `GatedBackbone.record()`: this pass is not the one that answers.
        """
        copies = [p.apply(inputs, index) for index, p in enumerate(self.perturbations)]
        logits = first_tensor(model(torch.cat(copies)))
        assert logits is not None
        return logits.reshape(len(copies), len(inputs), -1).transpose(0, 1)


@dataclass(frozen=True)
class Extras:
    """What a guard has to look at beside the path."""

    witness: Witness | None = None
    echo: Echo | None = None

    @property
    def look(self) -> str:
        """The look that shows all of it."""
        return look_of(self.witness is not None, self.echo is not None)

    def show(self, look: str, routed: Routed, model: nn.Module, inputs: Tensor) -> Routed:
        """Return runs `routed` of `inputs` (N, ...), or (N, V, ...) of V views, as `look` shows them.

        What they lack for it is found out; GuardFailure says at which stage that failed.
        """
        witness, echoes = routed.witness, routed.echoes
        if carries(look, "witness") and witness is None:
            witness = self.ask_witness(inputs)
        if carries(look, "echoes") and echoes is None:
            echoes = self.ask_echo(model, inputs)
        return replace(routed, witness=witness, echoes=echoes).at(look)

    def ask_witness(self, inputs: Tensor) -> Tensor | None:
        """Return the witness's logits (N, K), where there is one."""
        ask = self.witness
        return None if ask is None else _tried("witness", inputs, ask.logits)

    def ask_echo(self, model: nn.Module, inputs: Tensor) -> Tensor | None:
        """Return the echoes (N, P, K), where the guard has any."""
        ask = self.echo
        return None if ask is None else _tried("second_look", inputs, partial(ask.logits, model))


def _tried(stage: str, inputs: Tensor, ask: Callable[[Tensor], Tensor]) -> Tensor:
    if inputs.dim() == 5:  # several views of a request: asked about one by one, as the backbone was
        answers = _tried(stage, inputs.flatten(0, 1), ask)
        return answers.reshape(*inputs.shape[:2], *answers.shape[1:]).mean(1)
    if inputs.dim() != 4:
        raise GuardFailure(
            stage, f"inputs of shape {tuple(inputs.shape)} are no images (N, C, H, W)"
        )
    try:
        return ask(inputs)
    except Exception as error:
        raise GuardFailure(stage, f"no answer was had: {type(error).__name__}") from error


@dataclass(frozen=True)
class Plan:
    """Which looks a guard takes under some settings, and what ranks their scores.

    A request whose first p-value is at most `below_p` is doubtful: it gets the second look, where
    there is one, within `budget` seconds per batch; then `again` ranks it.
    """

    first: str
    calibration: Calibration
    second: str | None
    again: Calibration | None
    below_p: float
    budget: float

    def doubtful(self, scored: Scored) -> Tensor:
        """Return the rows that deserve a second look, the most doubtful first."""
        if self.second is None:
            return scored.predicted.new_empty(0)
        order = scored.p_value.argsort(stable=True)
        return order[scored.p_value[order] <= self.below_p]

    def combined(self, first: Scored, rows: Tensor, score: Tensor) -> Scored:
        """Return `first` with p-values of both looks for doubtful `rows` (R,), by their scores (R,).

        A row whose score is no finite number keeps the first p-value.
        """
        if self.again is None:
            return first
        good = score.isfinite()
        rows, score = rows[good], score[good]
        found = self.again.rank(score, first.predicted[rows])
        return replace(
            first,
            p_value=first.p_value.index_copy(0, rows, found.p_value),
            class_p_value=first.class_p_value.index_copy(0, rows, found.class_p_value),
        )


def make_plan(
    settings: ModelSettings, calibrations: Mapping[str, Calibration], extras: Extras
) -> Plan:
    """Choose the looks: the most complete ones that are calibrated and that `settings` allow.

    Raises ConfigError where `settings` leave no first look.
    """
    cheap = look_of(extras.witness is not None and settings.witness == "always", False)
    firsts = [look for look in LOOKS if look in calibrations and _within(look, cheap)]
    if not firsts:
        raise ConfigError(
            f"'witness: {settings.witness}' leaves the guard no look that it is calibrated for; "
            "set 'witness: always', or fit the guard with another detector"
        )
    first = firsts[-1]
    whole = look_of(extras.witness is not None and settings.witness != "off", True)
    seconds = [
        look
        for look in LOOKS
        if look in calibrations and look != first and _within(first, look) and _within(look, whole)
    ]
    second = seconds[-1] if seconds else None
    ask = settings.second_look
    again = second and calibrations[first].again(calibrations[second], ask.below_p)
    return Plan(
        first, calibrations[first], second, again or None, ask.below_p, ask.budget_ms / 1000
    )


def _within(look: str, other: str) -> bool:
    return set(look.split("+")) <= set(other.split("+"))


class Pace:
    """How long the second look of one row takes, as last measured; what a budget allows by that.

    Where not a single row fits, the estimate shrinks a little each time: a machine that was busy for
    a moment must not switch the second look off for good.
    """

    PATIENCE = 0.98

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds = 0.0

    def fitting(self, budget: float) -> int:
        """Return how many rows fit into `budget` seconds."""
        if budget <= 0:
            return 0
        if self._seconds > budget:
            self._seconds *= self.PATIENCE
            return 0
        return int(min(budget / max(self._seconds, 1e-9), 1e9))

    @contextmanager
    def measured(self, rows: int) -> Iterator[None]:
        """Take the time of a look at `rows` rows."""
        start = self._clock()
        try:
            yield
        finally:
            self._seconds = (self._clock() - start) / rows
