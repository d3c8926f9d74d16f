"""`effective_backward`: the neurons that an answer rests on, walked back from its logit.

Source: Qiu et al., "Adversarial Defense Through Network Profiling Based Path Extraction" (CVPR
2019, https://arxiv.org/abs/1904.08089), eqs. (1)-(3), which Ptolemy calls BwCU
(https://arxiv.org/abs/2008.09954). Of every neuron on the path, the smallest set of inputs whose
products with their weights sum to theta of all of them is on the path too. Reconstructed where the
papers say little: neurons are kept, not synapses; an input that adds nothing is never kept; the sign
of an output is that of its value, with no sign carried from layer to layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from defense.errors import ConfigError, SiteError, nearest
from defense.routers.cumulative import Map, average, cells, maxima, rests_on, windows
from defense.routers.gating import channels_first
from defense.routers.recipes import Observing
from defense.sites import ACTIVATIONS
from defense.types import PathLayout, Routed, Site

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
PASSING_MODULES = (*ACTIVATIONS, *NORMS, *DROPOUTS, nn.Identity, nn.Flatten)
"""Every output neuron has one input neuron, in the same order."""
PASSING = (
    *("relu", "relu_", "relu6", "leaky_relu", "gelu", "silu", "hardtanh", "sigmoid", "tanh"),
    *("dropout", "flatten", "view", "reshape", "squeeze", "unsqueeze", "contiguous"),
)
"""The same as functions and methods."""
ADDING = ("add", "add_", "iadd")
POOLS: dict[str, type[nn.Module]] = {
    "max_pool2d": nn.MaxPool2d,
    "avg_pool2d": nn.AvgPool2d,
    "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d,
}


@dataclass(frozen=True)
class EffectiveBackwardRouter:
    """Share of every channel's neurons on the path back from the predicted logit, in [0, 1]."""

    name: ClassVar[str] = "effective_backward"
    one_forward: ClassVar[bool] = False

    layout: PathLayout
    theta: float

    def route(self, model: nn.Module, inputs: Tensor) -> Routed:
        """Return logits and paths of backbone inputs (N, ...); SiteError as `effective_neurons`."""
        paths = [inputs.new_zeros(0, self.layout.length, dtype=torch.float32)]
        for neurons in effective_neurons(model, self.layout.sites, inputs, self.theta):
            shares = [channels_first(kept.float(), s).mean(2) for s, (_, kept) in neurons.items()]
            paths.append(torch.cat(shares, dim=1))
        with torch.no_grad():
            return Routed(model(inputs), torch.cat(paths))


@dataclass(frozen=True)
class EffectiveBackwardRecipe(Observing):
    """Hyper-parameters: theta in [0, 1], the share of a neuron's input that its path has to give."""

    examples: ClassVar[int] = 0

    theta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.theta <= 1:
            raise ConfigError(f"theta of an effective path is {self.theta}; give one from 0 to 1")

    def fit(
        self,
        model: nn.Module,
        sites: tuple[Site, ...],
        inputs: Tensor,
        *,
        seed: int,
        progress: Callable[[float], None],
    ) -> EffectiveBackwardRouter:
        """Nothing is learnt; a network that cannot be walked is refused here already."""
        router = EffectiveBackwardRouter(PathLayout(sites, ("share",)), self.theta)
        router.route(model, inputs[:1])
        return router


def effective_neurons(
    model: nn.Module, sites: Sequence[Site], inputs: Tensor, theta: float
) -> Iterator[dict[Site, tuple[Tensor, Tensor]]]:
    """Yield, image by image of (N, ...), what every site returned and which of it is on the path.

    Both are (1, ...) as the site returns them for one image, the latter boolean. Images run one by
    one: rounding differs between batches, and a path must not. Raises SiteError where a site is
    missing, the network cannot be traced or the path meets an operation that is not supported.
    """
    graph, returned = trace(model)
    for site in sites:
        if (site.module, site.call) not in returned:
            raise SiteError(
                f"no module '{site.module}' in this backbone returns one tensor from its call "
                f"{site.call}{nearest(site.module, {name for name, _ in returned})}"
            )
    for row in range(len(inputs)):
        walk = Walk(model, graph, theta)
        masks = walk.back(inputs[row : row + 1])
        nodes = [(site, returned[site.module, site.call]) for site in sites]
        values = walk.values
        yield {s: (values[n], masks.get(n, torch.zeros_like(values[n]).bool())) for s, n in nodes}


def trace(model: nn.Module) -> tuple[fx.Graph, dict[tuple[str, int], fx.Node]]:
    """Return the graph of `model`, and the node that each module returned at each of its calls."""
    tracer = _Tracer()
    try:
        return tracer.trace(model), tracer.returned
    except Exception as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise SiteError(
            f"{type(model).__name__} cannot be traced for its effective path "
            f"({type(error).__name__}: {reason}); choose another router"
        ) from error


