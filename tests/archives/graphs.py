"""Archives whose models are graphs: TorchScript and programs of torch.export."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.archives import build_archive, sources

EXAMPLE = torch.zeros(2, 3, 32, 32)


@dataclass(frozen=True)
class Graph:
    """An archive that holds nothing but a graph, which `save` writes, and a handler."""

    save: Callable[[nn.Module, Path], object]
    weights: Callable[[], nn.Module]
    file: str = "graph.pt"
    handler: str = sources.PREPROCESS

    def __call__(self, folder: Path, name: str) -> Path:
        handler, source = folder / f"{name.replace('-', '_')}_handler.py", folder / "net.py"
        handler.write_text(self.handler)
        source.write_text(sources.NETWORK)
        net = imported(source)
        net.load_state_dict(self.weights().state_dict())
        with warnings.catch_warnings(action="ignore"):
            self.save(net.eval(), folder / self.file)
        return build_archive(folder, handler=handler, serialized_file=folder / self.file, name=name)


def imported(source: Path) -> nn.Module:
    """Return the network in a file, which is how TorchScript wants to read it."""
    spec = importlib.util.spec_from_file_location("net", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net: nn.Module = module.Net()
    return net


def scripted(net: nn.Module, path: Path) -> None:
    torch.jit.script(net).save(str(path))


def traced(net: nn.Module, path: Path) -> None:
    torch.jit.trace(net, EXAMPLE).save(str(path))


def frozen(net: nn.Module, path: Path) -> None:
    torch.jit.freeze(torch.jit.script(net)).save(str(path))


def exported(net: nn.Module, path: Path) -> None:
    sizes = {0: torch.export.Dim.AUTO}
    torch.export.save(_program(net, sizes), path)


def exported_for_two(net: nn.Module, path: Path) -> None:
    torch.export.save(_program(net, None), path)


def _program(net: nn.Module, sizes: dict[int, object] | None) -> torch.export.ExportedProgram:
    example: tuple[Tensor, ...] = (EXAMPLE,)
    return torch.export.export(net, example, dynamic_shapes=sizes and (sizes,))
