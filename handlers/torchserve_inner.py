"""The archive's own handler, loaded exactly as TorchServe would, in a worker or offline."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ts
from torch import nn
from ts.context import Context
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.model_loader import TsModelLoader
from ts.utils.util import get_yaml_config

from defense.archive import Archive, extract_archive, read_archive
from defense.errors import ArchiveError, PathGuardError
from defense.graphs import make_observable
from defense.obstacles import archive_obstacles

Handle = Callable[[Any, Context], Any]


@dataclass(frozen=True)
class InnerHandler:
    """The archive's entry point, ready to answer, and the backbone that it holds."""

    handle: Handle
    backbone: nn.Module


def load_inner(handler: str, manifest: dict[str, Any], context: Context) -> InnerHandler:
    """Load and initialise `handler` as TorchServe does; ArchiveError says why that fails.

    `context` is the worker's; from here on it shows the archive's own manifest.
    """
    context.manifest = manifest
    loader = TsModelLoader()
    function_name: str | None
    try:
        module, function_name = loader._load_handler_file(handler)
    except ImportError as error:
        module, function_name = _built_in(loader, handler, error), None
    if hasattr(module, function_name or "handle"):
        entry, initialize = loader._get_function_entry_point(module, function_name or "handle")
        owner: object = module
    else:
        entry, initialize = loader._get_class_entry_point(module)
        owner = entry.__self__
    if inspect.iscoroutinefunction(entry) or inspect.isgeneratorfunction(entry):
        raise ArchiveError(
            f"the archive's handler '{handler}' is asynchronous or a generator, so its answers are "
            "not there when it returns; only handlers that return a batch's answers can be guarded"
        )
    initialize(context)
    backbone = find_backbone(owner)
    make_observable(backbone)
    return InnerHandler(entry, backbone)


def _built_in(loader: TsModelLoader, handler: str, cause: ImportError) -> Any:
    try:
        return loader._load_default_handler(handler)
    except ImportError as error:
        raise ArchiveError(
            f"the archive's handler '{handler}' cannot be imported ({cause}) and TorchServe has no "
            "built-in of that name; install what it needs"
        ) from error


def find_backbone(owner: object) -> nn.Module:
    """Return the one module that a handler object, or a handler's Python module, holds.

    Looks at its attributes and, one level down, at those of the objects it holds. `model` wins where
    there are several.
    """
    found = _modules_in(owner, depth=1)
    inside = {id(part) for m in found.values() for part in m.modules() if part is not m}
    found = {name: module for name, module in found.items() if id(module) not in inside}
    distinct = {id(module): name for name, module in reversed(list(found.items()))}
    if not distinct:
        raise ArchiveError(
            "the archive's handler holds no torch.nn.Module after it was initialised; "
            "only eager models, TorchScript and programs of torch.export can be guarded"
        )
    if len(distinct) > 1:
        preferred = [name for name in distinct.values() if name.split(".")[-1] == "model"]
        if len(preferred) != 1:
            names = ", ".join(sorted(distinct.values()))
            raise ArchiveError(
                f"the archive's handler holds several models ({names}); "
                "name the served one 'model' and no other"
            )
        return found[preferred[0]]
    return found[next(iter(distinct.values()))]


def _modules_in(owner: object, *, depth: int) -> dict[str, nn.Module]:
    try:
        attributes = vars(owner)
    except TypeError:
        return {}
    found: dict[str, nn.Module] = {}
    for name, value in attributes.items():
        if isinstance(value, nn.Module):
            found[name] = value
        elif depth and _own_object(value):
            inner = _modules_in(value, depth=depth - 1)
            found |= {f"{name}.{inner_name}": module for inner_name, module in inner.items()}
    return found


def _own_object(value: object) -> bool:
    """Say whether `value` is an instance of a class of the archive (or of the handler's base)."""
    if inspect.ismodule(value) or inspect.isclass(value) or callable(value):
        return False
    return not type(value).__module__.startswith(("builtins", "torch", "captum", "logging", "ts."))


class OpenArchive:
    """An archive unpacked and loaded for offline use: the answers that a server would give."""

    def __init__(self, archive: Archive, inner: InnerHandler, context: Context) -> None:
        self.archive = archive
        self._inner = inner
        self._context = context

    @property
    def backbone(self) -> nn.Module:
        return self._inner.backbone

    def answer(self, payloads: Sequence[bytes]) -> list[object]:
        """Answer request bodies in one batch, through the archive's own preprocessing."""
        count = len(payloads)
        self._context.request_ids = {i: f"offline-{i}" for i in range(count)}
        self._context.request_processor = [_Request() for _ in range(count)]
        answers = self._inner.handle([{"body": p} for p in payloads], self._context)
        if not isinstance(answers, list) or len(answers) != count:
            raise ArchiveError(
                f"the handler does not return a list of {count} answers to {count} requests, without "
                "which TorchServe answers none of them"
            )
        return answers


class _Request:
    """What a handler may ask of a request, offline: it has no headers."""

    def __init__(self) -> None:
        self._response: dict[str, str] = {}

    def get_request_property(self, _key: str) -> None:
        return None

    def get_request_properties(self) -> dict[str, str]:
        return {}

    def report_status(self, _code: int, **_phrase: str) -> None:
        return None

    def add_response_property(self, key: str, value: str) -> None:
        self._response[key] = value

    def get_response_headers(self) -> dict[str, str]:
        return self._response


@contextmanager
def open_archive(path: Path, folder: Path, *, gpu: int | None = None) -> Iterator[OpenArchive]:
    """Unpack the archive at `path` into `folder` and load its handler, without a server.

    This runs the archive's code, as serving it would. Imports from the archive are undone at the
    end, so that several archives can be opened one after the other.
    """
    archive = read_archive(path)
    if obstacles := archive_obstacles(archive):
        raise ArchiveError(obstacles[0])
    extract_archive(path, folder)
    context = _offline_context(archive, folder, gpu)
    with _imports_from(folder), _quiet("ts"):
        try:
            inner = load_inner(str(archive.handler), archive.manifest, context)
        except PathGuardError:
            raise
        except Exception as error:
            raise ArchiveError(
                f"the handler of {path} fails to load outside of a server "
                f"({type(error).__name__}: {error}); mend that first"
            ) from error
        yield OpenArchive(archive, inner, context)


def _offline_context(archive: Archive, folder: Path, gpu: int | None) -> Context:
    model = archive.manifest["model"]
    settings = model.get("configFile") if isinstance(model, dict) else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # TorchServe leaves this file open
        metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
    metrics.initialize_cache()
    return Context(
        archive.model_name,
        str(folder),
        archive.manifest,
        1,
        gpu,
        "offline",
        metrics=metrics,
        model_yaml_config=get_yaml_config(str(folder / settings)) if settings else {},
    )


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep TorchServe's handlers from logging what only makes sense inside a server."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _imports_from(folder: Path) -> Iterator[None]:
    before, path, cwd = set(sys.modules), list(sys.path), Path.cwd()
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(cwd)
        sys.path[:] = path
        for name in set(sys.modules) - before:
            origin = getattr(sys.modules[name], "__file__", None)
            if origin and Path(origin).is_relative_to(folder):
                del sys.modules[name]
