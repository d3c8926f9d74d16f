"""A faster form answers the same, with the same path, or it does not answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from defense import optimize
from defense.backbone import GatedBackbone
from defense.errors import GuardFailure
from defense.optimize import (
    FORMS,
    Form,
    Quick,
    check_alike,
    export_graph,
    fold_batch_norms,
    observed,
    probe_inputs,
    take_shortcut,
    too_close,
)
from defense.routers.activation import ActivationRouter
from defense.sites import discover_sites
from defense.types import PathLayout

EXACT, HALVED = FORMS
EXAMPLE = torch.zeros(1, 3, 16, 16)


class Normed(nn.Module):
    """Convolutions with batch norms; the second convolution is also read by a branch of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16, affine=False)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        y = self.conv2(x)
        out: Tensor = self.head((self.act(self.norm2(y)) + 0.1 * y).mean((2, 3)))
        return out


def normed(*, branches: bool = True) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Normed() if branches else nn.Sequential(
            nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16, affine=False), nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip
        net(torch.randn(64, 3, 16, 16) + 1)  # so that running statistics are no zeros and ones
    return net.eval()


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def spied(quick: Quick, taken: list[int]) -> Quick:
    """Return a form that notes how many rows it is given."""

    def graph(inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        taken.append(len(inputs))
        return quick.graph(inputs)

    return Quick(quick.form, graph)


def attached(net: nn.Module) -> GatedBackbone:
    layout = PathLayout(discover_sites(net, EXAMPLE), ("mean", "max"))
    return GatedBackbone(net, ActivationRouter(layout))


@pytest.fixture(autouse=True)
def _gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks are not what is faster in another form."""
    monkeypatch.setattr(optimize, "GAIN", 0)


@pytest.fixture
def backbone() -> Iterator[GatedBackbone]:
    with attached(normed()) as found:
        yield found


def nothing_moves(inputs: Tensor) -> Tensor:
    return torch.ones(len(inputs))


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_graph_gives_the_logits_and_the_path_that_the_hooks_see(rows: int) -> None:
    net, x = normed(), images(rows)
    with torch.no_grad(), attached(net) as found:
        logits, statistics = export_graph(found, EXAMPLE)(x)
        expected = found.run(x)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(statistics, 1), expected.path, rtol=1e-4, atol=1e-5)


def test_batch_norms_are_folded_but_not_into_what_others_read_too() -> None:
    left = []
    for branches in (True, False):
        with attached(normed(branches=branches)) as found:
            graph = export_graph(found, EXAMPLE)
        left.append(sum("batch_norm" in str(node.target) for node in graph.graph.nodes))
        assert fold_batch_norms(graph) == 0  # all that can be folded is
        assert not [name for name, _ in graph.named_buffers() if "norm1" in name]
    assert left == [1, 0]


def test_the_model_itself_keeps_its_weights(backbone: GatedBackbone) -> None:
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    shortcut = take_shortcut(backbone, EXAMPLE, nothing_moves, compiled=False)
    assert shortcut is not None
    shortcut.close()
    after = backbone.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(after[name].dtype == value.dtype for name, value in before.items())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_shortcut_answers_alike_with_an_alike_path_until_it_is_closed(
    backbone: GatedBackbone, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimize, "FORMS", (form,))
    x, share = images(40), form.tolerance
    with torch.no_grad():
        expected = backbone.run(x)
        shortcut = take_shortcut(backbone, EXAMPLE, nothing_moves, compiled=False)
        assert shortcut is not None
        assert shortcut.form == form.name
        found = backbone.run(x)
        assert found.logits.dtype == torch.float32
        strayed = (found.logits - expected.logits).abs().amax(1) / expected.logits.std(1)
        assert 0 < float(strayed.max()) < share
        assert torch.equal(found.predicted, expected.predicted)
        assert float((found.path - expected.path).norm() / expected.path.norm()) < share / 5
        shortcut.close()
        assert torch.equal(backbone.run(x).logits, expected.logits)


def test_a_row_too_close_to_call_is_run_as_it_was_and_its_neighbours_are_not(
    backbone: GatedBackbone,
) -> None:
    def wrong(inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        logits = torch.tensor([[9.0, 0, 0, 0], [1, 0.999, 0, 0]])[: len(inputs)]
        return logits, tuple(torch.zeros(len(inputs), width) for width in (32, 32))

    x = images(2)
    with torch.no_grad():
        expected = backbone.run(x)
        shortcut = optimize.Shortcut(backbone, Quick(EXACT, wrong), EXAMPLE)
        found = backbone.run(x)
        shortcut.close()
    assert found.logits[0].tolist() == [9, 0, 0, 0]
    assert not found.path[0].any()
    torch.testing.assert_close(found.logits[1], expected.logits[1])
    torch.testing.assert_close(found.path[1], expected.path[1])
    assert shortcut.again == 1


def test_rows_are_close_by_the_spread_of_their_own_logits_and_so_are_broken_ones() -> None:
    logits = torch.tensor([[10.0, 0, 0], [10, 9.9, 0], [0.01, 0, 0], [torch.nan, 0, 0]])
    assert too_close(logits, 0.1).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double(),
        lambda x: torch.cat([x, x], dim=3),
        lambda x: x[:0],
        lambda x: x.clone().requires_grad_(),
    ],
    ids=["another type", "another size", "no rows", "a gradient"],
)
def test_what_the_form_was_not_made_for_goes_the_old_way(
    backbone: GatedBackbone, change: Callable[[Tensor], Tensor]
) -> None:
    def never(inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        raise AssertionError("the shortcut was taken")

    x = change(images(2))
    backbone.model.to(x.dtype)
    shortcut = optimize.Shortcut(backbone, Quick(EXACT, never), EXAMPLE)
    assert len(backbone.model(x)) == len(x)
    assert len(backbone.model(x=x)) == len(x)
    shortcut.close()


def test_a_form_whose_logits_stray_is_refused(backbone: GatedBackbone) -> None:
    def strayed(inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        logits, statistics = observed(backbone, exact, inputs.float())
        return logits + torch.eye(4)[0], tuple(statistics)

    exact = backbone.model.forward
    with pytest.raises(GuardFailure, match=r"a logit strays by \S+ of their spread; at most 0.05"):
        check_alike(backbone, Quick(HALVED, strayed), exact, probe_inputs(EXAMPLE))


def test_a_form_whose_path_moves_is_refused(backbone: GatedBackbone) -> None:
    def moved(inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        logits, statistics = observed(backbone, exact, inputs.float())
        return logits, tuple(1.1 * part for part in statistics)

    exact = backbone.model.forward
    with pytest.raises(GuardFailure, match=r"a path moves by 0.1 of its length; at most 0.01 may"):
        check_alike(backbone, Quick(HALVED, moved), exact, probe_inputs(EXAMPLE))


def test_a_form_whose_p_values_move_is_refused(
    backbone: GatedBackbone, caplog: pytest.LogCaptureFixture
) -> None:
    looks = iter([torch.tensor([0.5]), torch.tensor([0.3]), torch.tensor([0.51])])
    with caplog.at_level(logging.INFO):
        shortcut = take_shortcut(backbone, EXAMPLE, lambda x: next(looks), compiled=False)
    assert shortcut is not None
    assert shortcut.form == "bfloat16"
    assert "float32 is not used: GuardFailure: a p-value moves by 0.2; at most 0.02 may" in (
        caplog.text
    )
    shortcut.close()


def test_where_no_form_is_faster_the_model_stays_as_it_was(
    backbone: GatedBackbone, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimize, "GAIN", 1e9)
    assert take_shortcut(backbone, EXAMPLE, nothing_moves, compiled=False) is None
    assert "forward" not in vars(backbone.model)
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert said == "optimize: the model runs as it was, for no other form is faster and alike"


def test_a_single_request_goes_the_old_way_where_the_form_gains_nothing_for_it(
    backbone: GatedBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    gains = {1: 0.9, 4: 2.0}
    monkeypatch.setattr(optimize, "GAIN", 1.05)
    monkeypatch.setattr(optimize, "_speedup", lambda old, new, x: gains[len(x)])
    exact = backbone.model.forward
    shortcut = take_shortcut(backbone, EXAMPLE, nothing_moves, compiled=False)
    assert shortcut is not None
    taken: list[int] = []
    quick = shortcut._quick
    monkeypatch.setattr(shortcut, "_quick", spied(quick, taken))

    with torch.no_grad():
        alone = backbone.model(images(1))
        backbone.model(images(2))

    assert taken == [2]
    assert torch.equal(alone, exact(images(1)))
    shortcut.close()


class Undecided(nn.Module):
    """Its way depends on the values of its input, which no graph of it can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.head = nn.ReLU(), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x.mean((2, 3)))
        out: Tensor = self.head(x if x.sum().item() > 1 else 2 * x)
        return out


