"""Ways to fool oneself with a detector, each as a check that catches it.

A check says in one sentence what it found; `require` makes an error of those that failed. The list
follows the field's critics (Carlini et al. 2019, arXiv 1902.06705), and one trap of photographs: they
were JPEGs, an attacked image saved losslessly no longer is one, and a detector may see just that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from itertools import combinations

import torch
from torch import Tensor

from defense.config import Probing
from defense.errors import DataError
from defense.memory import Memory, Nearness
from defense.offline.benchmark.metrics import (
    RESAMPLES,
    areas,
    auroc,
    flagged,
    interval,
    resampled,
    wilson,
)
from defense.offline.benchmark.sanity import Check
from defense.offline.benchmark.shifts import LEVELS, regridded

SURE = 0.999
"""Level of the interval of a null test: a sound study fails it once in a thousand runs."""
TWIN = 8 / 255
"""Root mean square difference per value up to which two images are taken for one: an attack's."""
SLACK = 3.0
"""How many times its target rate a control may be flagged: harmless changes are no exact copies."""
CHUNK = 512


def require(checks: Sequence[Check]) -> None:
    """Raise DataError with what the first failed check says, naming the others that failed."""
    failed = [check for check in checks if not check.passed]
    if failed:
        others = ", ".join(check.name for check in failed[1:])
        raise DataError(failed[0].says + (f" (failed as well: {others})" if others else ""))


def digests(images: Tensor) -> list[str]:
    """Name every image (N, C, H, W) in [0, 1] by its 8-bit content."""
    stored = (images.detach().cpu() * LEVELS).round().to(torch.uint8).contiguous()
    return [blake2b(image.numpy().tobytes(), digest_size=16).hexdigest() for image in stored]


def splits_apart(splits: Mapping[str, Sequence[str]], *, name: str = "splits apart") -> Check:
    """Check that no image is in two splits. splits: split name to the digests of its rows.

    A row of an attacked or otherwise changed image is named by the digest of the clean image that
    it was made of, so that twins count as one image.
    """
    for first, second in combinations(splits, 2):
        shared = set(splits[first]) & set(splits[second])
        if shared:
            digest = next(digest for digest in splits[first] if digest in shared)
            rows = [list(splits[split]).index(digest) for split in (first, second)]
            return Check(
                name,
                False,
                f"images in both '{first}' and '{second}': {len(shared)} (row {rows[0]} and row "
                f"{rows[1]} are one image); split by content before anything is fitted",
            )
    sizes = ", ".join(f"{len(rows)} in '{split}'" for split, rows in splits.items())
    return Check(name, True, f"no image is in two splits ({sizes})")


def threshold_unseen(calibration: Sequence[str], test: Sequence[str]) -> Check:
    """Check by the digests of its rows that the threshold was fixed on images not judged with it."""
    return splits_apart({"calibration": calibration, "test": test}, name="threshold unseen")


def twins_together(fit: Tensor, test: Tensor, *, within: float = TWIN) -> Check:
    """Check by their pixels that no image of the test is nearly one of the fit.

    fit, test: (N, C, H, W) and (M, C, H, W) in [0, 1], attacked or not. It needs no records: it finds
    an attacked image whose clean twin was fitted, and a near duplicate. within: root mean square
    difference per value, 8/255 as of a strong attack; flat pictures may be that near by chance.
    """
    near, row = _nearest(fit, test)
    count = int((near <= within).sum())
    if count:
        found = int(near.argmin())
        says = (
            f"images of the test within {within * LEVELS:.1f}/255 of one of the fit: {count} (row "
            f"{found} of the test and row {int(row[found])} of the fit: {near[found] * LEVELS:.1f}/255"
            "); keep an image and all that is made of it in one split"
        )
    else:
        closest = f"{float(near.min()) * LEVELS:.1f}/255" if len(near) else "nothing to compare"
        says = f"no image of the test is nearly one of the fit (the nearest: {closest})"
    return Check("twins together", count == 0, says)


def null_test(first: Tensor, second: Tensor, *, level: float = SURE, seed: int = 0) -> Check:
    """Check that clean images cannot be told from clean images.

    first, second: scores (N,) and (M,) of clean images, the second ones gone through everything that
    attacked images go through (saving, reading, batching) but the attack. The AUROC must be one
    half within its bootstrap interval.
    """
    first, second = first.double().cpu(), second.double().cpu()
    found = auroc(first, second)
    if found is None:
        return Check("null test", False, "the null test has no scores; give it two clean sets")
    times = [resampled(len(s), RESAMPLES * 4, seed=seed + i) for i, s in enumerate((first, second))]
    low, high = interval(areas(first, second, times[0], times[1]), level=level)
    passed = low <= 0.5 <= high
    says = f"clean against clean images give an AUROC of {found:.3f} ({low:.3f} to {high:.3f})"
    hint = "" if passed else "; expected one half, so find what else than the attack differs"
    return Check("null test", passed, says + hint)


