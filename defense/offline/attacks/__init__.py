"""Attacks as values with one call, for testing one's own models. One row in the table each.

All work on pixels in [0, 1] and end in 8-bit steps, because that is what a client can send.
"""

from defense.offline.attacks.attack import Attack, AttackFunction, eight_bit, uniform_noise
from defense.offline.attacks.library import ATTACKS, make_attack

__all__ = ["ATTACKS", "Attack", "AttackFunction", "eight_bit", "make_attack", "uniform_noise"]
