"""Programs of torch.export that take forward hooks, as eager modules do.

`torch.export.load(...).module()` is one flat graph of operators, each of which remembers the module
calls that it came from. Here these modules come back by name, each as a `Place`: where one carries
hooks, it is called behind the last operator of every call, with what the module had returned. See
https://docs.pytorch.org/docs/stable/export.html on `nn_module_stack`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from defense.errors import SiteError


class Place(nn.Module):
    """Where a module was; it holds that module's weights, if it had any, and returns its input.

    class_name: the full name of the module's class.
    """

    class_name: str

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def forward(self, output: Tensor) -> Tensor:
        """Return `output`."""
        return output


@dataclass
class _Call:
    """One call of a module: what the graph says of it, and its operators in order."""

    keys: tuple[str, ...]
    name: str
    class_name: str
    nodes: list[Node] = field(default_factory=list)

    def output(self) -> Node | None:
        """Return the last tensor that is used outside of the call."""
        inside = set(self.nodes)
        for node in reversed(self.nodes):
            if isinstance(node.meta.get("val"), Tensor) and not inside.issuperset(node.users):
                return node
        return None


def is_exported(model: nn.Module) -> TypeGuard[GraphModule]:
    """Say whether a module is an exported program: a graph of operators and not of modules."""
    return isinstance(model, GraphModule) and any(map(_is_operator, model.graph.nodes))


class _HookedForward:
    """Stands in for the `forward` of an exported program."""

    def __init__(self, model: GraphModule) -> None:
        self._model = model
        self._graph = model.graph
        self._places = {n: part for n, part in model.named_modules() if isinstance(part, Place)}
        self._called: list[str] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hooked = [name for name, place in self._places.items() if place._forward_hooks]
        if hooked != self._called:
            self._model.graph = with_calls(self._graph, hooked) if hooked else self._graph
            self._called = hooked
        return type(self._model).forward(self._model, *args, **kwargs)


def make_hookable(model: GraphModule) -> None:
    """Let an exported program and its parts take forward hooks; done twice, it is done once.

    Hooks of parts are called with what the part returned as their input, too. Raises SiteError where
    the program remembers no calls, answers as in training, or takes batches of one size only.
    """
    if isinstance(vars(model).get("forward"), _HookedForward):
        return
    _check(model.graph)
    for call in _calls(model.graph):
        _make_place(model, call)
    vars(model)["forward"] = _HookedForward(model)
    # A program has the mode that it was exported in; a model around it may still be put in eval mode.
    vars(model)["train"] = lambda _mode=True: model
    vars(model)["eval"] = lambda: model


def _is_operator(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, OpOverload)


def _check(graph: Graph) -> None:
    batch = _batch_size(graph)
    if isinstance(batch, int):
        raise SiteError(
            f"the exported program takes batches of {batch} and no others; export it with a dynamic "
            "first dimension (torch.export.Dim)"
        )
    if not _calls(graph):
        raise SiteError(
            "nothing to observe in the exported program: its operators remember no modules; export "
            "the eager model with torch.export.export"
        )
    for node in graph.nodes:
        if _is_operator(node) and _in_training(node):
            raise SiteError(
                f"the exported program runs '{node.target}' as in training, so no request's answer "
                "is its own; call eval() on the model before it is exported"
            )


def _batch_size(graph: Graph) -> object:
    """Return how many rows the program takes: a number, or something else where that is free."""
    inputs = (node.meta.get("val") for node in graph.nodes if node.op == "placeholder")
    sizes = (value.shape[0] for value in inputs if isinstance(value, Tensor) and value.dim())
    return next(sizes, None)


def _calls(graph: Graph) -> list[_Call]:
    """Return all module calls but the program's own, in the order in which they return."""
    calls: dict[tuple[str, ...], _Call] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        stack = list(node.meta.get("nn_module_stack", {}).items())
        for depth in range(1, len(stack) + 1):
            keys = tuple(key for key, _ in stack[:depth])
            name, class_name = stack[depth - 1][1]
            if name:
                name = name.split("@")[0]
                calls.setdefault(keys, _Call(keys, name, str(class_name))).nodes.append(node)
    order = {node: index for index, node in enumerate(graph.nodes)}
    return sorted(calls.values(), key=lambda call: (order[call.nodes[-1]], -len(call.keys)))


def _in_training(node: Node) -> bool:
    """Say whether a node is a batch norm, a dropout or the like in training mode."""
    assert isinstance(node.target, OpOverload)
    names = (argument.name for argument in node.target._schema.arguments)
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return True in (given.get("training"), given.get("train")) and bool(given.get("p") != 0)


def with_calls(graph: Graph, names: Collection[str]) -> Graph:
    """Return a copy of `graph` that calls the places in `names` and goes on with what they return."""
    graph = deepcopy(graph)
    calls = _calls(graph)
    for index, call in enumerate(calls):
        output = call.output()
        if output is None or call.name not in names:
            continue
        with graph.inserting_after(call.nodes[-1]):
            place = graph.call_module(call.name, (output,))
        place.meta["val"] = output.meta["val"]
        inside = {*call.nodes, place}
        for user in [user for user in output.users if user not in inside]:
            user.replace_input_with(output, place)
        for around in _around(call, calls[index:]):
            around.nodes.insert(around.nodes.index(call.nodes[-1]) + 1, place)
    return graph


def _around(call: _Call, calls: list[_Call]) -> Iterator[_Call]:
    """Yield those of `calls` that `call` was made in, and itself never."""
    for other in calls:
        if len(other.keys) < len(call.keys) and call.keys[: len(other.keys)] == other.keys:
            yield other


def _make_place(model: GraphModule, call: _Call) -> None:
    """Make the module called so a Place, with all the weights and parts that it has."""
    parent: nn.Module = model
    for part in call.name.split("."):
        if part not in parent._modules:
            parent.add_module(part, Place())
        parent = getattr(parent, part)
        if type(parent) is nn.Module:
            parent.__class__ = Place
            parent.training = False
    vars(parent)["class_name"] = call.class_name