class _Tracer(fx.Tracer):
    """Remembers what composite modules returned: they are no nodes of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.returned: dict[tuple[str, int], fx.Node] = {}
        self._calls: dict[str, int] = {}

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        name = self.path_of_module(m)
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        if isinstance(output, fx.Proxy):
            self.returned[name, call] = output.node
        return output


class Walk(fx.Interpreter):
    """Runs one image forward, keeping all tensors in `values`, and goes its path back."""

    def __init__(self, model: nn.Module, graph: fx.Graph, theta: float) -> None:
        super().__init__(model, graph=graph)
        self.theta = theta
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        output = super().run_node(n)
        if isinstance(output, Tensor):
            self.values[n] = output.clone()  # the next operation may work in place
        return output

    @torch.no_grad()
    def back(self, image: Tensor) -> dict[fx.Node, Tensor]:
        """Return the neurons on the path of `image` (1, ...) at every node that the path meets."""
        self.run(image)
        nodes = list(reversed(self.graph.nodes))
        logits = self.values[self._tensors(nodes[0])[0]]
        masks = {self._tensors(nodes[0])[0]: logits == logits.amax()}
        for node in nodes[1:]:
            if node in masks and node.op.startswith("call"):
                sources = self._tensors(node)
                for source, mask in zip(sources, self._step(node, masks[node]), strict=True):
                    masks[source] = masks[source] | mask if source in masks else mask
        return masks

    def _tensors(self, node: fx.Node) -> list[fx.Node]:
        return [source for source in node.all_input_nodes if source in self.values]

    def _operation(self, node: fx.Node) -> nn.Module | str:
        """Return the module that `node` calls, or the name of its function or method."""
        if node.op == "call_module":
            module: nn.Module = self.fetch_attr(str(node.target))
            return module
        name = node.target if isinstance(node.target, str) else node.target.__name__
        if name not in POOLS:
            return name
        options = {k: v for k, v in node.kwargs.items() if k not in ("input", "return_indices")}
        return POOLS[name](*node.args[1:], **options)

    def _step(self, node: fx.Node, mask: Tensor) -> list[Tensor]:
        """Return which neurons of each input of `node` its neurons in `mask` rest on."""
        operation, output = self._operation(node), self.values[node]
        value, *others = (self.values[source] for source in self._tensors(node))
        match operation:
            case nn.Conv2d() if operation.padding_mode == "zeros" and operation.padding != "same":
                return [self._conv(operation, value, output, mask)]
            case nn.Linear():
                return [self._linear(operation, value, output, mask)]
            case nn.MaxPool2d():
                return [maxima(operation, value, mask)]
            case nn.AvgPool2d() if not operation.ceil_mode:
                spans = (operation.kernel_size, 1, operation.padding, operation.stride)
                return [self._pool(value, output, mask, windows(value, *spans))]
            case nn.AdaptiveAvgPool2d():
                return [self._pool(value, output, mask, cells(value, output))]
            case "mean":
                return [self._mean(node, value, output, mask)]
            case str() if operation in ADDING and not node.kwargs:
                if not others:  # a constant, or the same tensor twice
                    return [mask]
                if value.shape == others[0].shape:
                    return list(self._add(torch.stack([value, others[0]]), output, mask))
            case _ if operation in PASSING or isinstance(operation, PASSING_MODULES):
                return [mask.reshape(value.shape)]
        name = operation if isinstance(operation, str) else type(operation).__name__
        raise SiteError(
            f"the effective path meets '{name}' at '{node.name}' in {type(self.module).__name__}, "
            "an operation (or an option of it) that is not supported; choose another router"
        )

    def _linear(self, linear: nn.Linear, value: Tensor, output: Tensor, mask: Tensor) -> Tensor:
        value_, output_, mask_ = (x.flatten(0, -2).T for x in (value, output, mask))
        every = torch.arange(value_.shape[1], device=value.device)[:, None]
        maps = Map(linear.weight[:, :, None], every, value_, output_)
        return rests_on(maps, mask_, self.theta).T.reshape(value.shape)

    def _conv(self, conv: nn.Conv2d, value: Tensor, output: Tensor, mask: Tensor) -> Tensor:
        padding = 0 if isinstance(conv.padding, str) else conv.padding
        index = windows(value, conv.kernel_size, conv.dilation, padding, conv.stride)
        maps = Map(conv.weight.flatten(2), index, value[0].flatten(1), output[0].flatten(1))
        return rests_on(maps, mask[0].flatten(1), self.theta).view(value.shape)

    def _pool(self, value: Tensor, output: Tensor, mask: Tensor, index: Tensor) -> Tensor:
        maps = average(index, value[0].flatten(1), output[0].flatten(1))
        return rests_on(maps, mask[0].flatten(1), self.theta).view(value.shape)

    def _mean(self, node: fx.Node, value: Tensor, output: Tensor, mask: Tensor) -> Tensor:
        dims: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        dims = tuple(range(value.dim())) if dims is None else dims
        gone = sorted(d % value.dim() for d in ((dims,) if isinstance(dims, int) else dims))
        order = [d for d in range(value.dim()) if d not in gone] + gone
        moved = value.permute(order)
        rows = moved.reshape(output.numel(), -1)
        every = torch.arange(rows.shape[1], device=value.device)[None]
        maps = average(every, rows, output.reshape(-1, 1))
        kept = rests_on(maps, mask.reshape(-1, 1), self.theta).view(moved.shape)
        return kept.permute([order.index(d) for d in range(value.dim())])

    def _add(self, pair: Tensor, output: Tensor, mask: Tensor) -> Tensor:
        index = torch.arange(pair.numel(), device=pair.device).view(2, -1).T
        maps = average(index, pair.reshape(1, -1), output.reshape(1, -1))
        return rests_on(maps, mask.reshape(1, -1), self.theta).view(pair.shape)
