"""TorchScript modules and torch.export programs are observed in their graphs, as their eager twins."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.ops import Conv2dNormActivation

from defense.backbone import GatedBackbone
from defense.config import ModelSettings
from defense.errors import SiteError
from defense.fingerprint import fingerprint
from defense.graphs import class_of, make_observable
from defense.guard import Guard
from defense.offline.attacks import make_attack
from defense.routers.activation import STATISTICS, ActivationRouter
from defense.routers.gating import gated
from defense.sites import discover_sites
from defense.types import PathLayout, Routed, Site
from tests.conftest import Digits
from tests.served import SmallNet, hook_count, images_like_noise, seeded_net
from tests.test_sites import Functional, Squeeze

Convert = Callable[[nn.Module, Tensor], nn.Module]


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Return a network in eval mode whose batch norms have seen something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build().eval()
        for buffer in net.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    return net


def reloaded(script: torch.jit.ScriptModule) -> nn.Module:
    """Return a module as a server has it: saved and loaded."""
    content = io.BytesIO()
    torch.jit.save(script, content)
    content.seek(0)
    loaded: nn.Module = torch.jit.load(content)
    return loaded


def scripted(net: nn.Module, _example: Tensor) -> nn.Module:
    return reloaded(torch.jit.script(net))


def traced(net: nn.Module, example: Tensor) -> nn.Module:
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        return reloaded(torch.jit.trace(net, example))


def exported(net: nn.Module, example: Tensor) -> nn.Module:
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(net, (example,), dynamic_shapes=(batch,))
    content = io.BytesIO()
    torch.export.save(program, content)
    content.seek(0)
    return torch.export.load(content).module()


def decomposed(net: nn.Module, example: Tensor) -> nn.Module:
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(net, (example,), dynamic_shapes=(batch,))
    graph: nn.Module = program.run_decompositions().module()
    return graph


KINDS: tuple[Convert, ...] = (scripted, traced, exported)
NETS: dict[str, Callable[[], nn.Module]] = {
    "in-place, shared activations": seeded_net,
    "functional activations": Functional,
    "a ResNet": lambda: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], 5),
    "a transformer": lambda: VisionTransformer(32, 8, 2, 2, 8, 12, num_classes=5),
    "subclasses of Sequential": lambda: nn.Sequential(
        Conv2dNormActivation(3, 6, 3, activation_layer=nn.Hardswish),
        Conv2dNormActivation(6, 6, 3, activation_layer=None),
        Squeeze(6),
        nn.Flatten(),
        nn.Linear(6 * 32 * 32, 5),
    ),
}


def example_for(net: nn.Module) -> Tensor:
    channels = next(weight for weight in net.parameters() if weight.dim() == 4).shape[1]
    draw = torch.Generator().manual_seed(1)
    return torch.rand(3, channels, 32, 32, generator=draw)


def run(model: nn.Module, x: Tensor, sites: tuple[Site, ...]) -> Routed:
    router = ActivationRouter(PathLayout(sites, STATISTICS))
    with torch.inference_mode(), GatedBackbone(model, router) as backbone:
        backbone.run(x)  # TorchScript specialises its graph in the first runs
        backbone.run(x)
        return backbone.run(x)


@pytest.mark.parametrize("convert", KINDS)
@pytest.mark.parametrize("build", NETS.values(), ids=NETS)
def test_a_graph_has_the_sites_and_the_path_of_its_eager_twin_and_its_own_logits(
    build: Callable[[], nn.Module], convert: Convert
) -> None:
    net = seeded(build)
    x = example_for(net)
    sites = discover_sites(net, x)
    want = run(net, x, sites)
    graph = convert(net, x)
    with torch.inference_mode():
        bare = graph(x)

    assert discover_sites(graph, x) == sites
    got = run(graph, x, sites)
    assert torch.equal(got.logits, bare)
    assert torch.allclose(got.path, want.path, rtol=0, atol=1e-5)
    assert fingerprint(graph) == fingerprint(net)
    assert hook_count(graph) == hook_count(convert(net, x))
    with torch.inference_mode():
        assert torch.equal(graph(x), bare)


def test_decomposed_programs_are_observed_too() -> None:
    net = seeded(NETS["a ResNet"])
    x = example_for(net)
    sites = discover_sites(net, x)
    want, got = run(net, x, sites), run(decomposed(net, x), x, sites)
    assert torch.allclose(got.path, want.path, rtol=0, atol=1e-5)


@pytest.mark.parametrize("convert", [lambda n, x: torch.jit.script(n), lambda n, x: traced(n, x)])
def test_a_module_that_was_never_saved_or_has_run_before_is_observed(convert: Convert) -> None:
    net, x = seeded_net(), images_like_noise(2, seed=0)
    graph = convert(net, x)
    for _ in range(3):
        graph(x)
    sites = discover_sites(graph, x)
    assert torch.equal(run(graph, x, sites).path, run(net, x, sites).path)


@pytest.mark.parametrize("convert", KINDS)
def test_a_guard_of_the_eager_network_judges_its_graphs_alike(
    convert: Convert, trained: SmallNet, guard: Guard, digits: Digits
) -> None:
    x = digits.images[500:540]
    with guard.attach(trained) as attached, torch.inference_mode():
        want = attached(x)
    with guard.attach(convert(trained, x)) as attached, torch.inference_mode():
        got, alone = attached(x), attached(x[3:4])
    assert got.verdicts == want.verdicts
    assert torch.allclose(got.scored.score, want.scored.score, atol=1e-4)
    assert torch.allclose(alone.scored.score, want.scored.score[3:4], atol=1e-4)


@pytest.mark.parametrize("convert", KINDS)
def test_optimize_leaves_a_graph_observed_whether_it_finds_a_faster_form_or_not(
    convert: Convert, trained: SmallNet, guard: Guard, digits: Digits
) -> None:
    x = digits.images[500:508]
    model = convert(trained, x)
    with guard.attach(model) as attached, torch.inference_mode():
        want = attached(x)
    with guard.attach(model, ModelSettings(optimize=True)) as attached, torch.inference_mode():
        got = attached(x)
    assert torch.allclose(got.scored.p_value, want.scored.p_value, atol=0.05)
    with guard.attach(model) as attached, torch.inference_mode():
        assert torch.equal(attached(x).scored.score, want.scored.score)


@pytest.mark.parametrize("convert", KINDS)
def test_a_graph_inside_an_eager_model_is_observed(convert: Convert) -> None:
    x = images_like_noise(2, seed=0)
    inner = convert(seeded_net(), x)
    model = nn.Sequential()
    model.add_module("net", inner)
    assert [site.module for site in discover_sites(model, x)] == [
        "net.act",
        "net.block.relu",
        "net.block",
    ]


@pytest.mark.parametrize("convert", KINDS)
def test_attacks_find_gradients_and_leave_a_graph_as_it_was(convert: Convert) -> None:
    x = images_like_noise(4, seed=0)
    net = seeded_net()
    model = convert(net, x)
    make_observable(model)
    before = model(x)
    changed, wanted = (
        make_attack("pgd", eps=0.1).run(one, x, before.argmax(1), seed=0) for one in (model, net)
    )
    assert not torch.equal(changed, x)
    assert torch.equal(changed, wanted)
    assert torch.equal(model(x), before)


class Choosing(nn.Module):
    """Takes arguments by name, with a default, and returns a tuple from one of its parts."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return y * 2, x

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.act, self.head = self.Pair(), nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: float = 2.0, twice: bool = False) -> Tensor:
        y = self.act(self.pair(x)[0])
        if twice:
            y = self.act(y - 0.5)
        logits: Tensor = self.head(y.mean((2, 3))) * scale
        return logits


