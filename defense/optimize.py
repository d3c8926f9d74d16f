"""`optimize`: the same classifier in a faster form, with its path; checked before it answers.

The forward pass is exported together with the statistics of its sites, as one graph. In it batch
norms are folded into the convolutions before them, weights lie channels-last, and arithmetic is
bfloat16 where that pays on this machine. Of the forms that keep to their tolerance the fastest takes
the place of the model's `forward`; where there is none the model stays as it was. A single request
goes through the form only where that is faster for a single one as well.

A logit may move by `tolerance` times the spread of its row's logits. A request whose two first
classes are closer than two such moves is run again as the model was: the predicted class is the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from defense.backbone import GatedBackbone, Run
from defense.errors import GuardFailure

logger = logging.getLogger(__name__)

Look = Callable[[Tensor], Tensor]
"""Runs inputs through the model as it stands and returns the p-values (N,) of their requests."""

PROBES = 4
"""Requests that every form is tried on."""
GAIN = 1.05
"""Below this a form is not worth another rounding."""
P_SHIFT = 0.02
"""How far a p-value of the probes may move."""
PATH_SHARE = 0.2
"""A path may move by this share of the logits' tolerance, relative to its length."""
TURNS = 3
_CONVOLUTIONS = tuple(
    getattr(torch.ops.aten, name).default for name in ("conv1d", "conv2d", "conv3d")
)
_ASSERTION = torch.ops.aten._assert_tensor_metadata.default
_BATCH_NORM = torch.ops.aten.batch_norm.default


@dataclass(frozen=True)
class Form:
    """How a graph may run. tolerance: of a logit, in standard deviations of its row's logits."""

    name: str
    dtype: torch.dtype
    tolerance: float


FORMS = (
    Form("float32", torch.float32, 1e-3),
    Form("bfloat16", torch.bfloat16, 0.1),
)


@dataclass(frozen=True)
class Quick:
    """A form of one backbone, ready to run: inputs (N, ...) to logits (N, K) and all statistics."""

    form: Form
    graph: Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]]

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        # Compiling belongs to the start: an unforeseen kind of call runs as it stands.
        with torch.compiler.set_stance("eager_on_recompile"):
            logits, statistics = self.graph(inputs.to(self.form.dtype))
        return logits.to(inputs.dtype), [part.float() for part in statistics]


class Shortcut:
    """A quick form in the place of a model's `forward`, for at least `least` rows like `example`'s.

    All else, gradients included, goes the old way, and so do rows too close to call.
    """

    def __init__(
        self, backbone: GatedBackbone, quick: Quick, example: Tensor, *, least: int = 1
    ) -> None:
        self._backbone = backbone
        self._exact = backbone.model.forward
        self._before = vars(backbone.model).get("forward")
        self._quick = quick
        self._example = example
        self._least = least
        self.again = 0
        """Rows that were run again, so far."""
        backbone.model.forward = self

    @property
    def form(self) -> str:
        return self._quick.form.name

    def close(self) -> None:
        """Give the model its own `forward` back, or the one that stood in its place."""
        del self._backbone.model.forward
        if self._before is not None:  # a graph's, which calls the hooks
            vars(self._backbone.model)["forward"] = self._before

    def __call__(self, *args: object, **kwargs: object) -> object:
        inputs = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(inputs, Tensor) or not self._takes(inputs):
            return self._exact(*args, **kwargs)
        logits, statistics = self._quick(inputs)
        close = too_close(logits, self._quick.form.tolerance).nonzero().squeeze(1)
        if len(close):
            self.again += len(close)
            exact, seen = observed(self._backbone, self._exact, inputs[close])
            for part, whole in zip([exact, *seen], [logits, *statistics], strict=True):
                whole[close] = part
        self._backbone.deliver(statistics)
        return logits

    def _takes(self, inputs: Tensor) -> bool:
        like = self._example
        return (
            inputs.shape[1:] == like.shape[1:]
            and len(inputs) >= self._least
            and (inputs.dtype, inputs.device) == (like.dtype, like.device)
            and not (inputs.requires_grad and torch.is_grad_enabled())
        )


