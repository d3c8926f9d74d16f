"""Archives of every kind that TorchServe serves for classification, and of kinds that it refuses."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tests.archives import build_archive, graphs, sources

Build = Callable[[Path, str], Path]
"""Builds the archive of a model of some name in an empty folder."""
Envelope = Literal["", "kserve", "kservev2"]


@dataclass(frozen=True)
class Kind:
    """An archive of some kind. `model`: what it is served as, where that is not its own name.

    single: takes one request at a time. slow: takes long to start. views: rows per request.
    """

    name: str
    what: str
    build: Build
    envelope: Envelope = ""
    model: str = ""
    version: str = "1.0"
    single: bool = False
    slow: bool = False
    views: int = 1

    @property
    def served_as(self) -> str:
        return self.model or self.name


@dataclass(frozen=True)
class Refused:
    """An archive that cannot be guarded, and a part of the reason."""

    name: str
    build: Build
    reason: str


@dataclass(frozen=True)
class Parts:
    """What most archives are made of; `files` are extra files by name."""

    handler: str = sources.VISION
    entry: str = ""
    model_file: bool = True
    seed: int = 0
    files: Mapping[str, str] = field(default_factory=dict)
    config: str = ""
    form: str = "default"
    version: str = "1.0"

    def __call__(self, folder: Path, name: str) -> Path:
        handler = folder / f"{name.replace('-', '_')}_handler.py"
        handler.write_text(self.handler)
        extra = _written(folder / "extra", self.files)
        config = folder / "model-config.yaml"
        config.write_text(self.config)
        return build_archive(
            folder,
            handler=f"{handler.with_suffix('')}:{self.entry}" if self.entry else handler,
            model_file_source=sources.NETWORK if self.model_file else None,
            state_dict=trained(self.seed).state_dict(),
            extra_files=[extra] if self.files else [],
            config_file=config if self.config else None,
            name=name,
            version=self.version,
            archive_format=self.form,
        )


def built_in(folder: Path, name: str) -> Path:
    """The handler `image_classifier` of TorchServe, which resizes to 224x224."""
    return build_archive(
        folder,
        model_file_source=sources.NETWORK,
        state_dict=trained(0).state_dict(),
        name=name,
    )


def requiring(folder: Path, name: str) -> Path:
    """A requirements file that names a wheel in the archive, which TorchServe installs offline."""
    wheel = write_wheel(folder)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"--no-index\n./{wheel.name}\n")
    handler = folder / "requiring_handler.py"
    handler.write_text(sources.REQUIRING)
    return build_archive(
        folder,
        handler=handler,
        model_file_source=sources.NETWORK,
        state_dict=trained(0).state_dict(),
        extra_files=[wheel],
        requirements_file=requirements,
        name=name,
    )


def write_wheel(folder: Path) -> Path:
    """Write a wheel of one module, `pathguard_test_wording`."""
    wheel = folder / "pathguard_test_wording-1.0-py3-none-any.whl"
    about = "pathguard_test_wording-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr("pathguard_test_wording.py", sources.REQUIRED)
        packed.writestr(
            f"{about}/METADATA",
            "Metadata-Version: 2.1\nName: pathguard_test_wording\nVersion: 1.0\n",
        )
        packed.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        packed.writestr(
            f"{about}/RECORD",
            f"pathguard_test_wording.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n",
        )
    return wheel


def _written(folder: Path, files: Mapping[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def digits() -> tuple[Tensor, Tensor]:
    """Return the digits as colour images (1797, 3, 32, 32) in 8-bit steps of [0, 1], and labels."""
    data = load_digits()
    grey = nn.functional.interpolate(torch.tensor(data.images).float()[:, None] / 16, size=32)
    return (grey * 255).floor().expand(-1, 3, -1, -1) / 255, torch.tensor(data.target)


def trained(seed: int) -> nn.Module:
    """Return the archives' network, random but for its head, a ridge regression on 600 digits."""
    namespace: dict[str, type[nn.Module]] = {}
    exec(sources.NETWORK, namespace)  # noqa: S102 - our own source, as the archives have it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = namespace["Net"]().eval().requires_grad_(False)
    images, labels = digits()
    features = net.features((images[:600] - 0.5) / 0.5).double()  # type: ignore[operator]
    shift, scale = features.mean(0), features.std(0) + 1e-3
    x = (features - shift) / scale
    target = 10 * nn.functional.one_hot(labels[:600], 10).double()
    gram = x.T @ x + 20 * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, x.T @ target) / scale[:, None]
    head = net.get_submodule("head")
    assert isinstance(head, nn.Linear)
    head.weight.copy_(weight.T)
    head.bias.copy_(target.mean(0) - shift @ weight)
    return net


_NAMES = {"index_to_name.json": json.dumps({str(i): f"digit {i}" for i in range(10)})}
_PACKAGE = {
    **_NAMES,
    "wording/__init__.py": sources.WORDING,
    "wording_helper.py": sources.WORDING_HELPER,
}
_FUNCTION = {"function_net.py": sources.NETWORK}


