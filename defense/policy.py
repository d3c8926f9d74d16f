"""P-values to verdicts: pure functions of the scores and of the configured rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from defense.calibration import Calibration
from defense.config import ModelSettings, Rule, TierRule
from defense.errors import ConfigError, nearest
from defense.types import Scored, Verdict


@dataclass(frozen=True)
class Tier:
    """One threshold: the general rule and its exceptions by predicted class index."""

    rule: Rule
    per_class: Mapping[int, Rule]

    def hits(self, score: float, p_value: float, class_p_value: float, label: int) -> bool:
        """Say whether a request falls into this tier."""
        own = self.per_class.get(label)
        rule, p = (self.rule, p_value) if own is None else (own, class_p_value)
        if rule.score is not None:
            return score >= rule.score
        return rule.target_fpr is not None and p <= rule.target_fpr


@dataclass(frozen=True)
class Policy:
    """The rules of one model, checked against the calibration that has to keep them."""

    flag: Tier
    reject: Tier
    enforce: bool

    def decide(self, scored: Scored, probing: Tensor | None = None) -> list[Verdict]:
        """Return one verdict per row. Only `enforce` rejects; a rejection otherwise is a flag.

        probing: (N,) bool, rows that are questions of an attack: rejected, whatever their score.
        """
        asks = [False] * len(scored) if probing is None else probing.tolist()
        rows = zip(
            asks,
            scored.score.tolist(),
            scored.p_value.tolist(),
            scored.class_p_value.tolist(),
            scored.predicted.tolist(),
            strict=True,
        )
        return [self._verdict(*row) for row in rows]

    def _verdict(
        self, asks: bool, score: float, p_value: float, class_p_value: float, label: int
    ) -> Verdict:
        if asks or self.reject.hits(score, p_value, class_p_value, label):
            return Verdict.REJECT if self.enforce else Verdict.FLAG
        flagged = self.flag.hits(score, p_value, class_p_value, label)
        return Verdict.FLAG if flagged else Verdict.ACCEPT


def make_policy(
    settings: ModelSettings, calibration: Calibration, class_names: Sequence[str]
) -> Policy:
    """Bind the rules of `settings` to a guard's calibration and classes.

    Raises CalibrationError for a rate that the calibration set is too small for, ConfigError for a
    class that the guard does not know.
    """
    tiers = {
        name: _tier(name, rule, calibration, class_names)
        for name, rule in (("flag", settings.flag), ("reject", settings.reject))
    }
    # Shadow counts what enforcing would have done; only the answers stay untouched.
    enforce = settings.mode in ("enforce", "shadow")
    return Policy(tiers["flag"], tiers["reject"], enforce)


def target_fpr(tier: Tier, calibration: Calibration) -> float:
    """Return the false-positive rate that a tier promises (for a raw score: the implied one)."""
    if tier.rule.target_fpr is not None:
        return tier.rule.target_fpr
    assert tier.rule.score is not None
    return calibration.implied_fpr(tier.rule.score)


def _tier(name: str, rule: TierRule, calibration: Calibration, class_names: Sequence[str]) -> Tier:
    if rule.target_fpr is not None:
        calibration.check_target(rule.target_fpr)
    exceptions: dict[int, Rule] = {}
    for class_name, own in rule.per_class.items():
        label = _class_index(class_name, class_names, where=f"{name}.per_class")
        if own.target_fpr is not None:
            calibration.check_target(own.target_fpr, label=label)
        exceptions[label] = own
    return Tier(rule, exceptions)


def _class_index(name: str, class_names: Sequence[str], *, where: str) -> int:
    if name in class_names:
        return class_names.index(name)
    if name.isdecimal() and int(name) < len(class_names):
        return int(name)
    raise ConfigError(
        f"{where} names the class '{name}', which the guard lacks{nearest(name, class_names)}"
    )