def too_close(logits: Tensor, tolerance: float) -> Tensor:
    """Say of which rows (N,) of logits (N, K) the first class could change within the tolerance."""
    first, second = logits.topk(2, dim=1).values.unbind(1)
    # Also true where a logit is no finite number: such a row is better run as it was.
    return ~(first - second > 2 * tolerance * logits.std(dim=1))


def observed(
    backbone: GatedBackbone, forward: Callable[[Tensor], object], inputs: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return the logits of `forward` and what the hooks at the sites see, apart from any recording."""
    with backbone.record() as recording:
        recording.runs.append(Run(inputs))
        logits = forward(inputs)
    statistics = recording.runs[0].statistics
    if recording.failure is not None:
        raise recording.failure
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        raise GuardFailure("optimize", "the backbone returns something else than logits (N, K)")
    return logits, [statistics[index] for index in range(len(backbone.router.layout.sites))]


def take_shortcut(
    backbone: GatedBackbone, example: Tensor, look: Look, *, compiled: bool
) -> Shortcut | None:
    """Put the fastest form that keeps to its tolerance in the place of the model's `forward`.

    example: a request's rows (V, ...). look: takes the guard's first look at inputs. compiled: compile
    the form as well, which takes a C++ compiler and a while at every start. Returns None, and logs
    why in a sentence, where the model is better left as it was.
    """
    probes = probe_inputs(example)
    try:
        graph = export_graph(backbone, example)
        quick = _fastest(backbone, graph, probes, look)
    except Exception as error:
        logger.warning("optimize: the model runs as it was, for it is not exported: %s", _of(error))
        return None
    if quick is None:
        logger.warning("optimize: the model runs as it was, for no other form is faster and alike")
        return None
    if compiled:
        quick = _compiled(backbone, quick, probes, look)
    single = probes[: len(example)]
    gain = _speedup(backbone.model.forward, quick, single)
    logger.info("optimize: for a single request it is %.2f times as fast", gain)
    least = len(single) if gain >= GAIN else len(single) + 1
    return Shortcut(backbone, quick, example, least=least)


def probe_inputs(example: Tensor) -> Tensor:
    """Return rows shaped like those of `example`, about as normalised photographs are."""
    draw = torch.Generator().manual_seed(0)
    shape = (PROBES * len(example), *example.shape[1:])
    if example.dim() != 4:
        return torch.randn(shape, generator=draw).to(example)
    coarse = torch.randn(*shape[:2], 8, 8, generator=draw)
    smooth = nn.functional.interpolate(coarse, shape[2:], mode="bilinear")
    return (smooth + 0.1 * torch.randn(shape, generator=draw)).to(example)


class _Observing(nn.Module):
    """The model with what its sites see among its outputs, for export."""

    def __init__(self, backbone: GatedBackbone) -> None:
        super().__init__()
        self.model = backbone.model
        self._backbone = backbone

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        logits, statistics = observed(self._backbone, self.model.forward, inputs)
        return logits, tuple(statistics)


@torch.no_grad()
def export_graph(backbone: GatedBackbone, example: Tensor) -> fx.GraphModule:
    """Return a copy of the model as a graph (N, ...) -> logits, statistics; batch norms are folded."""
    dims = (torch.export.Dim.DYNAMIC, *(torch.export.Dim.STATIC for _ in example.shape[1:]))
    inputs = torch.cat([example, example]).contiguous()
    program = torch.export.export(
        _Observing(backbone).eval(), (inputs,), dynamic_shapes=(dims,), strict=False
    )
    graph = program.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    for node in list(graph.graph.nodes):
        if node.target == _ASSERTION:  # that a type is float32 may soon be untrue
            graph.graph.erase_node(node)
    _own_weights(graph)
    fold_batch_norms(graph)
    return graph


def _own_weights(graph: fx.GraphModule) -> None:
    """Copy what the graph shares with the model: converting it must not convert the model."""
    for module in graph.modules():
        for name, weight in module.named_parameters(recurse=False):
            own = nn.Parameter(weight.detach().clone(), requires_grad=False)
            module.register_parameter(name, own)
        for name, value in module.named_buffers(recurse=False):
            setattr(module, name, value.clone())


def fold_batch_norms(graph: fx.GraphModule) -> int:
    """Fold batch norms into convolutions that only they read; return how many."""
    fresh = count()
    nodes = graph.graph
    for norm in list(nodes.nodes):
        convolution = norm.args[0] if norm.target == _BATCH_NORM and not norm.args[5] else None
        if convolution is None or convolution.target not in _CONVOLUTIONS:
            continue
        if len(convolution.users) > 1:  # a site observes it, or a branch starts there
            continue
        index = next(fresh)
        source, *kernel = convolution.args
        kernel += [None] * (2 - len(kernel))
        parts = [_value(graph, node) for node in (*kernel[:2], *norm.args[1:5])]
        folded = _folded(parts, norm.args[7])
        names = [f"folded_{index}_{part}" for part in ("weight", "bias")]
        for name, value in zip(names, folded, strict=True):
            graph.register_parameter(name, nn.Parameter(value, requires_grad=False))
        with nodes.inserting_before(convolution):
            convolution.args = (source, *(nodes.get_attr(name) for name in names), *kernel[2:])
        norm.replace_all_uses_with(convolution)
        nodes.erase_node(norm)
    _forget_unread(graph)
    graph.recompile()
    return next(fresh)


def _folded(parts: Sequence[Any], eps: float) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the convolution that does what a convolution and a norm did.

    parts: weight and bias (or None); gain and offset (or None); mean and variance.
    """
    weight, bias, gain, offset, mean, variance = parts
    scale = (variance + eps).rsqrt() * (1 if gain is None else gain)
    shift = (0 if offset is None else offset) - mean * scale
    folded = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    return folded.detach(), (shift if bias is None else shift + bias * scale).detach()


def _value(graph: fx.GraphModule, node: fx.Node | None) -> Tensor | None:
    return None if node is None else attrgetter(str(node.target))(graph)


def _forget_unread(graph: fx.GraphModule) -> None:
    """Take weights out that no node reads any more."""
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.graph.erase_node(node)
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for name in [n for n, _ in (*graph.named_parameters(), *graph.named_buffers())]:
        if name not in read:
            owner, _, last = name.rpartition(".")
            delattr(graph.get_submodule(owner), last)


def _fastest(
    backbone: GatedBackbone, graph: fx.GraphModule, probes: Tensor, look: Look
) -> Quick | None:
    """Return the form that is fastest of those that keep to their tolerances, if it gains enough."""
    best, least = None, GAIN
    before = look(probes)
    for form in FORMS:
        quick = Quick(form, _converted(graph, form, probes))
        try:
            gain = _tried(backbone, quick, probes, look, before)
        except Exception as error:
            logger.info("optimize: %s is not used: %s", form.name, _of(error))
            continue
        logger.info("optimize: %s is %.2f times as fast as the model was", form.name, gain)
        if gain >= least:
            best, least = quick, gain
    return best


def _converted(graph: fx.GraphModule, form: Form, probes: Tensor) -> fx.GraphModule:
    """Return a copy of the graph in this form."""
    copied = fx.GraphModule(graph, graph.graph)
    for name, value in (*graph.named_parameters(), *graph.named_buffers()):
        owner, _, last = name.rpartition(".")
        moved = value.detach()
        if moved.is_floating_point():
            moved = moved.to(form.dtype)
        if moved.dim() == 4 and probes.dim() == 4:
            moved = moved.contiguous(memory_format=torch.channels_last)
        module = copied.get_submodule(owner)
        if isinstance(value, nn.Parameter):
            module.register_parameter(last, nn.Parameter(moved, requires_grad=False))
        else:
            setattr(module, last, moved)
    return copied


def _tried(
    backbone: GatedBackbone,
    quick: Quick,
    probes: Tensor,
    look: Look,
    before: Tensor,
) -> float:
    """Return how many times as fast the form is; GuardFailure where it strays too far."""
    with _in_place(backbone, quick, probes) as exact:
        check_alike(backbone, quick, exact, probes)
        moved = float((look(probes) - before).abs().max())
        if not moved <= P_SHIFT:
            raise GuardFailure("optimize", f"a p-value moves by {moved:.2g}; at most {P_SHIFT} may")
        return _speedup(exact, quick, probes)


def _speedup(old: Callable[[Tensor], object], new: Callable[[Tensor], object], x: Tensor) -> float:
    """Return how many times as fast as `old` the function `new` is, the two taking turns."""
    times = [(_seconds(old, x), _seconds(new, x)) for _ in range(TURNS)]
    return min(was for was, _ in times) / min(now for _, now in times)


@contextmanager
def _in_place(
    backbone: GatedBackbone, quick: Quick, example: Tensor
) -> Iterator[Callable[[Tensor], object]]:
    exact: Callable[[Tensor], object] = backbone.model.forward
    shortcut = Shortcut(backbone, quick, example)
    try:
        yield exact
    finally:
        shortcut.close()


@torch.no_grad()
def check_alike(
    backbone: GatedBackbone, quick: Quick, exact: Callable[[Tensor], object], probes: Tensor
) -> None:
    """Raise GuardFailure where logits or path of `probes` stray by more than half of what they may.

    Half, because the probes are few.
    """
    (old, old_path), (new, new_path) = observed(backbone, exact, probes), quick(probes)
    limit = quick.form.tolerance / 2
    strayed = float(((new - old).abs().amax(1) / old.std(1)).max())
    if not strayed <= limit:
        raise GuardFailure(
            "optimize", f"a logit strays by {strayed:.2g} of their spread; at most {limit:.2g} may"
        )
    was = torch.cat(old_path, dim=1)
    moved = float(((torch.cat(new_path, dim=1) - was).norm(dim=1) / was.norm(dim=1)).max())
    if not moved <= limit * PATH_SHARE:
        raise GuardFailure(
            "optimize",
            f"a path moves by {moved:.2g} of its length; at most {limit * PATH_SHARE:.2g} may",
        )


@torch.no_grad()
def _seconds(forward: Callable[[Tensor], object], inputs: Tensor) -> float:
    start = time.perf_counter()
    forward(inputs)
    if inputs.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _compiled(backbone: GatedBackbone, quick: Quick, probes: Tensor, look: Look) -> Quick:
    """Return the form compiled, or as it is where that cannot be had or strays."""
    import torch._inductor.config as inductor

    graph = torch.compile(quick.graph, dynamic=True)
    faster = Quick(quick.form, graph)
    try:
        before = look(probes)
        # One process compiles, and leaves none behind in the worker.
        with torch.no_grad(), inductor.patch(freezing=True, compile_threads=1):
            for rows in (1, len(probes)):  # a single row is a graph of its own
                graph(probes[:rows].to(quick.form.dtype))
        gain = _tried(backbone, faster, probes, look, before)
    except Exception as error:
        logger.warning("optimize: the model is not compiled: %s", _of(error))
        return quick
    logger.info("optimize: compiled, it is %.2f times as fast as the model was", gain)
    return faster if _speedup(quick, faster, probes) > 1 else quick


def _of(error: Exception) -> str:
    """Name an error in a line; compilers and exporters write pages."""
    return (
        f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]:.200}"
    )
