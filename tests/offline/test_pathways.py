"""Measures of masks against naive loops, and on networks whose answers are known."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from defense.errors import DataError
from defense.offline.pathways import (
    Faithfulness,
    answers,
    class_overlap,
    class_pathways,
    compare,
    faithfulness,
    sparsity,
    transfer,
    transfer_masks,
)
from defense.sites import discover_sites
from defense.types import Site
from tests.conftest import Digits
from tests.served import SmallNet, hook_count, images_like_noise, seeded_net

INPUTS = images_like_noise(250, 1)
SITES = discover_sites(seeded_net(), INPUTS[:2])
DRAWN = (torch.rand(250, 36, generator=torch.Generator().manual_seed(2)) < 0.6).float()


class Copycat(nn.Module):
    """Answers each class by the channel of that number: closing it costs that class alone."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.head = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.act(x)) * 1
        return out


COPYCAT = (Site("act", 0, 3, -1),)


def test_masks_of_ones_change_nothing() -> None:
    found = faithfulness(seeded_net(), SITES, INPUTS, torch.ones(250, 36))
    assert found == Faithfulness(increase=0, drop=0, drop_relative=0, agreement=1)


def test_confidence_is_compared_in_the_class_that_the_bare_network_predicts() -> None:
    found = faithfulness(Copycat(), COPYCAT, 3 * torch.eye(3), torch.ones(3, 3) - torch.eye(3))
    before = float(torch.tensor([3.0, 0, 0]).softmax(0)[0])
    assert found.increase == 0
    assert found.drop == pytest.approx(before - 1 / 3)
    assert found.drop_relative == pytest.approx((before - 1 / 3) / before)
    assert found.agreement == pytest.approx(1 / 3)  # a tie goes to class 0


def test_closing_a_rival_raises_confidence() -> None:
    inputs, masks = torch.tensor([[3.0, 2, 0], [3, 2, 0]]), torch.tensor([[1.0, 0, 0], [1, 1, 1]])
    assert faithfulness(Copycat(), COPYCAT, inputs, masks) == Faithfulness(0.5, 0, 0, 1)


def test_a_rise_does_not_make_up_for_a_drop() -> None:
    bare, masked = torch.zeros(2, 2), torch.tensor([[1.0, 0], [0, 1]]) * torch.tensor(3.0).log()
    found = compare(bare, masked)
    assert (found.increase, found.agreement) == (0.5, 0.5)
    assert (found.drop, found.drop_relative) == pytest.approx((0.125, 0.25))


def test_answers_do_not_depend_on_batches_and_leave_the_model_alone() -> None:
    net = seeded_net()
    together = answers(net, SITES, INPUTS, DRAWN)
    alone = torch.cat(
        [answers(net, SITES, INPUTS[i : i + 1], DRAWN[i : i + 1]) for i in (0, 99, 100, 249)]
    )
    torch.testing.assert_close(together[[0, 99, 100, 249]], alone, rtol=1e-4, atol=1e-5)
    assert hook_count(net) == 0
    assert all(weight.grad is None for weight in net.parameters())


@pytest.mark.parametrize("shape", [(250, 35), (249, 36), (250,)])
def test_masks_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"do not fit 250 images and 36 channels; give one row"):
        answers(seeded_net(), SITES, INPUTS, torch.ones(shape))


def test_no_images_are_refused() -> None:
    with pytest.raises(DataError, match="do not fit 0 images and 36 channels"):
        faithfulness(seeded_net(), SITES, INPUTS[:0], DRAWN[:0])


def test_identical_masks_overlap_wholly_and_disjoint_ones_not_at_all() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    assert class_overlap(DRAWN[[0, 0, 1, 1]], labels) == 1
    assert class_overlap(torch.eye(4), labels) == 0
    assert class_overlap(torch.zeros(4, 5), labels) == 1


