"""Who may import whom, and what the serving half never does."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("defense", "handlers")
ADAPTERS = (
    "handlers.torchserve",
    "handlers.torchserve_envelope",
    "handlers.torchserve_inner",
)
"""What runs inside a worker of TorchServe, beside the serving half of `defense`."""
OFFLINE_ONLY = (
    "torchattacks",
    "captum",
    "matplotlib",
    "sklearn",
    "starlette",
    "uvicorn",
    "defense.offline",
    "defense.console",
    "defense.cli",
)
ON_REQUEST = ("defense.attributions",)
"""What is imported only when an explanation was asked for: it brings captum, which brings matplotlib."""
SERVERS = ("ts", "handlers")

LAYERS = (
    ("errors", "figures", "fingerprint", "threads"),
    ("types", "folders", "scripted", "exported"),
    ("graphs",),
    ("sites", "config", "state", "archive", "patience", "keys", "trail"),
    ("routers", "detectors", "witness", "journal"),
    ("backbone", "calibration", "payload", "live", "obstacles", "attributions"),
    (
        "policy",
        "metrics",
        "exporter",
        "wrap",
        "looks",
        "memory",
        "optimize",
        "exemplars",
        "influence",
    ),
    ("guard",),
    ("reasons",),
    ("artifact", "gate"),
    ("explain", "audit", "recalibrate"),
    ("offline",),
    ("console",),
    ("cli",),
)
"""Leaves first. A module imports from the layers below its own; packages are one unit."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(p): p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))
}


def is_in(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


SERVING = [
    name
    for name in SOURCES
    if is_in(name, "defense")
    and not is_in(name, "defense.offline", "defense.console", "defense.cli", *ON_REQUEST)
]


def tree_of(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text(), str(SOURCES[name]))


def imports(name: str) -> Iterator[str]:
    """Yield all that a module imports, wherever in it, by the name of the module itself."""
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively in line {node.lineno}"
            assert node.module is not None
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            inside = [member for member in members if member in SOURCES]
            yield from inside or [node.module]


def own_imports(name: str) -> set[str]:
    return {found for found in imports(name) if is_in(found, *PACKAGES)}


def loaded_by(*modules: str) -> set[str]:
    """Return the names of all modules that a fresh interpreter has loaded after importing some."""
    code = (
        f"import {', '.join(modules)}, json, sys; sys.stdout.write(json.dumps(sorted(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_the_serving_half_loads_no_attack_no_plot_no_fit_and_no_server() -> None:
    loaded = loaded_by(*SERVING)
    assert set(SERVING) <= loaded
    unwanted = (*OFFLINE_ONLY, *ON_REQUEST, *SERVERS)
    assert [name for name in loaded if is_in(name, *unwanted)] == []


def test_the_torchserve_worker_loads_nothing_of_the_offline_half() -> None:
    """TorchServe's own vision handlers import captum; that is their business."""
    loaded = loaded_by(*ADAPTERS)
    unwanted = [name for name in (*OFFLINE_ONLY, *ON_REQUEST) if name != "captum"]
    assert [name for name in loaded if is_in(name, *unwanted)] == []


@pytest.mark.parametrize("name", [*SERVING, *ADAPTERS])
def test_a_serving_module_imports_nothing_of_the_offline_half_not_even_late(name: str) -> None:
    allowed = {"sklearn"} if is_in(name, "defense.detectors") else set()
    found = {used.split(".")[0] for used in imports(name) if is_in(used, *OFFLINE_ONLY)}
    assert found <= allowed


EXPLAINING = [name for name in SOURCES if is_in(name, *ON_REQUEST)]


@pytest.mark.parametrize("name", EXPLAINING)
def test_an_explanation_needs_captum_and_nothing_of_the_offline_half(name: str) -> None:
    found = {used for used in imports(name) if is_in(used, *OFFLINE_ONLY, *SERVERS)}
    assert all(is_in(used, "captum") for used in found)


def test_only_detectors_fit_with_scikit_learn_and_only_while_they_fit() -> None:
    for name in SERVING:
        for node in tree_of(name).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                text = ast.unparse(node)
                assert "sklearn" not in text, f"{name} imports scikit-learn at its top: {text}"


@pytest.mark.parametrize("name", [name for name in SOURCES if is_in(name, "defense")])
def test_the_core_knows_no_server(name: str) -> None:
    used = [found for found in imports(name) if is_in(found, *SERVERS)]
    if is_in(name, "defense.offline.demo", "defense.offline.archived"):
        # They pack an ordinary user's handler file, which is data to them.
        used = [found for found in used if not is_in(found, "ts")]
    assert used == [] or is_in(name, "defense.cli")


def layer_of(name: str) -> int:
    unit = name.split(".")[1]
    found = [index for index, units in enumerate(LAYERS) if unit in units]
    assert found, f"{name} is in no layer: add '{unit}' to LAYERS"
    return found[0]


@pytest.mark.parametrize(
    "name", [name for name in SOURCES if is_in(name, "defense") and "." in name]
)
def test_nobody_imports_upwards(name: str) -> None:
    for used in own_imports(name):
        if is_in(used, "defense") and used.split(".")[1] != name.split(".")[1]:
            assert layer_of(used) < layer_of(name), f"{name} imports {used} from above or beside it"


def test_no_module_is_imported_in_a_circle() -> None:
    order = list(TopologicalSorter({name: own_imports(name) for name in SOURCES}).static_order())
    assert set(SOURCES) <= set(order)


FORBIDDEN_IMPORTS = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")
FORBIDDEN_CALLS = ("eval", "exec", "compile", "print", "input", "breakpoint", "__import__")
FORBIDDEN_ATTRIBUTES = (
    "torch.load",
    "torch.jit.load",
    "torch.hub",
    "numpy.load",
    "np.load",
    "yaml.load",
    "os.system",
)


@pytest.mark.parametrize("name", [*SERVING, *EXPLAINING, *ADAPTERS])
def test_the_serving_half_unpickles_evaluates_and_prints_nothing(name: str) -> None:
    assert [used for used in imports(name) if is_in(used, *FORBIDDEN_IMPORTS)] == []
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"line {node.lineno}"
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in FORBIDDEN_ATTRIBUTES, f"line {node.lineno}"


@pytest.mark.parametrize("name", [*SERVING, *EXPLAINING])
def test_a_serving_module_keeps_no_state_of_its_own(name: str) -> None:
    """Nothing is rebound through `global`, so two models in one process cannot meet."""
    assert [node for node in ast.walk(tree_of(name)) if isinstance(node, ast.Global)] == []
