"""Training of networks that decide on their own paths, and what the paths cost."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from defense.offline.backbones import first_network, train_backbone
from defense.offline.cards import load_network
from defense.offline.methods import METHODS
from defense.offline.methods.decoupled import (
    DecoupledObjective,
    alignment,
    flops,
    information,
    open_ratios,
    openness,
    sparsity,
)
from defense.offline.networks import CifarResNet, Controller, Decision, DecoupledResNet, hashed
from defense.offline.training import CrossEntropy, train
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
from tests.decoupled_net import centre

IMAGES = coloured_images()
INPUTS = IMAGES.normalisation(IMAGES.pixels)
WIDTHS = [6, 6, 8, 8, 8, 8]


def decoupled_network(seed: int = 5) -> DecoupledResNet:
    """Return a network whose first weights are always the same."""
    torch.manual_seed(seed)
    return DecoupledResNet(TINY)


def deciding_network() -> DecoupledResNet:
    """Return a network in eval mode whose every layer decides by the image, with half closed."""
    network = decoupled_network()
    with torch.no_grad():
        network.train()(INPUTS)  # batch norms learn their statistics
        network.eval()
        for module in network.modules():
            if isinstance(module, Controller):
                nn.init.normal_(module.fc1.weight)
                centre(network, module, INPUTS)
    return network


def masks_of(network: DecoupledResNet, x: Tensor) -> list[Tensor]:
    with torch.no_grad(), network.recorded() as decisions:
        network(x)
    return [decision.mask for decision in decisions]


def steps(network: DecoupledResNet, objective: DecoupledObjective, count: int, rate: float) -> None:
    optimiser = torch.optim.Adam(network.parameters(), rate)
    for _ in range(count):
        optimiser.zero_grad()
        objective.loss(network.train(), INPUTS, IMAGES.labels, 0).backward()
        optimiser.step()
    network.eval()


def test_masks_in_eval_are_binary_deterministic_and_a_row_s_own() -> None:
    network = deciding_network()
    first, again = masks_of(network, INPUTS), masks_of(network, INPUTS)
    assert [mask.shape for mask in first] == [(50, width) for width in WIDTHS]
    assert all(bool(((mask == 0) | (mask == 1)).all()) for mask in first)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    alone = masks_of(network, INPUTS[3:4])
    assert all(torch.equal(one, other[3:4]) for one, other in zip(alone, first, strict=True))
    assert len(torch.cat(first, 1).unique(dim=0)) > 1


def test_the_first_masks_are_mostly_open_and_the_same_for_all_images() -> None:
    network = decoupled_network().eval()
    ratios = open_ratios(network, INPUTS)
    assert 0.6 < sum(one.open_ratio for one in ratios.values()) / len(ratios) < 0.95
    assert all(one.variation == one.dependent == 0 for one in ratios.values())


def test_hashing_draws_hard_values_beside_soft_ones_with_the_soft_gradient() -> None:
    torch.manual_seed(0)
    wanted = torch.randn(2000, 8, requires_grad=True)
    state = torch.get_rng_state()
    mask = hashed(wanted)
    torch.set_rng_state(state)
    noisy = wanted + torch.randn_like(wanted)
    soft = (1.2 * noisy.sigmoid() - 0.1).clamp(0, 1)
    hard = (noisy > 0).float()
    assert bool(((mask == soft) | (mask == hard)).all())
    assert (mask[soft != hard] == hard[soft != hard]).float().mean() == pytest.approx(0.5, abs=0.02)
    expected = torch.autograd.grad(soft.sum(), wanted)[0]
    assert torch.equal(torch.autograd.grad(mask.sum(), wanted)[0], expected)


def test_a_controller_decides_in_single_precision_under_autocast() -> None:
    network = deciding_network()
    control = network.blocks[0].control1
    x = torch.randn(50, TINY.stem, 12, 12).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        mask = control(x)
    assert mask.dtype == torch.float32
    assert torch.equal(mask, control(x.float()))


def test_the_gradient_reaches_the_first_layer_of_every_controller_although_it_is_zero() -> None:
    network = decoupled_network().train()
    DecoupledObjective().loss(network, INPUTS, IMAGES.labels, 0).backward()
    for module in network.modules():
        if isinstance(module, Controller):
            assert module.fc1.weight.count_nonzero() == 0
            assert module.fc1.weight.grad is not None
            assert module.fc1.weight.grad.abs().sum() > 0


def test_the_losses_are_those_of_the_equations() -> None:
    draw = torch.Generator().manual_seed(1)
    mask, output = torch.rand(4, 6, generator=draw), torch.randn(4, 6, generator=draw)
    control = Controller(3, 6, classes=3)
    decision, labels = Decision(control, mask, output), torch.tensor([0, 2, 1, 0])
    p, q = output.softmax(1), mask.softmax(1)
    torch.testing.assert_close(alignment(decision), (p * (p / q).log()).sum() / 24)
    told = (mask @ control.classifier.weight.T).softmax(1)[range(4), labels]
    torch.testing.assert_close(information(decision, labels), -told.log().mean())
    torch.testing.assert_close(sparsity(decision, 0.25), (mask.sum() / 4 - 1.5).abs())


def test_without_its_own_terms_the_loss_is_that_of_plain_training() -> None:
    network = decoupled_network().train()
    none = DecoupledObjective(0, 0, 0)
    torch.manual_seed(1)
    loss = none.loss(network, INPUTS, IMAGES.labels, 0)
    torch.manual_seed(1)
    assert torch.equal(loss, CrossEntropy().loss(network, INPUTS, IMAGES.labels, 0))
    torch.manual_seed(1)
    more = replace(none, lambda_sparsity=2.0, open_ratio=0.0)
    masks = [m.sum(1).mean() for m in masks_after(1, network)]
    torch.manual_seed(1)
    expected = loss + 2 * torch.stack(masks).sum()
    torch.testing.assert_close(more.loss(network, INPUTS, IMAGES.labels, 0), expected)


def masks_after(seed: int, network: DecoupledResNet) -> list[Tensor]:
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16):
        return masks_of(network, INPUTS)


def test_nothing_of_a_step_stays_with_the_network_not_even_after_an_error() -> None:
    network = decoupled_network()
    undo = interrupt_at(network.stages[1], 1)
    with pytest.raises(KeyboardInterrupt):
        DecoupledObjective().loss(network.train(), INPUTS, IMAGES.labels, 0)
    undo()
    DecoupledObjective().loss(network.train(), INPUTS, IMAGES.labels, 0)
    controls = [module for module in network.modules() if isinstance(module, Controller)]
    assert [control.decisions for control in controls] == [None] * 6


@pytest.mark.parametrize("wanted", [0.3, 0.5, 0.75])
def test_a_strong_pressure_takes_the_open_ratio_to_where_it_is_wanted(wanted: float) -> None:
    network = decoupled_network()
    steps(network, DecoupledObjective(lambda_sparsity=1.0, open_ratio=wanted), 60, 0.02)

    def mean() -> float:
        return torch.cat(masks_of(network, INPUTS.repeat(4, 1, 1, 1)), 1).mean().item()

    if wanted == 0.5:
        assert mean() == pytest.approx(0.5, abs=0.05)
    network.train()
    assert mean() == pytest.approx(wanted, abs=0.05)


def test_masks_come_to_tell_the_class() -> None:
    network = decoupled_network()
    steps(network, DecoupledObjective(lambda_information=1.0), 60, 0.02)
    with torch.no_grad(), network.recorded() as decisions:
        network(INPUTS)
    assert all(information(one, IMAGES.labels) < 0.9 * math.log(3) for one in decisions)
    assert any(one.dependent > 0 for one in open_ratios(network, INPUTS).values())


@pytest.mark.parametrize("call", [1, 4, 8])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    tmp_path: Path, call: int
) -> None:
    objective = DecoupledObjective()
    settings = replace(SETTINGS, epochs=3, small_epochs=0)

    def run(network: DecoupledResNet, name: str) -> None:
        path = tmp_path / name
        train(network, IMAGES, settings, checkpoint=path, objective=objective, console=silent())

    whole, broken, resumed = (decoupled_network() for _ in range(3))
    run(whole, "a")
    interrupt_at(broken, call)
    with pytest.raises(KeyboardInterrupt):
        run(broken, "b")
    torch.manual_seed(77)
    run(resumed, "b")
    assert same_tensors(whole, resumed)


def test_a_network_with_everything_open_answers_as_the_plain_one() -> None:
    plain, network = tiny_network().eval(), decoupled_network(6).eval()
    found = network.load_state_dict(plain.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all(".control" in name for name in found.missing_keys)
    with torch.no_grad():
        assert not torch.equal(network(INPUTS), plain(INPUTS))
        for module in network.modules():
            if isinstance(module, Controller):
                nn.init.constant_(module.fc2.bias, 99.0)
        assert torch.equal(network(INPUTS), plain(INPUTS))


def test_the_method_goes_on_from_a_plain_card_and_its_own_card_comes_back(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_folder(tmp_path / "data", split, coloured_images(33))

    def trained(method: str, start: Path | None = None) -> Path:
        train_backbone(
            tmp_path / "data",
            tmp_path / f"{method}.safetensors",
            method=METHODS[method],
            architecture=TINY,
            settings=replace(SETTINGS, epochs=1),
            checkpoint=tmp_path / f"{method}.checkpoint",
            command="",
            start=start,
        )
        return tmp_path / f"{method}.json"

    plain = trained("plain")
    first = first_network(METHODS["decoupled"], TINY, coloured_images(33), plain)
    weights = load_network(plain)[0].state_dict()
    assert all(torch.equal(first.state_dict()[name], weights[name]) for name in weights)
    network, _ = load_network(trained("decoupled", plain))
    assert type(network) is DecoupledResNet
    assert not network.skip_closed


def test_a_map_stays_channels_last_behind_its_mask() -> None:
    network = deciding_network().to(memory_format=torch.channels_last)
    seen: list[Tensor] = []
    network.blocks[0].conv2.register_forward_hook(lambda _m, args, output: seen.extend(args))
    network.blocks[0].register_forward_hook(lambda _m, _args, output: seen.append(output))
    with torch.no_grad():
        network(INPUTS.contiguous(memory_format=torch.channels_last))
    assert [x.is_contiguous(memory_format=torch.channels_last) for x in seen] == [True, True]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_skipping_closed_channels_answers_as_masking_them(layout: torch.memory_format) -> None:
    network = deciding_network().to(memory_format=layout)
    with torch.no_grad():
        masked = network(INPUTS[:8])
        network.skip_closed = True
        together = network(INPUTS[:8])
        skipped = torch.cat([network(x) for x in INPUTS[:8].split(1)])
    assert torch.equal(together, masked)
    torch.testing.assert_close(skipped, masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", ["control1", "control2"])
def test_a_layer_whose_channels_are_all_closed_can_be_skipped(layer: str) -> None:
    network = deciding_network()
    nn.init.constant_(getattr(network.blocks[1], layer).fc2.bias, -99.0)
    with torch.no_grad():
        masked = network(INPUTS[:1])
        network.skip_closed = True
        skipped = network(INPUTS[:1])
    torch.testing.assert_close(skipped, masked, rtol=1e-5, atol=1e-5)


def test_the_cost_is_what_torch_counts_for_the_plain_and_for_the_skipping_network() -> None:
    network, plain = deciding_network(), tiny_network().eval()
    network.skip_closed = True

    def counted(net: CifarResNet, x: Tensor) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(x)
        return int(counter.get_total_flops()) // 2

    cost = flops(network, INPUTS[:6])
    assert cost.dense == counted(plain, INPUTS[:1])
    expected = [counted(network, x) for x in INPUTS[:6].split(1)]
    assert cost.effective.round().tolist() == expected
    assert len(set(expected)) > 1
    assert network.skip_closed


def test_openness_parts_channels_into_three_kinds() -> None:
    mask = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]]).float()
    found = openness(mask)
    assert found.open_ratio == pytest.approx(0.375)
    assert found.variation == pytest.approx(0.125)
    assert (found.always_open, found.always_closed, found.dependent) == (0.25, 0.5, 0.25)


def test_open_ratios_are_those_of_all_batches_together(monkeypatch: pytest.MonkeyPatch) -> None:
    network = deciding_network()
    whole = open_ratios(network, INPUTS)
    monkeypatch.setattr("defense.offline.methods.decoupled.EVALUATION_BATCH", 7)
    assert open_ratios(network, INPUTS) == whole
    assert list(whole)[:2] == ["stages.0.0.control1", "stages.0.0.control2"]
    assert all(one.dependent > 0 for one in whole.values())
