"""What the adaptive attacks share: steps in the ball, restarts, and the best image so far.

An attack moves in the L-infinity ball freely and looks only at what a client could send: the same
images rounded to 8 bits. So whatever it finds has been seen to work after rounding, at no extra pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from defense.errors import ConfigError, DataError
from defense.offline.attacks import eight_bit
from defense.offline.attacks.adaptive.bank import Bank
from defense.offline.attacks.adaptive.whitebox import Glance, WhiteBox
from defense.offline.progress import Progress, Silent

CONFIDENCE = 0.05
"""By how much the wrong logit has to lead before an attack cares for nothing but the score."""
STRIDE = 0.5
"""The first step, of eps; steps shrink evenly to a tenth of it."""
ANY = -1
"""A target that stands for whichever wrong class comes first."""


@dataclass(frozen=True)
class Attacked:
    """What an attack made of N images, on the CPU.

    pixels: (N, C, H, W), 8-bit steps of [0, 1] inside the ball. fooled: (N,) bool, the answer is not
    the label. score: (N,) float64, the guard's. Both are of these pixels, run once more.
    """

    pixels: Tensor
    fooled: Tensor
    score: Tensor

    def __len__(self) -> int:
        return self.pixels.shape[0]


def worst_case(attacked: Sequence[Attacked]) -> Attacked:
    """Return per image the result that fools with the lowest score; DataError where there is none.

    All must be of the same images in the same order, against the same guard. An image that nothing
    fools keeps its first result.
    """
    if not attacked or len({part.pixels.shape for part in attacked}) > 1:
        shapes = [tuple(part.pixels.shape) for part in attacked]
        raise DataError(
            f"the worst case over attacks of shapes {shapes} is not defined; give at least one "
            "attack, and all of the same images"
        )
    fooled = torch.stack([part.fooled for part in attacked])
    score = torch.stack([part.score for part in attacked])
    pick = torch.where(fooled, score, torch.inf).argmin(dim=0)
    rows = torch.arange(len(attacked[0]))
    pixels = torch.stack([part.pixels for part in attacked])
    return Attacked(pixels[pick, rows], fooled[pick, rows], score[pick, rows])


@dataclass(frozen=True)
class Case:
    """A batch under attack. pixels: (N, C, H, W); labels: (N,); rivals: (N, K - 1) wrong classes,
    the likeliest first. limit: a fooling image of at most this score is left alone; None: none is.
    """

    whitebox: WhiteBox
    pixels: Tensor
    labels: Tensor
    rivals: Tensor
    eps: float
    threshold: float
    limit: float | None
    bank: Bank | None

    def target(self, restart: int) -> Tensor:
        """Return the class (N,) that a restart goes for: any at first, then the likeliest, and so on."""
        if restart == 0:
            return torch.full_like(self.labels, ANY)
        return self.rivals[:, (restart - 1) % self.rivals.shape[1]]

    def start(self, restart: int, draw: torch.Generator) -> Tensor:
        """Return where a restart begins: at the images, later anywhere in the ball."""
        if restart == 0:
            return self.pixels
        noise = (torch.rand(self.pixels.shape, generator=draw) * 2 - 1) * self.eps
        return (self.pixels + noise.to(self.pixels.device)).clamp(0, 1)


class Best:
    """The best image found for each of N so far, and which of them need no more."""

    def __init__(self, case: Case) -> None:
        count, device = len(case.pixels), case.pixels.device
        self.pixels = eight_bit(case.pixels, case.pixels, case.eps)
        self.fooled = torch.zeros(count, dtype=torch.bool, device=device)
        self.value = torch.full((count,), torch.inf, dtype=torch.float64, device=device)
        self.done = torch.zeros_like(self.fooled)

    def offer(self, rows: Tensor, pixels: Tensor, fooled: Tensor, value: Tensor) -> None:
        """Take images of `rows` that are better: fooling before not fooling, then of lower value."""
        held = self.fooled[rows]
        better = (fooled & ~held) | ((fooled == held) & (value < self.value[rows]))
        chosen = rows[better]
        self.pixels[chosen] = pixels[better]
        self.fooled[chosen] = fooled[better]
        self.value[chosen] = value[better]

    def join(self, other: Best) -> None:
        """Take what is better in `other`, of the same images."""
        rows = torch.arange(len(self.pixels), device=self.pixels.device)
        self.offer(rows, other.pixels, other.fooled, other.value)
        self.done |= other.done


class Pursuit(Protocol):
    """What an attack wants of a look at some `rows` of its batch."""

    def uphill(self, glance: Glance, sent: Tensor, rows: Tensor) -> Tensor:
        """Return the direction to go, of the shape of `sent`; a step goes along its sign."""
        ...

    def value(self, glance: Glance, rows: Tensor) -> Tensor:
        """Return (n,): of two images that fool, the one with the lower value is kept."""
        ...


def pursue(case: Case, pursuit: Pursuit, best: Best, start: Tensor, steps: int) -> None:
    """Go `steps` steps from `start` (N, C, H, W): steps + 1 forward passes."""
    rows = (~best.done).nonzero().flatten()
    x = start[rows]
    for number in range(steps + 1):
        if len(rows) == 0:
            return
        moves = number < steps
        sent = eight_bit(x, case.pixels[rows], case.eps).requires_grad_(moves)
        with torch.set_grad_enabled(moves):
            glance = case.whitebox(sent)
        _judge(case, pursuit, best, glance, sent.detach(), rows)
        if moves:
            stride = STRIDE * case.eps * (1 - 0.9 * number / steps)
            ahead = x + stride * pursuit.uphill(glance, sent, rows).sign()
            centre, left = case.pixels[rows], ~best.done[rows]
            x = ahead.clamp(centre - case.eps, centre + case.eps).clamp(0, 1)[left]
            rows = rows[left]


@torch.no_grad()
def _judge(
    case: Case, pursuit: Pursuit, best: Best, glance: Glance, sent: Tensor, rows: Tensor
) -> None:
    labels = case.labels[rows]
    fooled = glance.logits.argmax(1) != labels
    missing = -margin(glance.logits, labels, torch.full_like(labels, ANY))
    value = torch.where(fooled, pursuit.value(glance, rows).double(), missing.double())
    best.offer(rows, sent, fooled, value)
    if case.limit is not None:
        best.done[rows] |= fooled & (glance.score <= case.limit)


def margin(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Return (N,) by how much the target's logit leads all others; for ANY, a wrong one the label's.

    Logits, not probabilities: where softmax saturates its gradient is lost.
    """
    any_class = target == ANY
    named = torch.where(any_class, labels, target)[:, None]
    own = logits.gather(1, named).squeeze(1)
    others = logits.scatter(1, named, -torch.inf).amax(1)
    return torch.where(any_class, others - own, own - others)