def test_arguments_by_name_branches_and_tuples_are_as_in_the_eager_module() -> None:
    net, x = seeded(Choosing), images_like_noise(2, seed=0)
    script = scripted(net, x)
    assert discover_sites(script, x) == discover_sites(net, x)
    seen: dict[nn.Module, list[Tensor]] = {net: [], script: []}
    for model, outputs in seen.items():
        for part in ("act", "pair"):
            hooked = dict(model.named_modules())[part]
            hooked.register_forward_hook(
                lambda _m, _a, out, outputs=outputs: outputs.append(
                    (out[0] if isinstance(out, tuple) else out).clone()
                )
            )
        assert torch.equal(model(x=x, twice=True), model(x, 2.0, True))
        model(x)
    assert len(seen[net]) == len(seen[script]) == 8
    assert all(map(torch.equal, seen[net], seen[script]))
    with pytest.raises(RuntimeError, match="Unknown keyword argument 'wrong'"):
        script(x, wrong=1)


@pytest.mark.parametrize("convert", KINDS)
def test_what_a_hook_raises_reaches_the_caller_and_the_next_pass_is_whole(convert: Convert) -> None:
    x = images_like_noise(2, seed=0)
    model = convert(seeded_net(), x)
    make_observable(model)
    make_observable(model)

    def failing(_module: nn.Module, _args: Any, _output: Any) -> None:
        raise KeyError("mine")

    handle = dict(model.named_modules())["act"].register_forward_hook(failing)
    with pytest.raises(KeyError, match="mine"):
        model(x)
    handle.remove()
    assert torch.equal(model(x), seeded_net()(x))


