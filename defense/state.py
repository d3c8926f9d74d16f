"""Frozen dataclasses to JSON and tensors, and back.

Routers and detectors are frozen dataclasses of tensors, numbers, strings, tuples, sites and other
such dataclasses; that is all that an artefact has to hold, so nothing is ever pickled.
"""

from __future__ import annotations

import dataclasses
import reprlib
import types
import typing
from typing import Any

import torch
from torch import Tensor

from defense.errors import ArtifactError

Tensors = dict[str, Tensor]


def split(value: object, prefix: str = "") -> tuple[Any, Tensors]:
    """Return a JSON-ready description of `value` and its tensors by dotted field name."""
    if isinstance(value, Tensor):
        # A copy, because safetensors refuses tensors that share memory.
        return {"tensor": prefix}, {prefix: value.detach().cpu().contiguous().clone()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items: Any = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    elif isinstance(value, (tuple, list)):
        items = {str(index): item for index, item in enumerate(value)}
    else:
        return value, {}
    described: dict[str, Any] = {}
    tensors: Tensors = {}
    for name, item in items.items():
        described[name], found = split(item, f"{prefix}.{name}" if prefix else name)
        tensors |= found
    return (list(described.values()) if isinstance(value, (tuple, list)) else described), tensors


def join(kind: Any, described: Any, tensors: Tensors) -> Any:
    """Rebuild a value of type `kind` from what `split` returned, or raise ArtifactError."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if described is None:
            return None
        return join(next(a for a in arguments if a is not types.NoneType), described, tensors)
    if kind is Tensor:
        if not isinstance(described, dict) or described.get("tensor") not in tensors:
            raise ArtifactError(
                f"the guard lacks the tensor that it describes as {_short(described)}"
            )
        return tensors[described["tensor"]]
    if dataclasses.is_dataclass(kind):
        return _join_dataclass(typing.cast(type, kind), described, tensors)
    if origin is tuple:
        if not isinstance(described, list):
            raise ArtifactError(f"the guard holds {_short(described)} where a list was expected")
        return tuple(join(arguments[0], item, tensors) for item in described)
    if kind is float and isinstance(described, int) and not isinstance(described, bool):
        return float(described)
    if not isinstance(described, kind):
        raise ArtifactError(
            f"the guard holds {_short(described)} where {kind.__name__} was expected"
        )
    return described


def _join_dataclass(kind: type, described: Any, tensors: Tensors) -> Any:
    hints = typing.get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    if not isinstance(described, dict) or set(described) != names:
        got = sorted(described) if isinstance(described, dict) else described
        raise ArtifactError(
            f"the guard describes {kind.__name__} with {_short(got)}; expected {sorted(names)}"
        )
    return kind(**{name: join(hints[name], described[name], tensors) for name in described})


def _short(value: object) -> str:
    """Return a value as text; whoever wrote a guard's files may have made it endless."""
    brief = reprlib.Repr()
    brief.maxlist = brief.maxdict = 20
    return brief.repr(value)


def to_device(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Return `value` with every tensor in it on `device`, and of `dtype` where one is given."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        moved = {
            f.name: to_device(getattr(value, f.name), device, dtype)
            for f in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **moved)
    if isinstance(value, tuple):
        return tuple(to_device(item, device, dtype) for item in value)
    return value
