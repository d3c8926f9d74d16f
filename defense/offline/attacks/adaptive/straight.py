"""Let gradients pass hard decisions: forward they stay exactly as hard as they were.

The straight-through estimator (Bengio et al., https://arxiv.org/abs/1308.3432), the backward pass
differentiable approximation of Athalye et al. (https://arxiv.org/abs/1802.00420) for gates. It sees
torch's functions as they are called, in this thread and inside the block only, so that a gate needs
not be known: controllers that came with an archive, routers that count outputs above a threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

COMPARISONS = {"gt": 1.0, "ge": 1.0, "lt": -1.0, "le": -1.0}
"""By the name of the function: whether a larger left side makes it truer."""
READINGS = ("to", "float", "double", "mean", "mul")
"""How decisions become numbers."""


@contextmanager
def straight_through(temperature: float | None) -> Iterator[None]:
    """Give comparisons, rounding and cutting off inside the block the slope of something soft.

    `x > y` gets that of a sigmoid of (x - y) / temperature, in deviations of each row of x - y;
    `round` and `clamp` to both sides that of the identity: a number past its bound would say nothing
    of the way back. A bound on one side is a rectifier and keeps its own. None changes nothing.
    """
    if temperature is None:
        yield
        return
    with _StraightThrough(temperature):
        yield


class _StraightThrough(TorchFunctionMode):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        # Weak: a decision is forgotten with the tensor that holds it.
        self.numbers = WeakTensorKeyDictionary()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in COMPARISONS and len(args) == 2 and isinstance(result, Tensor):
            self._compared(args[0], args[1], COMPARISONS[name], result)
        elif name in READINGS and isinstance(result, Tensor) and result.is_floating_point():
            known = [self._number(arg) for arg in args]
            if any(new is not old for new, old in zip(known, args, strict=True)):
                return func(*known, **(kwargs or {}))
        elif _is_cut(name, args, kwargs or {}) and args[0].requires_grad:
            return result.detach() + (args[0] - args[0].detach())
        return result

    def _compared(self, left: Any, right: Any, sign: float, decision: Tensor) -> None:
        """Remember the number, 0 or 1 and with a slope, that stands for a decision (N, ...)."""
        apart = sign * (left - right)
        if not apart.requires_grad or apart.dim() < 2 or apart.shape != decision.shape:
            return
        spread = apart.detach().flatten(1).std(1, correction=0).clamp_min(1e-12)
        scale = self.temperature * spread.view(-1, *[1] * (apart.dim() - 1))
        soft = torch.sigmoid(apart / scale)
        self.numbers[decision] = decision.to(soft.dtype) + (soft - soft.detach())

    def _number(self, value: Any) -> Any:
        """Return the number that stands for `value` if it is a decision, else `value`."""
        if isinstance(value, Tensor) and value.dtype == torch.bool:
            return self.numbers.get(value, value)
        return value


def _is_cut(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Say whether a call rounds a tensor, or cuts it off on both sides."""
    if name not in ("round", "clamp") or not isinstance(args[0], Tensor):
        return False
    bounds = [*args[1:], *kwargs.values()]
    return name == "round" or (len(bounds) == 2 and all(bound is not None for bound in bounds))