def test_an_exported_program_can_be_gated_and_torchscript_says_that_it_cannot() -> None:
    net, x = seeded_net(), images_like_noise(2, seed=0)
    sites = discover_sites(net, x)
    gates = [torch.rand(2, site.channels) for site in sites]
    answers = []
    for model in (net, exported(net, x)):
        make_observable(model)
        with gated(model, sites, gates), torch.no_grad():
            answers.append(model(x))
    assert torch.equal(*answers)

    script = scripted(net, x)
    make_observable(script)
    with gated(script, sites, gates), pytest.raises(SiteError, match="can be read and not gated"):
        script(x)


def frozen() -> nn.Module:
    return reloaded(torch.jit.freeze(torch.jit.script(seeded_net())))


def without_forward() -> nn.Module:
    class Other(nn.Module):
        @torch.jit.export
        def answer(self, x: Tensor) -> Tensor:
            return x

    return torch.jit.script(Other())


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(1, 3, 3), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.drop(self.conv(x)).mean((2, 3)))


def traced_in_training() -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        example = images_like_noise(2, seed=0)
        graph: nn.Module = torch.jit.trace(Dropping(), example, check_trace=False)
    return graph.eval()


def exported_in_training() -> nn.Module:
    return exported(Dropping().train(), images_like_noise(2, seed=0))


def of_two_rows() -> nn.Module:
    return torch.export.export(seeded_net(), (images_like_noise(2, seed=0),)).module()


def without_memory() -> nn.Module:
    program = exported(seeded_net(), images_like_noise(2, seed=0))
    assert isinstance(program, torch.fx.GraphModule)
    for node in program.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    return program


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (frozen, "it calls no modules, as after torch.jit.freeze"),
        (without_forward, "the TorchScript model has no method 'forward'"),
        (traced_in_training, "runs 'aten::dropout' as in training"),
        (exported_in_training, r"runs 'aten\.dropout\.default' as in training"),
        (of_two_rows, "takes batches of 2 and no others; export it with a dynamic first"),
        (without_memory, "its operators remember no modules"),
    ],
)
def test_a_graph_that_cannot_be_observed_says_why(
    build: Callable[[], nn.Module], reason: str
) -> None:
    with pytest.raises(SiteError, match=reason):
        make_observable(build())


def test_a_scripted_module_in_training_mode_is_refused_by_its_layer() -> None:
    with pytest.raises(SiteError, match=r"the layer 'drop' \(Dropout\) is in training mode"):
        discover_sites(torch.jit.script(Dropping().train()), images_like_noise(2, seed=0))


class OwnConv(nn.Conv2d):
    pass


class OwnSequence(nn.Sequential):
    pass


class OwnBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


@pytest.mark.parametrize("convert", KINDS)
@pytest.mark.parametrize(
    ("part", "kind"),
    [
        (nn.ReLU(), nn.ReLU),
        (nn.BatchNorm2d(3), nn.BatchNorm2d),
        (Conv2dNormActivation(3, 3), Conv2dNormActivation),
        (OwnConv(3, 3, 1), nn.Conv2d),
        (OwnSequence(nn.ReLU(), nn.Tanh()), nn.Sequential),
        (OwnBlock(), nn.Module),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_parts_of_graphs_keep_the_class_that_they_had(
    convert: Convert, part: nn.Module, kind: type[nn.Module]
) -> None:
    model = convert(nn.Sequential(part, nn.Flatten()).eval(), torch.rand(2, 3, 4, 4))
    make_observable(model)
    assert class_of(dict(model.named_modules())["0"]) is kind
    assert class_of(part) is type(part)
