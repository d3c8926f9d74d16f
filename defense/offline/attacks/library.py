"""The table of attacks, most of them made with torchattacks 3.5.

Passes are forward and backward passes per image. PGD, APGD, AutoAttack, CW, DeepFool and the patch
see 8-bit pixels, with the gradient passed straight through the rounding, so that what they find is
what a client sends.

torchattacks' habits that the rows allow for: APGD and Square seed torch with a seed of their own,
CW ignores its confidence (see `descent`), AutoAttack runs 10 steps of APGD and wants the number of
classes, DeepFool and Pixle go image by image. Its other attacks of pixels are no rows: JSMA holds a
saliency for all pairs of pixels and always goes to the next of ten classes; OnePixel turned one in
twenty digits; SparseFool, which goes image by image too, was not tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from defense.errors import ConfigError, nearest
from defense.offline.attacks.attack import LEVELS, Attack, AttackFunction
from defense.offline.attacks.descent import Confident, Descent, cross_entropy, in_turn, logits_ratio
from defense.offline.attacks.targeted import TargetedSteps

PATCH = 8
"""Side of the square that `patch` changes, in pixels."""

ATTACKS = (
    "fgsm_8",
    "bim_8",
    "pgd_2",
    "pgd_4",
    "pgd_8",
    "pgd_l2",
    "mifgsm_8",
    "apgd_8",
    "apgd_dlr_8",
    "autoattack_8",
    "square_8",
    "cw_0",
    "cw_10",
    "deepfool",
    "pixle",
    "patch",
)
"""The rows of a study, by name."""


def make_attack(name: str, *, eps: float | None = None) -> Attack:
    """Return the attack called `name`, for testing one's own models.

    name: a row of `ATTACKS`; or the kind alone, such as `pgd`, with eps: the bound of the change in
    [0, 1]. A size that the name carries (`pgd_8` is 8/255) goes before eps, and attacks that
    minimise their change take none. Raises ConfigError for unknown names and missing sizes.
    """
    ta = _torchattacks()
    if name in FREE:
        return FREE[name](ta, name)
    kind, _, size = name.rpartition("_")
    if kind in BOUNDED and size.isdecimal():
        return BOUNDED[kind](ta, name, int(size) / LEVELS)
    if name not in BOUNDED:
        raise ConfigError(f"no attack '{name}'{nearest(name, (*BOUNDED, *FREE, *ATTACKS))}")
    size_of = 0.5 if eps is None and name == "pgd_l2" else eps
    if size_of is None:
        raise ConfigError(f"attack '{name}' needs a size; say '{name}_8' for 8/255, or give eps")
    return BOUNDED[name](ta, name, size_of)


def _torchattacks() -> Any:
    try:
        import torchattacks
    except ImportError as error:
        raise ConfigError(
            "attacks need the extra 'attacks'; pip install 'pathguard[attacks]'"
        ) from error
    return torchattacks


class EightBit(nn.Module):
    """A model that sees pixels in [0, 1] rounded to 8 bits; the gradient is that without rounding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (N, K) of pixels (N, C, H, W)."""
        sent = (pixels.detach().clamp(0, 1) * LEVELS).round() / LEVELS
        logits: Tensor = self.model(sent + (pixels - pixels.detach()))
        return logits


def _draw() -> int:
    """Return a seed for attacks that bring a generator's seed of their own."""
    return int(torch.randint(2**31, ()))


def _fgsm(ta: Any, name: str, eps: float) -> Attack:
    """One step: 1 pass. Fast Gradient Sign, https://arxiv.org/abs/1412.6572."""
    return Attack(name, eps, lambda m: ta.FGSM(m, eps=eps), "fgsm")


def _bim(ta: Any, name: str, eps: float) -> Attack:
    """20 steps without a random start: 20 passes. https://arxiv.org/abs/1607.02533."""
    return Attack(name, eps, lambda m: ta.BIM(m, eps=eps, alpha=eps / 4, steps=20), "pgd")


def _mifgsm(ta: Any, name: str, eps: float) -> Attack:
    """20 steps with momentum: 20 passes. https://arxiv.org/abs/1710.06081."""
    return Attack(name, eps, lambda m: ta.MIFGSM(m, eps=eps, alpha=eps / 4, steps=20), "pgd")


def _restarted(model: nn.Module, eps: float, norm: str = "linf") -> AttackFunction:
    """Return PGD of 20 steps; images that are left are attacked by the ratio of logits, twice."""
    losses = (cross_entropy, logits_ratio, logits_ratio)
    return in_turn(model, *(Descent(model, eps, loss=loss, norm=norm) for loss in losses))


