"""`distillation`: distillation guided routing, the critical data routing path of each image.

Wang, Su, Zhang and Hu, "Interpret Neural Networks by Identifying Critical Data Routing Paths", CVPR
2018, https://openaccess.thecvf.com/content_cvpr_2018/html/Wang_Interpret_Neural_Networks_CVPR_2018_paper.html:
one gate per channel, learnt for one image at a time so that the gated network still answers as the
network itself does while the gates are few and small. Objective and constants are those of the
authors' released detector; its clamp differs from network to network (5 or 100), and 10, that of a
later port and of the paper as remembered, is a reconstruction.

The released detector shares an optimiser between the clean and the attacked pass of an image, and
the momentum that the first leaves behind gives the second away. Here every pass has its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD

from defense.errors import ConfigError
from defense.routers.gating import gated
from defense.routers.recipes import Observing, Unlearnt
from defense.sites import first_tensor
from defense.types import PathLayout, Routed, Site


@dataclass(frozen=True)
class DistillationRecipe(Observing, Unlearnt["DistillationRouter"]):
    """Hyper-parameters of the search for gates; nothing is learnt beyond the sites.

    The authors gate blocks alone where a network has them, and the input of the rectifier where it has
    none. The same gates give the same answer there, but a gate that has reached 0 feels no gradient
    any more; behind it, as here, it may open again.

    A gate that nothing depends on falls from 1 to exactly 0 in 29 steps of the defaults, so that the
    30th and last gates that are looked at are the first to tell such channels apart.
    """

    iterations: int = 30
    """How many gates are looked at, from all ones on: one step fewer is taken."""
    learning_rate: float = 0.1
    momentum: float = 0.9
    gamma: float = 0.05
    """Weight of the sum of all gates; that sum grows with the number of channels."""
    ceiling: float = 10.0
    """Gates stay in [0, ceiling]."""
    patience: int = 0
    """Give an image up after so many steps without a lower loss; 0 never does.

    No exact criterion for stopping exists, because a later step may always find a lower loss: with
    patience a path may differ from the one that the full search finds.
    """

    def __post_init__(self) -> None:
        """Refuse numbers that no search can follow."""
        expected = {
            "iterations": (self.iterations >= 1, "at least 1"),
            "learning_rate": (0 < self.learning_rate < inf, "above 0"),
            "momentum": (0 <= self.momentum < 1, "at least 0 and below 1"),
            "gamma": (0 <= self.gamma < inf, "at least 0"),
            "ceiling": (1 <= self.ceiling < inf, "at least 1, where gates start"),
            "patience": (self.patience >= 0, "at least 0"),
        }
        for name, (holds, allowed) in expected.items():
            if not holds:
                raise ConfigError(
                    f"{name} of the router 'distillation' must be {allowed}, got "
                    f"{getattr(self, name)}; its default is {getattr(type(self), name)}"
                )

    def router(self, sites: tuple[Site, ...]) -> DistillationRouter:
        """Nothing is learnt."""
        return DistillationRouter(PathLayout(sites, ("gate",)), self)


@dataclass(frozen=True)
class DistillationRouter:
    """The gate of every channel, in [0, ceiling], found anew for each image."""

    name: ClassVar[str] = "distillation"
    one_forward: ClassVar[bool] = False

    layout: PathLayout
    recipe: DistillationRecipe

    def route(self, model: nn.Module, inputs: Tensor) -> Routed:
        """Return logits (N, K) of the bare network and the chosen gates (N, D)."""
        found = distil(model, self.layout.sites, inputs, self.recipe)
        return Routed(found.logits, found.gates)


@dataclass(frozen=True)
class Distilled:
    """What the search found for N images.

    logits: (N, K) of the network without gates. gates: (N, D) float32, site after site.
    iteration: (N,) which gates were chosen, 0 for all ones. cross_entropy: (N,) in nats, of the gated
    answer against the network's own. loss: (N,) with the gates' share.
    """

    logits: Tensor
    gates: Tensor
    iteration: Tensor
    cross_entropy: Tensor
    loss: Tensor

    @property
    def total(self) -> Tensor:
        """(N,) sum of an image's gates."""
        return self.gates.sum(dim=1)


def distil(
    model: nn.Module, sites: tuple[Site, ...], inputs: Tensor, recipe: DistillationRecipe
) -> Distilled:
    """Find the gates of backbone inputs (N, ...), each row by itself.

    Minimises cross-entropy to the network's own distribution plus gamma times the sum of gates;
    chosen are the gates of lowest loss among those that keep the predicted class. Where gates move
    the logits by tens, the search amplifies rounding: gates of a batch then differ from those of one
    image by more than float tolerance, as they do when pixels change by 1e-7.
    """
    layout = PathLayout(sites, ("gate",))
    # The caller may be in inference mode, whose tensors take no part in gradients.
    with torch.inference_mode(False), torch.enable_grad():
        inputs = inputs.clone()
        with torch.no_grad():
            bare = _logits(model, inputs)
        gates = torch.ones(len(inputs), layout.length, device=inputs.device, requires_grad=True)
        optimiser = SGD([gates], lr=recipe.learning_rate, momentum=recipe.momentum)
        best = _assess(bare, bare, gates, 0, recipe.gamma)[0]
        for iteration in range(recipe.iterations):
            with gated(model, sites, [gates[:, columns] for columns in layout.columns]):
                answer = _logits(model, inputs)
            found, loss = _assess(bare, answer, gates, iteration, recipe.gamma)
            better = (found.loss < best.loss) & (answer.argmax(1) == bare.argmax(1))
            if recipe.patience:
                searched = iteration - best.iteration <= recipe.patience
                if not searched.any():
                    break
                better &= searched
            best = _choose(better, found, best)
            (gates.grad,) = torch.autograd.grad(loss, [gates])
            optimiser.step()
            with torch.no_grad():
                gates.clamp_(0, recipe.ceiling)
    return best


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    return cast(Tensor, first_tensor(model(inputs)))


def _assess(
    bare: Tensor, answer: Tensor, gates: Tensor, iteration: int, gamma: float
) -> tuple[Distilled, Tensor]:
    """Return a record of `gates` (N, D), which made the network `answer`, and the loss of all rows.

    The loss is a sum over rows, so that no row's gradient depends on another.
    """
    target = bare.float().softmax(1)
    cross_entropy = -(target * answer.float().log_softmax(1)).sum(1)
    # As published: the derivative of |gate| at 0 is 0, where that of the gate would be 1.
    loss = cross_entropy + gamma * gates.abs().sum(1)
    numbers = torch.full_like(loss, iteration, dtype=torch.long)
    kept = gates.detach().clone()
    return Distilled(bare, kept, numbers, cross_entropy.detach(), loss.detach()), loss.sum()


def _choose(rows: Tensor, first: Distilled, second: Distilled) -> Distilled:
    """Return `first` in the given rows (N,), a boolean mask, and `second` in the others."""
    return Distilled(
        first.logits,
        torch.where(rows[:, None], first.gates, second.gates),
        torch.where(rows, first.iteration, second.iteration),
        torch.where(rows, first.cross_entropy, second.cross_entropy),
        torch.where(rows, first.loss, second.loss),
    )
