"""How the guard's cost grows with the number of sites, channels and classes.

Synthetic networks of which one dimension is varied at a time. What is measured is the guard's own
work, path and score; it should grow as a straight line in each, so every row is set against the line
through the first and the last.
"""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defense.backbone import GatedBackbone
from defense.guard import Guard
from defense.offline.cost.page import table
from defense.offline.cost.turns import take_turns
from defense.offline.fit import fit_module, versions
from defense.offline.progress import Progress, Silent
from defense.types import Routed

SIDE, BATCH, FIT_IMAGES = 16, 8, 128
QUANTITIES = {"path": "taking the path", "score": "scoring it"}


@dataclass(frozen=True)
class Size:
    """A network: `sites` observed activations of `channels` channels each, and `classes`."""

    sites: int = 16
    channels: int = 64
    classes: int = 10


AXES: dict[str, tuple[int, ...]] = {
    "sites": (8, 16, 32, 64, 128),
    "channels": (32, 64, 128, 256, 512),
    "classes": (10, 100, 250, 500, 1000),
}


def network(size: Size) -> nn.Module:
    """Return a chain of activations: as little beside the sites as there can be."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem, head = nn.Conv2d(3, size.channels, 1), nn.Linear(size.channels, size.classes)
    chain = [nn.LeakyReLU(0.9) for _ in range(size.sites)]
    return nn.Sequential(stem, *chain, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


def measure(size: Size, rounds: int) -> dict[str, float]:
    """Return milliseconds of the bare pass, of the path on top, and of the score of a batch."""
    model = network(size)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(FIT_IMAGES + BATCH, 3, SIDE, SIDE, generator=draw)
    names = [str(index) for index in range(size.classes)]
    guard = fit_module(model, images[:FIT_IMAGES].split(32), class_names=names)
    x = images[FIT_IMAGES:]
    with GatedBackbone(model, guard.router) as gated, torch.no_grad():
        routed = gated.run(x)
        calls: dict[str, Callable[[], object]] = {
            "bare": partial(_bare, gated, x),
            "run": partial(gated.run, x),
            "score": partial(_scored, guard, routed),
        }
        times = take_turns(calls, rounds, Silent())
    path = statistics.median(a - b for a, b in zip(times["run"], times["bare"], strict=True))
    return {"bare": statistics.median(times["bare"]), "path": path} | {
        "score": statistics.median(times["score"])
    }


def _bare(gated: GatedBackbone, x: Tensor) -> object:
    return gated.model(x)


def _scored(guard: Guard, routed: Routed) -> object:
    return guard.score(routed)


def write_scaling(folder: Path, *, rounds: int, progress: Progress) -> dict[str, Any]:
    """Measure all sizes; write `scaling.md`, `scaling.json` and `scaling.svg` to `folder`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for axis, values in AXES.items():
        found[axis] = []
        for value in values:
            size = replace(Size(), **{axis: value})
            found[axis].append(asdict(size) | measure(size, rounds))
            progress.advance()
    result = {"rounds": rounds, "versions": versions(), "axes": found}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "scaling.svg").write_text(plot(found))
    (folder / "scaling.md").write_text(page(result))
    return result


def exponent(sizes: list[float], costs: list[float]) -> float:
    """Return how a cost grows from the middle of the sizes to their end: as which power of the size.

    1 is a straight line through zero; less is a line above a fixed cost. The first half is left out
    because there the fixed cost of a call is most of it.
    """
    middle = (len(sizes) - 1) // 2
    grown, by = costs[-1] / max(costs[middle], 1e-6), sizes[-1] / sizes[middle]
    return float(torch.tensor(max(grown, 1e-6)).log() / torch.tensor(by).log())


def page(result: dict[str, Any]) -> str:
    """Return the results as a Markdown page."""
    parts = [
        "# How the guard's cost grows",
        f"`pathguard scaling --rounds {result['rounds']}`: chains of activations at "
        f"{SIDE}x{SIDE}, batch {BATCH}, default guard; {Size()}, of which one is varied. Medians over "
        "rounds, in ms. The exponent is that of the growth over the upper half of the sizes: 1 is a "
        "straight line, 2 a square.",
        "![cost against size](scaling.svg)",
    ]
    for axis, rows in result["axes"].items():
        lines = [
            [str(row[axis]), *(f"{row[name]:.3f}" for name in ("bare", *QUANTITIES))]
            for row in rows
        ]
        parts.append(f"## {axis.capitalize()}\n")
        parts.append(table([axis, "bare forward pass", *QUANTITIES.values()], lines))
        sizes = [row[axis] for row in rows]
        grown = [
            f"{what} {exponent(sizes, [row[name] for row in rows]):.2f}"
            for name, what in QUANTITIES.items()
        ]
        parts.append(f"Exponents: {', '.join(grown)}.")
    return "\n\n".join(parts) + "\n"


def plot(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return an SVG with one panel per axis."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "pathguard", "font.size": 9}):
        figure, panels = plt.subplots(
            1, len(found), figsize=(10, 3), layout="constrained", squeeze=False
        )
        for panel, (axis, rows) in zip(panels[0], found.items(), strict=True):
            for name, what in QUANTITIES.items():
                panel.plot([r[axis] for r in rows], [r[name] for r in rows], "o-", label=what)
            panel.set(xlabel=axis, ylabel="ms", xlim=(0, None), ylim=(0, None))
            panel.legend(frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)
    return file.getvalue()
