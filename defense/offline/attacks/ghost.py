"""Transfer from networks that are another one at every step (Ghost Networks, AAAI 2020).

Li et al., https://arxiv.org/abs/1812.03413: an eroded network errs almost as the whole one does, so a
fresh erosion at every step of an iterative attack is an ensemble at the price of one network. Residual
networks have their shortcuts scaled by w ~ U(1 - L, 1 + L), drawn per channel as in the authors' code;
others get dropout. The attack never looks at the model under attack.

What is a shortcut is read off the pass itself, from the functions of torch that run in it: where two
feature maps (N, C, H, W) of one shape are added, in place or not, and one of them comes from the image
through fewer convolutions and linear layers, it is that one. This finds shortcuts that are modules,
projections and plain variables alike. It finds none that is joined by `torch.cat` or `torch.stack`, or
that lies inside a scripted or compiled module, and it leaves tokens (N, T, C) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from defense.errors import ConfigError
from defense.offline.attacks.attack import Attack, frozen
from defense.sites import device_of

STEPS = 10
STEPS_TO_EDGE = 8
"""Steps of one direction that reach the ball's edge: 1/255 each of 8/255, as published."""
WEIGHTED = ("conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear")


@dataclass(frozen=True)
class Erosion:
    """How much of a network is worn away: the authors' values for ResNet-50 and Inception-v4.

    skip: L of the factors of shortcuts, in [0, 1). dropout: share of the values of every convolution's
    output that are dropped, in [0, 1), in networks without shortcuts.
    """

    skip: float = 0.22
    dropout: float = 0.012

    def __post_init__(self) -> None:
        for name, value in (("skip", self.skip), ("dropout", self.dropout)):
            if not 0 <= value < 1:
                raise ConfigError(f"an erosion's {name} must lie in [0, 1), got {value}")


class Ghost(TorchFunctionMode):
    """While entered, passes of `x` (N, C, H, W) through a network are those of one ghost of it.

    Nothing is attached to the network. skip, dropout: as of an `Erosion`; 0 erodes nothing there.
    shortcuts, maps: how many shortcuts and convolutions' outputs were met.
    """

    def __init__(self, x: Tensor, *, skip: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.skip, self.dropout = skip, dropout
        self.shortcuts, self.maps = 0, 0
        self._depth = WeakTensorKeyDictionary({x: 0})

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func`, eroded where it is a residual addition or a convolution."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        depths = [self._depth[value] for value in tensors((args, kwargs)) if value in self._depth]
        if name in ("add", "add_"):
            args = self._eroded(args, in_place=name == "add_")
        result = func(*args, **kwargs)
        if not depths:
            return result
        if name in WEIGHTED and result.dim() == 4:
            self.maps += 1
            result = functional.dropout(result, self.dropout) if self.dropout else result
        for value in tensors(result):
            self._depth[value] = max(depths) + (name in WEIGHTED)
        return result

    def _eroded(self, args: tuple[Any, ...], *, in_place: bool) -> tuple[Any, ...]:
        """Return an addition's arguments, the shortcut among them scaled; otherwise as they are."""
        known = [isinstance(value, Tensor) and value in self._depth for value in args]
        if known != [True, True] or args[0].dim() != 4 or args[0].shape != args[1].shape:
            return args
        first, second = (self._depth[value] for value in args)
        if first == second:
            return args
        self.shortcuts += 1
        if not self.skip:
            return args
        channels = torch.rand(1, args[0].shape[1], 1, 1).to(args[0])
        factor = 1 + self.skip * (2 * channels - 1)
        if first > second:
            return args[0], args[1] * factor
        return args[0].mul_(factor) if in_place else args[0] * factor, args[1]


def tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors in (nested tuples, lists and dicts of) a function's arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def ghost_attack(
    surrogates: Sequence[nn.Module],
    *,
    eps: float = 8 / 255,
    erosion: Erosion | None = None,
    momentum: float = 1.0,
) -> Attack:
    """Return the untargeted attack on the mean logits of ghosts of `surrogates`.

    surrogates: of pixels in [0, 1], with the same classes, all on one device; for a black-box attack,
    none that the guard's owner has trained. momentum: 1 is MI-FGSM, 0 is I-FGSM.
    """
    if not surrogates:
        raise ConfigError("the ghost attack needs at least one surrogate, got none; train one")
    chosen = erosion or Erosion()

    def attack(images: Tensor, labels: Tensor) -> Tensor:
        device = device_of(surrogates[0])
        images, labels = images.to(device), labels.to(device)
        with ExitStack() as stack:
            for surrogate in surrogates:
                stack.enter_context(frozen(surrogate))
            wear = [worn(surrogate, images[:1], chosen) for surrogate in surrogates]
            x, going = images, torch.zeros_like(images)
            for _ in range(STEPS):
                gradient = joint_gradient(surrogates, wear, x, labels)
                size = gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-12)
                going = momentum * going + gradient / size
                x = x + eps / STEPS_TO_EDGE * going.sign()
                x = x.clamp(images - eps, images + eps).clamp(0, 1)
        return x

    return Attack(f"ghost_{eps * 255:g}", eps, lambda _model: attack, family="ghost")


def worn(surrogate: nn.Module, image: Tensor, erosion: Erosion) -> dict[str, float]:
    """Return what a `Ghost` of this surrogate erodes: its shortcuts, or without any its maps.

    image: (1, C, H, W). Raises ConfigError where there is neither.
    """
    with torch.no_grad(), Ghost(image) as found:
        surrogate(image)
    if found.shortcuts:
        return {"skip": erosion.skip}
    if found.maps:
        return {"dropout": erosion.dropout}
    raise ConfigError(
        f"nothing to erode in {type(surrogate).__name__}: no shortcut and no convolution was met in "
        "its pass; give the ghost attack another surrogate"
    )


def joint_gradient(
    surrogates: Sequence[nn.Module], wear: Sequence[dict[str, float]], x: Tensor, labels: Tensor
) -> Tensor:
    """Return the gradient (N, C, H, W) of the cross-entropy of fresh ghosts' mean logits."""
    x = x.detach().requires_grad_()
    answers = []
    for surrogate, kind in zip(surrogates, wear, strict=True):
        with Ghost(x, **kind):
            answers.append(surrogate(x))
    loss = functional.cross_entropy(torch.stack(answers).mean(0), labels, reduction="sum")
    return torch.autograd.grad(loss, x)[0]
