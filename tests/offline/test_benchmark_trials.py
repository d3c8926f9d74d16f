"""What a contestant may learn from: nothing that it is tested with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from defense.offline.benchmark.discipline import digests
from defense.offline.benchmark.splits import make_split
from defense.offline.benchmark.trials import ATTACKED_IMAGES, Material, joined

FAMILIES = {"fgsm": ["fgsm_8"], "pgd": ["pgd_2", "pgd_4"]}


def names(pixels: Tensor) -> set[str]:
    return set(digests(pixels))


@pytest.mark.parametrize("seed", [0, 1])
def test_an_attacked_twin_of_a_test_image_never_reaches_a_trial(
    material: Material, seed: int
) -> None:
    split = make_split(material.pools, seed)
    trial = material.trial(split, seed)
    assert trial.attacked is not None
    learnt = names(joined([trial.attacked, trial.shifted, trial.clean()]).pixels)
    fields = (material.open, material.sealed)
    for assault in [a for field in fields for a in field.assaults.values()]:
        tested = assault.of(torch.cat([split.test, material.pools.sealed]))
        assert len(tested.rows)
        assert not names(tested.sample.pixels) & learnt
    for made in [*material.open.shifted.values(), *material.open.noisy.values()]:
        assert not names(made.of(split.test).sample.pixels) & learnt
    tested_with = torch.cat([split.test, split.calibration, material.pools.sealed])
    assert not names(material.clean.take(tested_with).pixels) & learnt


def test_a_trial_holds_the_attacks_on_its_fit_images_that_succeeded(material: Material) -> None:
    split = make_split(material.pools, 0)
    trial = material.trial(split, 0)
    assert trial.attacked is not None
    won = [assault.of(split.fit) for assault in material.open.assaults.values()]
    assert len(trial.attacked) == sum(int(assault.won.sum()) for assault in won)
    assert 0 < len(trial.attacked) < sum(len(assault.rows) for assault in won)
    for assault in won:
        labels = material.subject.labels[assault.rows]
        assert torch.equal(assault.won, assault.sample.routed.predicted != labels)
    assert len(trial.shifted) == len(material.harmless) * len(split.fit)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trial_without_a_family_holds_no_image_of_it(material: Material, family: str) -> None:
    split = make_split(material.pools, 0)
    attacked = material.trial(split, 0, without=family).attacked
    assert attacked is not None
    assert len(attacked)
    held = names(attacked.pixels)
    for name, assault in material.open.assaults.items():
        made = names(assault.of(split.fit).successes().pixels)
        assert made
        assert (made & held == set()) if name in FAMILIES[family] else made <= held


def test_labels_of_a_trial_are_those_of_its_clean_images(material: Material) -> None:
    trial = material.trial(make_split(material.pools, 1), 1)
    clean, data = trial.clean(), trial.data()
    brightest = clean.pixels.mean((2, 3)).argmax(1)
    assert (brightest == trial.labels).float().mean() > 0.95
    assert data.judged is not None
    assert int((~data.judged).sum()) == len(trial.views)
    assert torch.equal(data.clean.path, clean.routed.path)


def test_only_images_that_the_network_gets_right_are_attacked(material: Material) -> None:
    pools = {"open": material.pools.attacked, "sealed": material.pools.sealed}
    for part, field in (("open", material.open), ("sealed", material.sealed)):
        right = pools[part][material.subject.right[pools[part]]]
        assert len(right) < len(pools[part]) < ATTACKED_IMAGES[part]
        assert torch.equal(field.assaults["fgsm_8"].rows, right)
        slow = field.assaults["pgd_4"].rows
        assert torch.equal(slow, right[: len(slow)])
        assert len(slow) < len(right)


def test_what_was_made_of_an_image_stays_beside_its_number(material: Material) -> None:
    made = material.open.assaults["fgsm_8"].of(make_split(material.pools, 0).test)
    clean = material.subject.pixels[made.rows].float() / 255
    change = (made.sample.pixels - clean).abs().amax((1, 2, 3))
    assert len(made.won) == len(made.rows) == len(made.sample)
    assert change.max() <= 8 / 255 + 1e-6
    assert change.min() > 0


def test_attacks_of_one_size_share_their_noise(material: Material) -> None:
    kinds = ("uniform", "gaussian")
    wanted = [f"{kind} noise of {name}" for name in ("fgsm_8", "pgd_2", "pgd_4") for kind in kinds]
    assert list(material.open.noisy) == wanted
    noise = material.open.noisy["uniform noise of pgd_2"]
    clean = material.subject.pixels[noise.rows].float() / 255
    assert (noise.sample.pixels - clean).abs().max() <= 2 / 255 + 1e-6
