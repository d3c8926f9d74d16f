"""Attacks from other networks: of all at once towards one class, and through invertible features."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from defense.errors import ConfigError
from defense.offline.attacks.ensemble import ensemble_attack, other_classes, rmsd
from defense.offline.attacks.latent import LatentMove, cross, latent_attack, shortest
from defense.offline.invertible import InvertibleResNet
from defense.offline.networks import Architecture, Normalisation
from tests.coloured import coloured_images
from tests.conftest import Digits
from tests.served import SmallNet, seeded_net
from tests.surrogates import known, similar


@pytest.fixture
def right(digits: Digits, net: SmallNet) -> tuple[Tensor, Tensor]:
    """Thirty images that the network gets right, and their labels."""
    return known(net, digits, 30)


def test_an_ensemble_agrees_on_a_class_that_is_wrong(
    net: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    images, labels = right
    networks = (net, similar(net, 1))
    attack = ensemble_attack(networks, step=8 / 255, steps=20)
    assert (attack.name, attack.family, attack.eps) == ("ensemble", "ensemble", None)
    changed = attack.run(seeded_net(7), images, labels, seed=0)
    first, second = (network(changed).argmax(1) for network in networks)
    assert float((first == second).double().mean()) > 0.8
    assert float((first != labels).double().mean()) > 0.8
    assert torch.equal(changed, attack.run(net, images, labels, seed=0))
    assert not torch.equal(changed, attack.run(net, images, labels, seed=1))


def test_every_network_of_an_ensemble_has_a_say(
    net: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    alone, together = (
        ensemble_attack(networks).run(net, *right, seed=0)
        for networks in ([net], [net, similar(net, 1)])
    )
    assert not torch.equal(alone, together)


def test_steps_and_their_size_bound_the_deviation_and_a_penalty_lowers_it(
    net: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    free, tied = (
        rmsd(ensemble_attack([net], penalty=weight).run(net, *right, seed=0), right[0])
        for weight in (0.0, 1000.0)
    )
    assert float(free.max()) < 12 / 255
    assert bool((tied < free).all())


def test_a_deviation_is_a_root_mean_square() -> None:
    images = torch.zeros(2, 1, 1, 2)
    changed = torch.tensor([[[[0.3, 0.4]]], [[[0.0, 0.0]]]])
    assert rmsd(changed, images).tolist() == pytest.approx([0.125**0.5, 0], abs=1e-5)


def test_targets_are_all_the_other_classes() -> None:
    labels = torch.arange(4).repeat(200)
    wanted = other_classes(labels, 4)
    assert not bool((wanted == labels).any())
    assert len(set(zip(labels.tolist(), wanted.tolist(), strict=True))) == 12


def test_an_ensemble_of_nobody_is_an_error() -> None:
    with pytest.raises(ConfigError, match="needs at least one network, got none; train one"):
        ensemble_attack([])


@pytest.fixture(scope="module")
def coloured() -> tuple[InvertibleResNet, Normalisation, Tensor, Tensor]:
    """An invertible network with a fitted head, how it takes pixels, images that it gets right."""
    torch.manual_seed(2)
    network = InvertibleResNet(Architecture((1, 1), (6, 6), stem=12, classes=3))
    data = coloured_images(60)
    normalise = data.normalisation
    inputs = normalise(data.pixels)
    with torch.no_grad():
        for _ in range(40):
            network.train()(inputs)
        network.eval().requires_grad_(False)
        features = network.trunk(inputs).mean((2, 3))
        target = 4 * torch.nn.functional.one_hot(data.labels, 3).float() - 2
        gram = features.T @ features + torch.eye(features.shape[1])
        network.head.weight.copy_(torch.linalg.solve(gram, features.T @ target).T)
        known = network(inputs).argmax(1) == data.labels
    assert int(known.sum()) > 40
    return network, normalise, data.pixels[known].float() / 255, data.labels[known]


Coloured = tuple[InvertibleResNet, Normalisation, Tensor, Tensor]


@torch.no_grad()
def test_the_answer_crosses_to_the_nearest_class_by_as_much_as_was_asked(
    coloured: Coloured,
) -> None:
    network, normalise, images, labels = coloured
    inputs = normalise(images * 255)
    moved, there = cross(network, inputs, labels, 0.05)
    logits = network(moved)
    assert float((logits.argmax(1) == there).double().mean()) == 1
    own, new = (logits.gather(1, c[:, None])[:, 0] for c in (labels, there))
    assert torch.allclose(new - own, torch.full_like(own, 0.05), atol=1e-3)
    length = (network.trunk(moved) - network.trunk(inputs)).flatten(1).norm(dim=1)
    change = (moved - inputs).flatten(1).norm(dim=1)
    assert bool((change <= network.stretch(12)[1] * length * 1.001).all())


@torch.no_grad()
def test_no_shorter_move_of_the_features_reaches_any_other_class(coloured: Coloured) -> None:
    network, normalise, images, labels = coloured
    features = network.trunk(normalise(images * 255)).mean((2, 3))
    moves, _ = shortest(network.head, features, labels, 0.0)
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        noise = torch.randn(moves.shape, generator=draw)
        other = noise * moves.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
        blend = moves + 0.2 * other
        shorter = 0.98 * moves.norm(dim=1, keepdim=True) * blend / blend.norm(dim=1, keepdim=True)
        assert torch.equal(network.head(features + shorter).argmax(1), labels)
    assert bool((network.head(features + 1.01 * moves).argmax(1) != labels).all())


def test_what_is_answered_otherwise_already_does_not_move() -> None:
    head = torch.nn.Linear(4, 3).requires_grad_(False)
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    answers = head(features).argmax(1)
    moves, there = shortest(head, features, (answers + 1) % 3, 0.0)
    assert float(moves.abs().max()) == 0
    assert not bool((there == (answers + 1) % 3).any())


def test_images_go_where_features_lead(coloured: Coloured) -> None:
    network, normalise, images, labels = coloured
    attack = latent_attack(network, normalise, kappa=0.5)
    assert (attack.name, attack.family, attack.eps) == ("latent", "latent", None)
    changed = attack.run(network, images, labels, seed=0)
    with torch.no_grad():
        answers = network(normalise(changed * 255)).argmax(1)
    assert float((answers != labels).double().mean()) > 0.9


def test_a_ball_is_reached_and_never_left(coloured: Coloured) -> None:
    network, normalise, images, labels = coloured
    attack = latent_attack(network, normalise, kappa=2.0, eps=4 / 255)
    assert attack.name == "latent_4"
    changed = attack.run(seeded_net(), images, labels, seed=0)
    assert float((changed - images).abs().max()) == pytest.approx(4 / 255, abs=1e-6)
    free = LatentMove(network, normalise, kappa=2.0)
    wide = replace(free, eps=1.0)
    assert torch.equal(free(images, labels), wide(images, labels))


def test_a_margin_below_zero_is_an_error(coloured: Coloured) -> None:
    with pytest.raises(ConfigError, match="latent attack's kappa must be at least 0, got -1"):
        latent_attack(*coloured[:2], kappa=-1)