class Pair(Undecided):
    """Returns something else than plain logits."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = self.head(self.act(x.mean((2, 3))))
        return logits, logits


@pytest.mark.parametrize(
    ("kind", "reason"), [(Undecided, ""), (Pair, "the backbone returns something else than logits")]
)
def test_a_model_that_cannot_be_exported_stays_as_it_was_and_one_sentence_says_why(
    kind: type[nn.Module], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with attached(kind().eval()) as found:
        assert take_shortcut(found, EXAMPLE, nothing_moves, compiled=False) is None
        assert "forward" not in vars(found.model)
    said = [r.getMessage() for r in caplog.records if r.name == "defense.optimize"]
    assert len(said) == 1
    assert "the model runs as it was, for it is not exported: " + reason in said[0].replace(
        "GuardFailure: ", ""
    )
    assert "\n" not in said[0]


def test_without_a_compiler_the_form_runs_uncompiled_and_one_sentence_says_so(
    backbone: GatedBackbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(inputs: Tensor) -> None:
        raise RuntimeError("no working C++ compiler was found\nand a page more")

    monkeypatch.setattr(torch, "compile", lambda graph, dynamic: fails)
    shortcut = take_shortcut(backbone, EXAMPLE, nothing_moves, compiled=True)
    assert shortcut is not None
    shortcut.close()
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "optimize: the model is not compiled: RuntimeError: no working C++ compiler was found"
    ]