def gradient(value: Tensor, sent: Tensor, *, again: bool = False) -> Tensor:
    """Return the gradient of every image's own value (N,); zero where nothing connects the two.

    again: whether the graph is needed once more.
    """
    if not value.requires_grad:
        return torch.zeros_like(sent)
    found = torch.autograd.grad(value.sum(), sent, retain_graph=again, allow_unused=True)[0]
    return torch.zeros_like(sent) if found is None else torch.nan_to_num(found)


@dataclass(frozen=True, kw_only=True)
class AdaptiveAttack(ABC):
    """An attack that knows everything, for testing one's own guard: hyper-parameters, and one call.

    More restarts never make it worse: each adds to what those before have found. spare: an image
    that fools with a score at least this far below the threshold is left alone, which saves time;
    None looks for ever lower scores. batch: images at once.
    """

    name: ClassVar[str]

    steps: int = 50
    restarts: int = 3
    batch: int = 100
    spare: float | None = None

    def __post_init__(self) -> None:
        for field in ("steps", "restarts", "batch"):
            if getattr(self, field) < 1:
                raise ConfigError(
                    f"{field} of the attack '{self.name}' is {getattr(self, field)}; give at least 1"
                )

    @property
    def passes(self) -> tuple[int, int]:
        """Forward and backward passes per image at most, but for one look before and one after."""
        return self.restarts * (self.steps + 1), self.restarts * self.steps

    @abstractmethod
    def attempt(self, case: Case, best: Best, restart: int, draw: torch.Generator) -> None:
        """Improve `best` by one more restart."""

    def run(
        self,
        whitebox: WhiteBox,
        pixels: Tensor,
        labels: Tensor,
        *,
        eps: float,
        threshold: float,
        bank: Bank | None = None,
        seed: int,
        progress: Progress | None = None,
    ) -> Attacked:
        """Attack images (N, C, H, W) in [0, 1] of labels (N,) within eps in [0, 1].

        threshold: the score at which the guard speaks up. bank: clean images for the attacks that
        imitate them. progress: is told of every image that is done. The same seed and images give
        the same result. Raises DataError where images, labels or bank are not usable.
        """
        self._check(pixels, labels, eps)
        parts = []
        with torch.inference_mode(False), torch.enable_grad():
            batches = zip(pixels.split(self.batch), labels.split(self.batch), strict=True)
            for number, (x, y) in enumerate(batches):
                case = self._case(whitebox, x.clone(), y.clone(), eps, threshold, bank)
                best = Best(case)
                for restart in range(self.restarts):
                    draw = torch.Generator().manual_seed(hash((seed, number, restart)) % 2**63)
                    self.attempt(case, best, restart, draw)
                parts.append(_looked_at(case, best.pixels))
                (progress or Silent()).advance(len(x))
        columns = (
            [getattr(part, name) for part in parts] for name in ("pixels", "fooled", "score")
        )
        return Attacked(*(torch.cat(column) for column in columns))

    def _check(self, pixels: Tensor, labels: Tensor, eps: float) -> None:
        if not 0 <= eps <= 1:
            raise ConfigError(
                f"eps of the attack '{self.name}' is {eps}; give it in units of the whole range of a "
                "pixel, from 0 to 1, such as 4/255"
            )
        if len(pixels) == 0 or labels.shape != pixels.shape[:1]:
            raise DataError(
                f"the attack '{self.name}' got images of shape {tuple(pixels.shape)} and labels of "
                f"shape {tuple(labels.shape)}; give at least one image, and a label for each"
            )

    def _case(
        self,
        whitebox: WhiteBox,
        pixels: Tensor,
        labels: Tensor,
        eps: float,
        threshold: float,
        bank: Bank | None,
    ) -> Case:
        """Look at the images once, and move all to where the white box computes."""
        with torch.no_grad():
            glance = whitebox(pixels)
        device = glance.logits.device
        labels = labels.to(device)
        limit = None if self.spare is None else threshold - self.spare
        return Case(
            whitebox,
            pixels.to(device),
            labels,
            _rivals(glance, labels),
            eps,
            threshold,
            limit,
            None if bank is None else bank.to(device),
        )


def _rivals(glance: Glance, labels: Tensor) -> Tensor:
    """Return the wrong classes (N, K - 1), those first that backbone and witness both lean to."""
    likely = glance.logits.log_softmax(1)
    if glance.witness is not None:
        likely = likely + glance.witness.log_softmax(1)
    order = likely.scatter(1, labels[:, None], -torch.inf).argsort(dim=1, descending=True)
    return order[:, :-1]


@torch.no_grad()
def _looked_at(case: Case, pixels: Tensor) -> Attacked:
    glance = case.whitebox(pixels)
    fooled = glance.logits.argmax(1) != case.labels
    return Attacked(pixels.cpu(), fooled.cpu(), glance.score.double().cpu())