def test_overlap_is_the_mean_over_classes_of_the_mean_over_pairs() -> None:
    labels = torch.randint(4, (60,), generator=torch.Generator().manual_seed(0))
    labels[0] = 7  # alone in its class
    masks, of_classes = DRAWN[:60].bool(), []
    for label in range(4):
        pairs = combinations(masks[labels == label], 2)
        of_pairs = [float((a & b).sum() / (a | b).sum()) for a, b in pairs]
        of_classes.append(sum(of_pairs) / len(of_pairs))
    assert class_overlap(DRAWN[:60], labels) == pytest.approx(sum(of_classes) / 4)


def test_overlap_without_a_pair_is_refused() -> None:
    with pytest.raises(DataError, match="no class has two images to compare"):
        class_overlap(DRAWN[:3], torch.arange(3))


def test_sparsity_is_the_share_that_is_closed() -> None:
    masks = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    found = sparsity(masks, torch.tensor([0.2, 0.4, 0.6]))
    assert found.closed.tolist() == [0, 0.5, 1]
    assert found.correlation == pytest.approx(1)
    assert sparsity(masks, torch.tensor([0.6, 0.4, 0.2])).correlation == pytest.approx(-1)


def test_sparsity_that_never_varies_correlates_with_nothing() -> None:
    assert sparsity(torch.ones(3, 4), torch.tensor([0.2, 0.4, 0.6])).correlation is None


def test_a_class_pathway_keeps_what_enough_of_its_images_keep() -> None:
    masks = torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 0, 1]])
    labels = torch.tensor([0, 0, 1])
    assert class_pathways(masks, labels, 2).tolist() == [[1, 1, 0], [0, 0, 1]]
    assert class_pathways(masks, labels, 2, threshold=0.6).tolist() == [[1, 0, 0], [0, 0, 1]]


def test_a_class_without_a_mask_is_named() -> None:
    with pytest.raises(DataError, match="class 1 has no mask to take its pathway from"):
        class_pathways(DRAWN[:2], torch.tensor([0, 2]), 3)


def test_controls_are_another_class_and_as_many_channels_at_every_site() -> None:
    pathways, labels = DRAWN[:10], torch.arange(10).repeat(20)
    found = transfer_masks(SITES, labels, pathways, seed=1)
    assert torch.equal(found.own, pathways[labels])
    assert not bool((found.other == found.own).all(1).any())
    assert all(bool((row == pathways).all(1).any()) for row in found.other)
    assert not bool((found.random == found.own).all(1).any())
    for random, own in zip(found.random.split(12, 1), found.own.split(12, 1), strict=True):
        assert torch.equal(random.sum(1), own.sum(1))


def test_controls_are_drawn_from_the_seed() -> None:
    first, again, other = (
        transfer_masks(SITES, torch.arange(10), DRAWN[:10], seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.random, again.random)
    assert torch.equal(first.other, again.other)
    assert not torch.equal(first.random, other.random)


def test_images_answer_under_the_pathway_of_their_class_and_not_under_another() -> None:
    inputs = torch.ones(30, 3) + 2 * torch.eye(3).repeat(10, 1)
    labels = torch.arange(3).repeat(10)
    found = transfer(Copycat(), COPYCAT, inputs, labels, torch.eye(3))
    assert found.own.accuracy == found.own.faithfulness.agreement == 1
    assert found.own.faithfulness.increase == 1
    assert found.other.accuracy == found.other.faithfulness.agreement == 0
    assert 0 < found.random.accuracy < 1


def test_a_transfer_of_open_pathways_has_the_accuracy_of_the_bare_network(
    trained: SmallNet, digits: Digits
) -> None:
    inputs, labels = digits.images[400:700], digits.labels[400:700]
    accuracy = float((trained(inputs).argmax(1) == labels).double().mean())
    found = transfer(trained, SITES, inputs, labels, torch.ones(10, 36))
    assert found.own == found.other == found.random
    assert found.own.accuracy == pytest.approx(accuracy)


@pytest.mark.parametrize(("count", "label"), [(1, 0), (3, 3), (3, -1)])
def test_pathways_that_do_not_cover_the_labels_are_refused(count: int, label: int) -> None:
    with pytest.raises(DataError, match=f"{count} pathways are too few for these labels"):
        transfer_masks(SITES, torch.tensor([label]), DRAWN[:count])