def attack_works(
    name: str, images: Tensor, attacked: Tensor, won: Tensor, *, noise_won: Tensor | None = None
) -> Check:
    """Check that an attack changes images, and fools the network more often than chance.

    images, attacked: (N, C, H, W); won: (N,), whether the network gets the attacked image wrong;
    noise_won: the same for random noise of the attack's norm, which an attack must beat.
    """
    changed = float((attacked != images).flatten(1).any(dim=1).double().mean())
    success = float(won.double().mean())
    chance = 0.0 if noise_won is None else float(noise_won.double().mean())
    passed = changed > 0 and success > chance
    says = f"{name} changes {changed:.1%} of the images and fools the network on {success:.1%}"
    if noise_won is not None:
        says += f", noise of its norm on {chance:.1%}"
    hint = "" if passed else "; it is no attack, so leave it out or repair it"
    return Check(f"{name} works", passed, says + hint)


def near_target(
    flags: Mapping[str, Tensor], target: float, *, slack: float = SLACK, name: str = "controls"
) -> Check:
    """Check that controls are flagged about as often as clean images. flags: control to marks (N,).

    It fails where even the lower end of the 95 % interval of a rate is above `slack` times `target`.
    """
    counts = {control: (int(marks.sum()), len(marks)) for control, marks in flags.items()}
    loud = [
        control
        for control, (hits, count) in counts.items()
        if count and wilson(hits, count)[0] > slack * target
    ]
    rates = ", ".join(f"{c} {h / n:.1%}" for c, (h, n) in counts.items() if n)
    says = f"at a target rate of {target:.1%} harmless images are flagged: {rates}"
    hint = f"; the detector sees something else than attacks in: {', '.join(loud)}" if loud else ""
    return Check(name, not loud and bool(rates), says + hint if rates else "no control has a row")


def different_images_are_no_questions(
    nearness: Nearness, paths: Tensor, *, most: float = 0.001
) -> Check:
    """Check that a stream of different clean images is not taken for an attack by queries.

    paths: (N, D) of the images, as they come; the memory is that of the default settings.
    """
    memory, rule = Memory(nearness), Probing()
    asked = torch.cat([memory.see(part, rule) for part in paths.split(CHUNK)])
    share = float(asked.double().mean())
    return Check(
        "different images are no questions",
        share <= most,
        f"{int(asked.sum())} of {len(paths)} different clean images were taken for questions of an "
        f"attack; expected at most {most:.1%}",
    )


def grids_do_not_matter(
    score: Callable[[Tensor], Tensor],
    images: Tensor,
    calibration: Tensor,
    *,
    seed: int,
    target: float = 0.05,
    slack: float = SLACK,
) -> Check:
    """Check that a detector does not just see lost JPEG blocks.

    score: scores (N,) of pixels (N, C, H, W) in [0, 1]; images: clean ones of the test, once JPEGs;
    calibration: (M,) scores of other clean ones, as they were. See `shifts.regridded`.
    """
    flags: dict[str, Tensor] = {}
    for control, changed in regridded(images, seed=seed).items():
        marks = flagged(calibration, score(changed), target)
        if marks is None:
            raise DataError(
                f"{len(calibration)} calibration scores cannot fix a threshold at a target rate of "
                f"{target:g}; raise the rate or calibrate with more images"
            )
        flags[control] = marks
    return near_target(flags, target, slack=slack, name="JPEG grids")


def _nearest(fit: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Return the root mean square difference to the nearest image of the fit (M,), and its row."""
    if len(fit) == 0:
        return torch.full((len(test),), torch.inf), torch.zeros(len(test), dtype=torch.long)
    known = fit.detach().float().cpu().flatten(1)
    parts = [
        torch.cdist(part, known).min(dim=1)
        for part in test.detach().float().cpu().flatten(1).split(CHUNK)
    ]
    values = torch.cat([part.values for part in parts]) if parts else torch.zeros(0)
    rows = torch.cat([part.indices for part in parts]) if parts else torch.zeros(0).long()
    return values / known.shape[1] ** 0.5, rows