def _compiled(backend: str) -> Parts:
    return Parts(config=sources.COMPILED.replace("BACKEND", backend))


def _graph(save: Callable[[nn.Module, Path], object]) -> graphs.Graph:
    return graphs.Graph(save, lambda: trained(0))


def _program(save: Callable[[nn.Module, Path], object]) -> graphs.Graph:
    return graphs.Graph(save, lambda: trained(0), "graph.pt2", sources.EXPORTED)


def _function(name: str, entry: str = "") -> Parts:
    source = sources.FUNCTION.replace("ENTRY", name)
    return Parts(source, entry, model_file=False, files=_FUNCTION)


KINDS = (
    Kind("built-in", "the built-in `image_classifier`", built_in),
    Kind("preprocess", "a class that overrides `preprocess` only", Parts(sources.PREPROCESS)),
    Kind("inference", "a class that overrides `inference` only", Parts(sources.INFERENCE)),
    Kind("postprocess", "a class that overrides `postprocess` only", Parts(sources.POSTPROCESS)),
    Kind("handle", "a class of its own with `initialize` and `handle`", Parts(sources.HANDLE)),
    Kind("function", "a module-level function `handle`", _function("handle")),
    Kind("named-function", "`file:function`", _function("answer", "answer")),
    Kind("five-crops", "five crops of each image in one run", Parts(sources.FIVE_CROPS), views=5),
    Kind(
        "crops-by-request",
        "one run of five crops for each image",
        Parts(sources.CROPS_BY_REQUEST),
        views=5,
    ),
    Kind(
        "mirrored-calls",
        "one run for each view of the batch: as it is, and mirrored",
        Parts(sources.MIRRORED_CALLS),
        views=2,
    ),
    Kind(
        "mirrored-batch",
        "one run of the batch and its mirror image behind it",
        Parts(sources.MIRRORED_BATCH),
        views=2,
    ),
    Kind("runs", "one run for each request of a batch", Parts(sources.ONE_RUN_PER_REQUEST)),
    Kind(
        "single",
        "a handler that answers one request at a time (`batchSize` 1)",
        Parts(sources.ONE_REQUEST_AT_A_TIME),
        single=True,
    ),
    Kind("requirements", "a `requirementsFile` that TorchServe installs", requiring),
    Kind(
        "extra-files",
        "extra files: `index_to_name.json`, a module, a package",
        Parts(sources.NAMED, files=_PACKAGE),
    ),
    Kind("compiled-eager", "`pt2: {compile: {backend: eager}}`", _compiled("eager")),
    Kind(
        "compiled-inductor",
        "`pt2: {compile: {backend: inductor}}`",
        _compiled("inductor"),
        slow=True,
    ),
    Kind("scripted", "TorchScript from `torch.jit.script`", _graph(graphs.scripted)),
    Kind("traced", "TorchScript from `torch.jit.trace`", _graph(graphs.traced)),
    Kind("exported", "a program of `torch.export`", _program(graphs.exported)),
    Kind("version-1", "version 1.0 of a model", Parts(), model="versions"),
    Kind(
        "version-2",
        "version 2.0 of the same model beside it",
        Parts(seed=1, version="2.0"),
        model="versions",
        version="2.0",
    ),
    Kind("folder", "a folder (`--archive-format no-archive`)", Parts(form="no-archive")),
    Kind("tar", "a gzipped tar (`--archive-format tgz`)", Parts(form="tgz")),
    Kind("stored", "an uncompressed zip (`--archive-format zip-store`)", Parts(form="zip-store")),
    Kind("kserve-v1", "in KServe's v1 envelope", Parts(), envelope="kserve", single=True),
    Kind("kserve-v2", "in KServe's v2 envelope", Parts(), envelope="kservev2", single=True),
)

REFUSED = (
    Refused("streaming", Parts(sources.STREAMING), "streams answers, which cannot be taken back"),
    Refused("asynchronous", Parts(sources.ASYNCHRONOUS), "is asynchronous or a generator"),
    Refused(
        "async-worker",
        Parts(config="asyncCommunication: true\n"),
        "it gets its requests one by one while it answers others",
    ),
    Refused("parallel", Parts(config="parallelType: pp\n"), "it is spread over several processes"),
    Refused("stateful", Parts(config="sequenceBatching: true\n"), "keeps the state of a sequence"),
    Refused("two-models", Parts(sources.TWO_MODELS), "holds several models"),
    Refused("frozen", _graph(graphs.frozen), "it calls no modules, as after torch.jit.freeze"),
    Refused("two-rows", _program(graphs.exported_for_two), "takes batches of 2 and no others"),
    Refused("random-views", Parts(sources.RANDOM_VIEWS), "nobody can tell whose they are"),
)
