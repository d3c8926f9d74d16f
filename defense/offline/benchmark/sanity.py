"""Checks that an attack is one: numbers that fail them say something of the attack, not of the guard.

Most are those of Carlini et al. (https://arxiv.org/abs/1902.06705) and of Athalye et al.
(https://arxiv.org/abs/1802.00420). `won`, everywhere: (N,) of booleans, whether the attack on an
image got what it wanted, the images in the same order everywhere. Shares are in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from defense.errors import DataError

KNOWN_BEST = ((0.0, 0.995, 0.005), (8 / 255, 0.74, 0.01))
"""Radius (L-infinity), best published robust accuracy on CIFAR-10, and how sure we are of it.

The second is the order of RobustBench's first places under AutoAttack; the first is clean accuracy.
"""
INTERPOLATED = 0.05
"""How sure we are of what lies between the known radii: a guess."""


@dataclass(frozen=True)
class Check:
    """One check: whether it passed, and the numbers that decided it in a sentence."""

    name: str
    passed: bool
    says: str


def large_change_succeeds(won: Tensor, *, least: float = 0.99) -> Check:
    """Pass where an attack with a bound that any network yields to turns nearly all images."""
    share = _share(won)
    return Check(
        "a large change succeeds",
        share >= least,
        f"{share:.1%} of {len(won)} images are turned; expected at least {least:.0%}",
    )


def grows(
    what: str,
    sizes: Sequence[float],
    won: Sequence[Tensor],
    *,
    slack: float = 0.02,
    ceiling: float = 0.98,
) -> Check:
    """Pass where success grows with `sizes`, the values of `what` (eps or steps) in rising order.

    It may fall by `slack` between neighbours, for chance; and it must rise by more than that from
    the first to the last size, unless it begins above `ceiling`: an attack that ignores its size
    does not.
    """
    if len(sizes) != len(won) or len(sizes) < 2 or list(sizes) != sorted(sizes):
        raise DataError(
            f"success by {what} needs one row per size and at least two sizes in rising order, "
            f"not {len(won)} rows for {list(sizes)}; give one row of successes per size"
        )
    shares = [_share(row) for row in won]
    steady = all(later >= earlier - slack for earlier, later in pairwise(shares))
    rises = shares[-1] > shares[0] + slack or shares[0] >= ceiling
    listed = ", ".join(f"{s:g}: {share:.1%}" for s, share in zip(sizes, shares, strict=True))
    return Check(f"success grows with {what}", steady and rises, f"success by {what} is {listed}")


def restarts_never_worse(fewer: Tensor, more: Tensor) -> Check:
    """Pass where every image that falls with fewer restarts falls with more of them."""
    _same_images(fewer, more)
    lost = int((fewer.bool() & ~more.bool()).sum())
    return Check(
        "more restarts are never worse",
        lost == 0,
        f"{lost} of {len(more)} images fall with fewer restarts alone",
    )


def white_box_wins(white: Tensor, black: Tensor, *, slack: float = 0.01) -> Check:
    """Pass where the attack with gradients succeeds at least as often as the one without.

    The contrary is the sign of masked gradients.
    """
    _same_images(white, black)
    seeing, blind = _share(white), _share(black)
    return Check(
        "the white box is as strong as the black box",
        seeing >= blind - slack,
        f"{seeing:.1%} fall to the white box, {blind:.1%} to the black box",
    )


def knowing_wins(adaptive: Sequence[Tensor], unaware: Tensor) -> Check:
    """Pass where attacks that know the guard get through as often as the one that does not.

    adaptive: `won` of every adaptive attack of the same eps; an image falls if it falls to one.
    """
    if not adaptive:
        raise DataError(
            "there are no adaptive attacks to compare with the unaware one; give at least one"
        )
    _same_images(unaware, *adaptive)
    knowing = _share(torch.stack([row.bool() for row in adaptive]).any(0))
    blind = _share(unaware)
    return Check(
        "who knows more gets through more",
        knowing >= blind,
        f"{knowing:.1%} get past the guard knowing it, {blind:.1%} unaware of it",
    )


def does_something(images: Tensor, attacked: Tensor, won: Tensor, *, clean_errors: float) -> Check:
    """Pass where an attack changes images and succeeds more often than doing nothing would.

    images, attacked: (N, C, H, W) in [0, 1]. clean_errors: share of the same images that go wrong
    without an attack; success must lie above it by two standard errors.
    """
    _same_images(images, attacked, won)
    change = float((attacked - images).abs().mean())
    share, count = _share(won), len(won)
    noise = 2 * max(clean_errors * (1 - clean_errors) / count, 1 / count**2) ** 0.5
    return Check(
        "the attack does something",
        change > 0 and share > clean_errors + noise,
        f"pixels change by {change * 255:.3f} of 255 on average, {share:.1%} go wrong, "
        f"{clean_errors:.1%} without an attack",
    )


def gradient_reaches(
    score: Callable[[Tensor], Tensor], images: Tensor, *, least: float = 0.99
) -> Check:
    """Pass where the gradient of a score reaches the images: finite and not zero on more than `least`.

    score: of images (N, C, H, W) to (N,), each from its own image.
    """
    x = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        total = score(x).sum()
        found = torch.autograd.grad(total, x, allow_unused=True)[0] if total.requires_grad else None
    slope = torch.zeros_like(x) if found is None else found
    flat = slope.flatten(1)
    share = _share(flat.isfinite().all(1) & (flat != 0).any(1))
    return Check(
        "the score has a gradient",
        share > least,
        f"{share:.1%} of {len(images)} images have a gradient; expected more than {least:.0%}",
    )


def settles(losses: Tensor, *, last: float = 0.25, rest: float = 0.1) -> Check:
    """Pass where what an attack climbs has been climbed: the curve rises and flattens at its end.

    losses: (S,) or (S, N), what the attack maximises, after every step. The last `last` of the steps
    must add less than `rest` of the whole rise.
    """
    curve = losses.double().reshape(len(losses), -1).mean(1)
    rise = float(curve.max() - curve[0])
    tail = min(int(len(curve) * (1 - last)), len(curve) - 1)
    added = float(curve.max() - curve[: tail + 1].max())
    return Check(
        "the loss settles",
        rise > 0 and added <= rest * rise,
        f"the loss rises by {rise:.4g}, of which {added:.4g} in the last {last:.0%} of the steps",
    )


def known_best(radius: float) -> tuple[float, float]:
    """Return the best known robust accuracy on CIFAR-10 at an L-infinity radius, and its uncertainty.

    Published values stand in `KNOWN_BEST`. Between them it is a straight line, an estimate and no
    bound; beyond the last, the last, which is a bound because accuracy falls with the radius.
    """
    (start, clean, sure), (end, robust, robust_sure) = KNOWN_BEST
    if radius <= start:
        return clean, sure
    if radius >= end:
        return robust, robust_sure
    return clean + (robust - clean) * (radius - start) / (end - start), INTERPOLATED


def claim_is_plausible(accuracy: float, eps: float) -> Check:
    """Pass where a claim of robust detection would not be a breakthrough in robust classification.

    accuracy: share of CIFAR-10 images that are answered right when clean and, attacked within eps
    (L-infinity, in [0, 1]), are either answered right or detected. By Tramer
    (https://arxiv.org/abs/2107.11630), who detects robustly at eps can classify robustly at eps / 2
    with the same error, if at great cost. So a claim far above the best known at eps / 2 says first
    of all that the attack was weak. A claim that passes is not proved by it.
    """
    best, unsure = known_best(eps / 2)
    return Check(
        "the claim of detection is plausible",
        accuracy <= best + unsure,
        f"{accuracy:.1%} is claimed at {eps * 255:g}/255; the best known at "
        f"{eps * 127.5:g}/255 is about {best:.1%} (+/- {unsure:.1%})",
    )


def _share(won: Tensor) -> float:
    if won.numel() == 0:
        raise DataError("there are no attacked images to check an attack by; give at least one")
    return float(won.double().mean())


def _same_images(*rows: Tensor) -> None:
    if len({len(row) for row in rows}) > 1:
        raise DataError(
            f"attacks are compared on different numbers of images, {[len(row) for row in rows]}; "
            "give the same images to each"
        )