def _pgd(_: Any, name: str, eps: float) -> Attack:
    """21 passes, and as many for every restart of an image. https://arxiv.org/abs/1706.06083."""
    return Attack(name, eps, lambda m: _restarted(m, eps), "pgd")


def _pgd_l2(_: Any, name: str, eps: float) -> Attack:
    """As `pgd` in the L2 ball of radius eps: 21 passes and restarts."""
    return Attack(name, eps, lambda m: _restarted(m, eps, "l2"), "pgd", norm="l2")


def _apgd(*losses: str) -> Callable[[Any, str, float], Attack]:
    """20 steps with two restarts for each loss, on what is left: 22 passes, 21 for every further run.

    Croce and Hein, https://arxiv.org/abs/2003.01690. Cross-entropy alone leaves images that the
    ratio of logits turns.
    """

    def make(ta: Any, name: str, eps: float) -> Attack:
        def build(model: nn.Module) -> AttackFunction:
            seen = EightBit(model)

            def climb(loss: str) -> AttackFunction:
                return lambda x, y: ta.APGD(
                    seen, eps=eps, steps=20, n_restarts=2, loss=loss, seed=_draw()
                )(x, y)

            return in_turn(model, *map(climb, losses))

        return Attack(name, eps, build, "pgd")

    return make


def _autoattack(ta: Any, name: str, eps: float) -> Attack:
    """APGD, targeted APGD, FAB and Square in turn, each on what is left: from 12 to thousands."""

    def build(model: nn.Module) -> AttackFunction:
        seen = EightBit(model)

        def attack(x: Tensor, y: Tensor) -> Tensor:
            with torch.no_grad():
                classes = model(x[:1]).shape[1]
            found: Tensor = ta.AutoAttack(seen, eps=eps, n_classes=classes, seed=_draw())(x, y)
            return found

        return attack

    return Attack(name, eps, build, "pgd")


def _square(ta: Any, name: str, eps: float) -> Attack:
    """Black box, at most 1000 forward passes. https://arxiv.org/abs/1912.00049."""

    def build(model: nn.Module) -> AttackFunction:
        return lambda x, y: ta.Square(model, eps=eps, n_queries=1000, seed=_draw())(x, y)

    return Attack(name, eps, build, "square")


def _cw(confidence: float) -> Callable[[Any, str], Attack]:
    """41 passes; about 250 for images that take all rounds, as most do at a confidence out of reach."""

    def make(_: Any, name: str) -> Attack:
        return Attack(
            name,
            None,
            lambda m: Confident(m, confidence, start=_restarted(m, 8 / LEVELS)),
            "cw",
            norm="l2",
        )

    return make


def _deepfool(ta: Any, name: str) -> Attack:
    """1 forward and K backward passes a step, image by image. https://arxiv.org/abs/1511.04599."""
    return Attack(name, None, lambda m: ta.DeepFool(EightBit(m), steps=20), norm="l2")


def _pixle(ta: Any, name: str) -> Attack:
    """Black box: pixels change places; up to 200 forward passes, image by image.

    Pomponi et al., https://arxiv.org/abs/2202.02236.
    """
    return Attack(name, None, lambda m: ta.Pixle(m, restarts=20, max_iterations=10), norm="l0")


def _patch(_: Any, name: str) -> Attack:
    """PGD without a bound in a square at a random place: 21 passes, and restarts elsewhere."""

    def build(model: nn.Module) -> AttackFunction:
        return in_turn(model, *[Descent(model, 1.0, loss=logits_ratio, patch=PATCH)] * 3)

    return Attack(name, None, build, norm="l0")


BOUNDED: dict[str, Callable[[Any, str, float], Attack]] = {
    "fgsm": _fgsm,
    "bim": _bim,
    "pgd": _pgd,
    "pgd_l2": _pgd_l2,
    "mifgsm": _mifgsm,
    "apgd": _apgd("ce", "dlr"),
    "apgd_dlr": _apgd("dlr"),
    "autoattack": _autoattack,
    "square": _square,
}
"""Attacks in a ball, by kind; each takes the radius."""

FREE: dict[str, Callable[[Any, str], Attack]] = {
    "cw": _cw(0.0),
    "cw_0": _cw(0.0),
    "cw_10": _cw(10.0),
    "deepfool": _deepfool,
    "cdrp": lambda _, name: Attack(name, None, TargetedSteps),
    "pixle": _pixle,
    "patch": _patch,
}
"""Attacks without a radius."""
