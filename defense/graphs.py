"""Models that are graphs rather than code: TorchScript modules and torch.export programs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module

import torch
from torch import nn
from torch.fx import GraphModule

from defense import exported, scripted

_MANGLED = re.compile(r"__torch__\.|___torch_mangle_\d+\.")
_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def make_observable(model: nn.Module) -> None:
    """Let the graphs in `model` take forward hooks on their parts, in place; eager code does already.

    Raises SiteError where a graph has nothing that could be observed, or answers as in training.
    """
    for graph in _graphs(model):
        if isinstance(graph, torch.jit.ScriptModule):
            scripted.make_hookable(graph)
        else:
            exported.make_hookable(graph)


def _graphs(module: nn.Module) -> Iterator[torch.jit.ScriptModule | GraphModule]:
    """Yield the outermost graphs in `module`."""
    if isinstance(module, torch.jit.ScriptModule) or exported.is_exported(module):
        yield module
    else:
        for part in module.children():
            yield from _graphs(part)


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module; of a graph's part the class that it had before it was one.

    Classes of torch and torchvision are known by their names. Others are told by what they look
    like: parts with numbers for names make a sequence, weights a convolution or a linear layer.
    """
    if isinstance(module, torch.jit.ScriptModule):
        name = _MANGLED.sub("", str(module._c.qualified_name))
    elif isinstance(module, exported.Place):
        name = vars(module).get("class_name", "")
    else:
        return type(module)
    return _known(name) or _likely(module)


def _known(name: str) -> type[nn.Module] | None:
    path, _, last = name.rpartition(".")
    if path.split(".")[0] not in ("torch", "torchvision"):
        return None
    try:
        found = getattr(import_module(path), last, None)
    except ImportError:
        return None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def _likely(module: nn.Module) -> type[nn.Module]:
    parts = [name for name, _ in module.named_children()]
    if parts:
        return nn.Sequential if all(map(str.isdigit, parts)) else nn.Module
    weight = getattr(module, "weight", None)
    rank = weight.dim() if isinstance(weight, torch.Tensor) else 0
    return nn.Linear if rank == 2 else _CONVOLUTIONS.get(rank, nn.Module)
