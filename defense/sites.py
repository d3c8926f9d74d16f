"""Find the places of a network that are worth observing, from one traced forward pass.

No network is known by name: the rule looks at what the modules are and at what they returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defense.errors import SiteError, nearest
from defense.graphs import class_of, make_observable
from defense.types import Site

_ACTIVATION_NAMES = """
    ReLU ReLU6 LeakyReLU PReLU RReLU ELU CELU SELU GELU SiLU Mish Hardswish Softplus Softsign
    Sigmoid Tanh Hardtanh Hardsigmoid LogSigmoid Softshrink Hardshrink Tanhshrink Threshold
"""
ACTIVATIONS = tuple(getattr(nn, name) for name in _ACTIVATION_NAMES.split())
MAPS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.GroupNorm,
)
TOKENS = (nn.Linear, nn.LayerNorm, nn.MultiheadAttention)
UNSETTLED = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.RReLU)
"""What answers by its batch or by chance while it is in training mode."""


@dataclass(frozen=True)
class Call:
    """One call of one module in the traced pass; `mixer` is the last weighted layer before."""

    name: str
    module: nn.Module
    index: int
    output: Tensor
    mixer: nn.Module | None


def first_tensor(output: object) -> Tensor | None:
    """Return the tensor of a module's output: itself, its `.logits`, or the first of a tuple."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    output = getattr(output, "logits", output)
    return output if isinstance(output, Tensor) else None


def device_of(model: nn.Module) -> torch.device:
    """Return where the weights of `model` are; the CPU where it has none."""
    weights = iter(model.state_dict().values())
    return next((weight.device for weight in weights), torch.device("cpu"))


def trace(model: nn.Module, example: Tensor) -> tuple[list[Call], Tensor | None]:
    """Run `model` once on `example` and return its module calls in order, and its output."""
    calls: list[Call] = []
    counts: dict[str, int] = {}
    mixer: nn.Module | None = None

    def hook_for(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, _args: object, output: object) -> None:
            nonlocal mixer
            if is_a(module, MAPS + TOKENS):
                mixer = module
            index = counts.get(name, 0)
            counts[name] = index + 1
            tensor = first_tensor(output)
            if tensor is not None:
                calls.append(Call(name, module, index, tensor, mixer))

        return hook

    handles = [
        module.register_forward_hook(hook_for(name)) for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            output = first_tensor(model(example))
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


def is_a(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Say whether a module is of one of these classes, or was before it became part of a graph."""
    return issubclass(class_of(module), kinds)


def is_block(call: Call) -> bool:
    """Say whether the call is that of a composite with weights: a residual, attention or MLP block."""
    composite = any(True for _ in call.module.children())
    return composite and call.name != "" and not is_a(call.module, (nn.Sequential,))


def channel_axis(call: Call) -> int:
    """Return 1 for a feature map (N, C, ...), -1 for tokens (N, ..., C) and for vectors."""
    shape = call.output.shape
    if len(shape) == 2:
        return -1
    if call.mixer is not None and is_a(call.mixer, MAPS):
        return 1
    if len(shape) == 3:
        return -1
    # A linear layer inside a convolutional block (squeeze-and-excitation) scales channels.
    linear = call.mixer is not None and is_a(call.mixer, (nn.Linear,))
    weight = getattr(call.mixer, "weight", None) if linear else None
    return 1 if weight is not None and weight.shape[0] == shape[1] else -1


def check_settled(model: nn.Module) -> None:
    """Raise SiteError where answers depend on batch neighbours or chance, and runs change weights."""
    for name, module in model.named_modules():
        if module.training and is_a(module, UNSETTLED) and getattr(module, "p", 1) > 0:
            raise SiteError(
                f"the layer '{name}' ({class_of(module).__name__}) is in training mode, so no request's "
                "answer is its own; call eval() on the model before it is fitted or served"
            )


def discover_sites(
    model: nn.Module, example: Tensor, *, names: Sequence[str] | None = None
) -> tuple[Site, ...]:
    """Return the sites of `model` in order of execution.

    The rule: outputs of activations and of residual, attention and MLP blocks; where a network has
    neither as a module, outputs of its convolution and linear layers. Where several of these return
    the same tensor object, they are one site, the last of them (an in-place activation finishes its
    block). The logits are no site.

    example: (N, ...) a batch as the model takes it. names: restrict to these modules.
    Raises SiteError where nothing can be observed, a name does not exist or the model is in training.
    """
    make_observable(model)
    check_settled(model)
    batch = example if example.shape[0] > 1 else torch.cat([example, example])
    calls, logits = trace(model, batch)
    usable = [
        call
        for call in calls
        if call.name
        and call.output is not logits
        and call.output.dim() >= 2
        and call.output.shape[0] == batch.shape[0]
        and call.output.is_floating_point()
    ]
    if names is not None:
        chosen = _named(usable, names)
    else:
        chosen = [c for c in usable if is_a(c.module, ACTIVATIONS) or is_block(c)]
        chosen = _distinct(chosen or [c for c in usable if is_a(c.module, MAPS + TOKENS)])
    if not chosen:
        raise SiteError(
            f"nothing to observe in {type(model).__name__}: it has no convolution, linear layer, "
            "activation or block whose output keeps the batch dimension; guard another model"
        )
    return tuple(
        Site(c.name, c.index, c.output.shape[axis], axis)
        for c in chosen
        for axis in (channel_axis(c),)
    )


def _distinct(calls: Sequence[Call]) -> list[Call]:
    """Keep the last of the calls that returned the same tensor object."""
    last = {id(call.output): call for call in calls}
    return [call for call in calls if last[id(call.output)] is call]


def _named(calls: Sequence[Call], names: Sequence[str]) -> list[Call]:
    known = {call.name for call in calls}
    for name in names:
        if name not in known:
            raise SiteError(f"no site '{name}' in this backbone{nearest(name, known)}")
    return [call for call in calls if call.name in set(names)]
