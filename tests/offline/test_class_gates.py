"""Training with class gates: which epochs, what loss, where the gates end up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from defense.offline.backbones import train_backbone
from defense.offline.cards import load_network
from defense.offline.methods import METHODS
from defense.offline.methods.class_gates import ClassGatesObjective, faster
from defense.offline.networks import CifarResNet, ClassGatedResNet
from defense.offline.training import CrossEntropy, logits, new_run, train
from defense.routers.class_gates import excess
from tests.coloured import (
    SETTINGS,
    TINY,
    coloured_images,
    interrupt_at,
    same_tensors,
    silent,
    tiny_network,
    write_folder,
)

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 1])


def gated_network() -> ClassGatedResNet:
    """Return a network whose first weights are always the same."""
    torch.manual_seed(5)
    return ClassGatedResNet(TINY)


def test_requests_take_the_plain_networks_path() -> None:
    gated, plain = gated_network().eval(), tiny_network().eval()
    found = gated.load_state_dict(plain.state_dict(), strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["class_gates"], [])
    assert torch.equal(gated(X), plain(X))
    assert torch.equal(gated.class_gates, torch.full((8, 3), 0.5))


def test_open_gates_change_nothing_and_closed_ones_leave_the_bias() -> None:
    network = gated_network().eval()
    assert torch.equal(network.gated_forward(X, LABELS, torch.ones(8, 3)), network(X))
    closed = network.gated_forward(X, LABELS, torch.zeros(8, 3))
    assert torch.equal(closed, network.head.bias.expand(4, -1))


def test_every_image_passes_the_gates_of_its_own_label() -> None:
    network = gated_network().eval()
    gates = torch.rand(8, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        network.class_gates.copy_(gates)
    found = network.gated_forward(X, LABELS)
    features = network.stages(network.stem(X)).mean((2, 3))
    for row, label, answer in zip(features, LABELS, found, strict=True):
        torch.testing.assert_close(answer, network.head(row * gates[:, label]))


def test_every_third_epoch_is_gated_once_the_warm_up_is_over() -> None:
    assert [e for e in range(9) if ClassGatesObjective().gated(e)] == [2, 5, 8]
    assert [e for e in range(18) if ClassGatesObjective(warmup=10).gated(e)] == [11, 14, 17]


def test_a_standard_epochs_loss_is_plain_cross_entropy() -> None:
    network, objective = gated_network().eval(), ClassGatesObjective()
    plain = CrossEntropy().loss(network, X, LABELS, 0)
    assert torch.equal(objective.loss(network, X, LABELS, 0), plain)
    assert torch.equal(objective.loss(network, X, LABELS, 1), plain)


def test_a_gated_epochs_loss_adds_the_density_of_open_gates() -> None:
    network, objective = gated_network().eval(), ClassGatesObjective(density_weight=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        answers = network.gated_forward(X, LABELS).float()
    expected = functional.cross_entropy(answers, LABELS, label_smoothing=0.1) + 0.3 * 0.3 * 24
    torch.testing.assert_close(objective.loss(network, X, LABELS, 2), expected)


def test_gates_step_faster_and_weights_do_not() -> None:
    network = gated_network().eval()
    wanted = (network.class_gates, network.head.weight)
    slow, fast = (
        torch.autograd.grad(ClassGatesObjective(gate_rate=rate).loss(network, X, LABELS, 2), wanted)
        for rate in (1.0, 8.0)
    )
    torch.testing.assert_close(fast[0], 8 * slow[0])
    assert torch.equal(fast[1], slow[1])
    assert torch.equal(faster(X, 8.0), X)


def test_gates_do_not_decay_and_all_convolutions_and_the_head_do() -> None:
    network = gated_network()
    decaying, others = new_run(network, SETTINGS).optimizer.param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (SETTINGS.weight_decay, 0.0)
    assert any(value is network.class_gates for value in others["params"])
    assert {id(value) for value in decaying["params"]} == {
        id(value)
        for name, value in network.named_parameters()
        if value.ndim > 1 and name != "class_gates"
    }


def test_standard_epochs_leave_the_gates_alone(tmp_path: Path) -> None:
    network, settings = gated_network(), replace(SETTINGS, epochs=2, weight_decay=0.1)
    objective = ClassGatesObjective()
    train(
        network, coloured_images(), settings, checkpoint=tmp_path / "c", objective=objective,
        console=silent(),
    )  # fmt: skip
    assert torch.equal(network.class_gates, torch.full((8, 3), 0.5))


def test_training_closes_gates_and_keeps_one_of_every_filter_open(tmp_path: Path) -> None:
    network, images = gated_network(), coloured_images(160)
    settings = replace(SETTINGS, epochs=7, learning_rate=0.1, average_decay=0.5, small_epochs=0)
    train(
        network, images, settings, checkpoint=tmp_path / "c", objective=ClassGatesObjective(),
        console=silent(),
    )  # fmt: skip
    gates = network.class_gates.detach()
    assert torch.equal(gates.amax(1), torch.ones(8))
    assert gates.min() >= 0
    assert excess(gates) < 0.6 * excess(torch.ones(8, 3))
    x = images.normalisation(images.pixels)
    right = network.gated_forward(x, images.labels).argmax(1) == images.labels
    wrong = network.gated_forward(x, (images.labels + 1) % 3).argmax(1) == images.labels
    assert right.float().mean() > 0.95
    assert wrong.float().mean() < right.float().mean() - 0.1


@pytest.mark.parametrize("call", [2, 5, 8, 11])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    tmp_path: Path, call: int
) -> None:
    images, objective = coloured_images(), ClassGatesObjective()
    whole, resumed = gated_network(), gated_network()
    first = {"objective": objective, "console": silent(), "checkpoint": tmp_path / "a"}
    second = first | {"checkpoint": tmp_path / "b"}
    train(whole, images, SETTINGS, **first)  # type: ignore[arg-type]
    undo = interrupt_at(resumed.stages, call)
    with pytest.raises(KeyboardInterrupt):
        train(resumed, images, SETTINGS, **second)  # type: ignore[arg-type]
    undo()
    restarted = ClassGatedResNet(TINY) if (tmp_path / "b").exists() else gated_network()
    train(restarted, images, SETTINGS, **second)  # type: ignore[arg-type]
    assert same_tensors(whole, restarted)


def test_the_method_goes_on_from_a_plain_card_and_its_own_can_be_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", "train", coloured_images(33))
    write_folder(tmp_path / "data", "test", coloured_images(12))
    start = None
    for name, epochs in (("plain", 1), ("class_gates", 3)):
        out = tmp_path / f"{name}.safetensors"
        train_backbone(
            tmp_path / "data",
            out,
            method=METHODS[name],
            architecture=TINY,
            settings=replace(SETTINGS, epochs=epochs),
            checkpoint=tmp_path / name,
            command="",
            start=start,
        )
        start = out.with_suffix(".json")
    assert start is not None
    network, _ = load_network(start)
    assert isinstance(network, ClassGatedResNet)
    assert isinstance(network, CifarResNet)
    assert torch.equal(network.class_gates.amax(1), torch.ones(8))
    assert logits(network, X).shape == (4, 3)
