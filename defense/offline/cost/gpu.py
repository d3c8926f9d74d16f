"""What the guard adds to a forward pass on a GPU: eager, compiled, and replayed as a CUDA graph."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from defense.backbone import GatedBackbone
from defense.offline.cost.page import table
from defense.offline.cost.subjects import bench_images, bench_network
from defense.offline.cost.turns import take_turns
from defense.offline.fit import versions
from defense.offline.progress import Progress
from defense.offline.statistics import ratio_row
from defense.optimize import export_graph
from defense.routers.activation import ActivationRecipe

NO_GPU = "There is no CUDA device here, so nothing was measured; run this where there is one."
NETWORKS, BATCHES = ("resnet18", "resnet50"), (1, 8, 32)
BUDGET = 1.02
Call = Callable[[], object]
Mode = Callable[[Callable[[Tensor], object], Tensor], Call]
"""Turns a function of inputs and inputs (N, ...) into what runs it on them."""


def eager(run: Callable[[Tensor], object], x: Tensor) -> Call:
    """Run as it is."""
    return lambda: run(x)


def compiled(run: Callable[[Tensor], object], x: Tensor) -> Call:
    """Run what torch.compile makes of it."""
    quick = torch.compile(run)
    return lambda: quick(x)


def cuda_graph(run: Callable[[Tensor], object], x: Tensor) -> Call:
    """Replay its kernels, recorded once; inputs stay where they are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # recording wants all that is allocated once to be there
        for _ in range(3):
            run(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(x)
    return graph.replay


MODES: dict[str, Mode] = {"eager": eager, "compiled": compiled, "CUDA graph": cuda_graph}


class Cell(NamedTuple):
    """One row of the table."""

    network: str
    batch: int
    mode: str


def gpu_cells() -> list[Cell]:
    """Return all that is measured."""
    return [Cell(*cell) for cell in product(NETWORKS, BATCHES, MODES)]


def event_milliseconds(call: Call) -> float:
    """Time one call by CUDA events, on the device itself."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def measure_gpu(
    model: nn.Module,
    x: Tensor,
    mode: Mode,
    rounds: int,
    progress: Progress,
    clock: Callable[[Call], float] | None = event_milliseconds,
) -> dict[str, Any]:
    """Compare bare passes of `model` over `x` with those that take the path as well.

    Eager passes are hooked, as they are served; the other modes run the exported graph, the bare one
    included, so that the two differ by the path alone.
    """
    with torch.no_grad():
        if mode is eager:
            with _gated(model, x) as gated:
                return _compared(model, gated.run, x, mode, rounds, progress, clock)
        with observed_graph(model, x) as graph:
            return _compared(without_path(graph), graph, x, mode, rounds, progress, clock)


def _compared(
    bare: Callable[[Tensor], object],
    own: Callable[[Tensor], object],
    x: Tensor,
    mode: Mode,
    *turns: Any,
) -> dict[str, Any]:
    calls = {"stock": mode(bare, x), "control": mode(bare, x), "path": mode(own, x)}
    times = take_turns(calls, *turns)
    return ratio_row(times["stock"], times["path"], times["control"], seed=0)


def _gated(model: nn.Module, x: Tensor) -> GatedBackbone:
    recipe = ActivationRecipe()
    return GatedBackbone(model, recipe.router(recipe.sites(model, x[:1], None)))


@contextmanager
def observed_graph(model: nn.Module, x: Tensor) -> Iterator[fx.GraphModule]:
    """Give the model as a graph (N, ...) -> logits, statistics."""
    with _gated(model, x) as gated:
        yield export_graph(gated, x[:1])


def without_path(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a copy that gives the logits alone; nothing is computed for the path."""
    bare, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    returned = bare.graph_copy(graph.graph, copied)
    bare.output(returned[0] if isinstance(returned, tuple | list) else returned)
    bare.eliminate_dead_code()
    return fx.GraphModule(graph, bare)


def write_gpu(folder: Path, *, rounds: int, progress: Progress) -> list[dict[str, Any]]:
    """Measure all cells; write `gpu.md` and `gpu.json` to `folder`."""
    rows: list[dict[str, Any]] = []
    for cell in gpu_cells():
        model = bench_network(cell.network, 0).cuda()
        x = bench_images(cell.batch, 1).cuda()
        torch.compiler.reset()
        rows.append(cell._asdict() | measure_gpu(model, x, MODES[cell.mode], rounds, progress))
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"device": torch.cuda.get_device_name(), "rounds": rounds, "versions": versions()}
    (folder / "gpu.json").write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    (folder / "gpu.md").write_text(page(facts, rows))
    return rows


def page(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown page."""
    lines = []
    for row in rows:
        (low, high), (least, most) = row["interval"], row["control_interval"]
        lines.append(
            [
                *(str(row[name]) for name in Cell._fields),
                *(f"{row[name]:.3f} ms" for name in ("stock", "guarded")),
                f"**{row['ratio']:.3f}** [{low:.3f}, {high:.3f}]",
                f"{row['control']:.3f} [{least:.3f}, {most:.3f}]",
                "yes" if row["ratio"] <= BUDGET else "no",
            ]
        )
    known = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    head = ["bare", "with the path", "ratio", "control", f"at most {BUDGET}"]
    return (
        "# What taking the path costs on a GPU\n\n"
        f"`pathguard bench-gpu --rounds {facts['rounds']}` on {facts['device']}, {known}. CUDA events; "
        "medians over rounds of ratios within a round, with 95 % bootstrap intervals.\n\n"
        + table([*Cell._fields, *head], lines)
    )
