"""Attacks that know the backbone, the guard and its threshold, for testing one's own guard.

What holds against these holds against much; report the worst case over all of them per image. The
defaults suit a few hundred small images within minutes on a CPU (`passes` says how many passes each
takes); a published claim of robustness takes far more steps and restarts.
"""

from __future__ import annotations

from defense.offline.attacks.adaptive.bank import Bank, make_bank
from defense.offline.attacks.adaptive.joint import Joint
from defense.offline.attacks.adaptive.matching import Mimic, PathMatching
from defense.offline.attacks.adaptive.projected import Bare, Orthogonal, Selective
from defense.offline.attacks.adaptive.search import AdaptiveAttack, Attacked, worst_case
from defense.offline.attacks.adaptive.whitebox import Glance, OpenGuard, WhiteBox, open_guard

ADAPTIVE: dict[str, AdaptiveAttack] = {
    attack.name: attack for attack in (Joint(), Selective(), Orthogonal(), PathMatching(), Mimic())
}
BARE = Bare()
"""The attacker who knows nothing of a guard, for comparison."""

__all__ = [
    "ADAPTIVE",
    "BARE",
    "AdaptiveAttack",
    "Attacked",
    "Bank",
    "Glance",
    "OpenGuard",
    "WhiteBox",
    "make_bank",
    "open_guard",
    "worst_case",
]
