"""TorchScript modules that take forward hooks, as eager modules do.

A scripted or traced module runs its graph without Python, so that hooks on its parts never fire.
Here the graph, with its module calls written out, tells of every part that carries a hook what it
returned, at the moment when it returned it: an in-place operation may change the tensor later. A
module without hooks runs as it always did.

Calls are written out as TorchScript's own inliner does it; nothing is folded or frozen, which would
change bits. See the overview of the intermediate representation in PyTorch's sources,
torch/csrc/jit/OVERVIEW.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library

from defense.errors import SiteError

_RETURNED = "returned(Tensor output, int part, Tensor(a!) order) -> ()"
_FORWARD = re.compile(r"forward(_*\d+)?")  # calls of a module and overloads are numbered
_CALL = "prim::CallMethod"


@dataclass
class _Pass:
    """One forward pass: the parts that carry hooks, and what the first failing hook raised."""

    parts: Sequence[nn.Module]
    failure: BaseException | None = None

    def returned(self, part: nn.Module, output: Tensor) -> None:
        for hook in list(part._forward_hooks.values()):
            if hook(part, (), output) is not None:
                raise SiteError(
                    "a part of a TorchScript model can be read and not gated; choose a router that "
                    "only reads, such as 'activation', or archive the eager model"
                )


_PASS: ContextVar[_Pass | None] = ContextVar("pass", default=None)


def _returned(output: Tensor, part: int, _order: Tensor) -> None:
    running = _PASS.get()
    if running is None or running.failure is not None:
        return
    try:
        running.returned(running.parts[part], output)
    except BaseException as error:  # the interpreter would make a RuntimeError of it
        running.failure = error


# It claims to write to `order`: so the calls keep their order, and none is removed as unused.
_LIBRARY = Library("pathguard", "FRAGMENT")
_LIBRARY.define(_RETURNED)
_LIBRARY.impl("returned", _returned, "CompositeImplicitAutograd")


class _HookedForward:
    """Stands in for the `forward` of a ScriptModule."""

    def __init__(self, model: torch.jit.ScriptModule) -> None:
        self._model = model
        self._plain = model.forward
        self._parts = {name: part for name, part in model.named_modules() if name}
        self._arguments = model._c._get_method("forward").schema.arguments[1:]
        self._functions: dict[tuple[str, ...], Any] = {}
        self._order = torch.empty(0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hooked = tuple(name for name, part in self._parts.items() if part._forward_hooks)
        values = self._bound(args, kwargs)
        if not hooked or values is None:
            return self._plain(*args, **kwargs)
        if hooked not in self._functions:
            graph = written_out(self._model, hooked)
            self._functions[hooked] = torch._C._create_function_from_graph("forward", graph)
        running = _Pass([self._parts[name] for name in hooked])
        token = _PASS.set(running)
        try:
            answer = self._functions[hooked](self._model, *values, self._order)
        finally:
            _PASS.reset(token)
        if running.failure is not None:
            raise running.failure
        return answer

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """Return all arguments by position; None where `forward` itself is to complain of them."""
        values, rest = list(args), dict(kwargs)
        for argument in self._arguments[len(args) :]:
            if argument.name in rest:
                values.append(rest.pop(argument.name))
            elif argument.has_default_value():
                values.append(argument.default_value)
        return values if not rest and len(values) == len(self._arguments) else None


def make_hookable(model: torch.jit.ScriptModule) -> None:
    """Let a ScriptModule and its parts take forward hooks; done twice, it is done once.

    Hooks of parts are called with no inputs, and cannot replace what the part returned. Raises
    SiteError where the graph calls no modules, or answers as in training.
    """
    if isinstance(vars(model).get("forward"), _HookedForward):
        return
    _check(model)
    forward = _HookedForward(model)
    for part in model.modules():
        _allow(part, "register_forward_hook")
    _allow(model, "register_forward_pre_hook")
    vars(model)["forward"] = forward


def _allow(part: nn.Module, method: str) -> None:
    vars(part)[method] = MethodType(getattr(nn.Module, method), part)


def written_out(model: torch.jit.ScriptModule, watched: Sequence[str]) -> Any:
    """Return the graph of `forward` without module calls.

    It takes one more input at the end, `order`. A `pathguard::returned` stands behind every call of
    the parts in `watched`, whose places there it names.
    """
    parts = dict(model.named_modules())
    graph = model._c._get_method("forward").graph.copy()
    order = graph.addInput("order")
    while calls := [(name, call) for call, name in _calls(graph) if name in parts]:
        for name, call in calls:
            inputs, method = list(call.inputs()), call.s("name")
            graph.setInsertPoint(call)
            outputs = graph.insertGraph(parts[name]._c._get_method(method).graph, inputs)
            if name in watched and _FORWARD.fullmatch(method):
                _watch(graph, outputs[0], watched.index(name), order)
            for old, new in zip(call.outputs(), outputs, strict=True):
                old.replaceAllUsesWith(new)
            call.destroy()
    return graph


def _watch(graph: Any, output: Any, part: int, order: Any) -> None:
    """Insert a `pathguard::returned` for `output`, or for the first tensor of a tuple."""
    if output.type().kind() == "TupleType":
        kinds = output.type().elements()
        unpack = graph.insertNode(graph.create("prim::TupleUnpack", [output], len(kinds)))
        for value, kind in zip(unpack.outputs(), kinds, strict=True):
            value.setType(kind)
        output = next(iter(unpack.outputs()))
    if output.type().kind() == "TensorType":
        inputs = [output, graph.insertConstant(part), order]
        graph.insertNode(graph.create("pathguard::returned", inputs, 0))


def _calls(graph: Any) -> Iterator[tuple[Any, str | None]]:
    """Yield the module calls in a graph, with the name of the part that is called."""
    for call in graph.findAllNodes(_CALL, True):
        yield call, _name_of(next(iter(call.inputs())))


def _name_of(part: Any) -> str | None:
    """Return the dotted name of a value that is a part of the model; None where it is computed."""
    names: list[str] = []
    while part.node().kind() == "prim::GetAttr":
        names.append(part.node().s("name"))
        part = next(iter(part.node().inputs()))
    return ".".join(reversed(names)) if part.node().kind() == "prim::Param" else None


def _check(model: torch.jit.ScriptModule) -> None:
    if not model._c._has_method("forward"):
        raise SiteError(
            "the TorchScript model has no method 'forward'; script or trace the model as it is called"
        )
    graph = written_out(model, [name for name, _ in model.named_modules() if name])
    if graph.findNode("pathguard::returned", True) is None:
        raise SiteError(
            "nothing to observe in the TorchScript model: it calls no modules, as after "
            "torch.jit.freeze or optimize_for_inference; archive it as it was before that"
        )
    torch._C._jit_pass_inline(graph)
    for node in graph.nodes():
        if _in_training(node):
            raise SiteError(
                f"the TorchScript model runs '{node.kind()}' as in training, so no request's answer "
                "is its own; call eval() on the model before it is traced"
            )


def _in_training(node: Any) -> bool:
    """Say whether a node is a batch norm, a dropout or the like that was traced in training mode."""
    if node.kind().startswith("prim::") or node.schema() == "(no schema)":
        return False
    arguments = torch._C.parse_schema(node.schema()).arguments
    given = {a.name: v.toIValue() for a, v in zip(arguments, node.inputs(), strict=False)}
    return (given.get("training") or given.get("train")) is True and given.get("p") != 0
