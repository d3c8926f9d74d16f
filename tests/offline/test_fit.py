"""Fitting: one part of the data shapes the guard, the other part calibrates it, and neither is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from defense.errors import CalibrationError, ConfigError, DataError, SiteError
from defense.fingerprint import fingerprint
from defense.guard import Guard, InputSpec
from defense.offline.attacks import make_attack
from defense.offline.data import ImageSet, read_images
from defense.offline.fit import (
    FitOptions,
    fit_archive,
    fit_module,
    label_rows,
    share_rows,
    split_rows,
    successes,
    told,
)
from defense.routers import ROUTERS, RouterKind
from defense.routers.activation import ActivationRecipe, ActivationRouter
from defense.types import Routed
from tests.conftest import TRAINED_ON, Digits
from tests.served import PngHandler, SmallNet, hook_count, images_like_noise, png


def same(first: Guard, second: Guard) -> bool:
    return torch.equal(first.calibration.score, second.calibration.score)


@pytest.fixture(scope="module")
def folder(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits that the network was not trained on, as PNGs in folders called zero, one, two, ..."""
    root = tmp_path_factory.mktemp("digits")
    for row in range(TRAINED_ON, TRAINED_ON + 260):
        target = root / NAMES[int(digits.labels[row])]
        target.mkdir(exist_ok=True)
        (target / f"{row}.png").write_bytes(png(digits.images[row]))
    return root


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_a_guard_is_bound_to_its_network_and_says_what_it_was_fitted_to(
    net: SmallNet, digits: Digits
) -> None:
    guard = fit_module(net, [(digits.images[:200], digits.labels[:200])])
    assert guard.fingerprint == fingerprint(net)
    assert guard.inputs == InputSpec((1, 8, 8), "float32")
    assert guard.class_names == tuple(map(str, range(10)))
    assert guard.facts["labels"] == "given"
    assert (guard.facts["fit_images"], guard.facts["calibration_images"]) == (100, 100)
    assert guard.facts["smallest_target_fpr"] == 0.01
    assert {"python", "torch", "pathguard"} <= set(guard.facts["versions"])
    assert guard.calibration.count == 100


def test_the_same_seed_gives_the_same_guard_and_another_one_another(
    net: SmallNet, digits: Digits
) -> None:
    data = [(digits.images[:200], digits.labels[:200])]
    first, again = fit_module(net, data), fit_module(net, data)
    assert same(first, again)
    assert not same(first, fit_module(net, data, options=FitOptions(seed=1)))


def test_how_the_data_is_cut_into_batches_does_not_matter(net: SmallNet, digits: Digits) -> None:
    x, y = digits.images[:200], digits.labels[:200]
    whole = fit_module(net, [(x, y)])
    assert same(whole, fit_module(net, zip(x.split(33), y.split(33), strict=True)))
    assert same(whole, fit_module(net, [[x, y]]))  # type: ignore[list-item]


def test_without_labels_the_networks_own_answers_stand_in(net: SmallNet, digits: Digits) -> None:
    x = digits.images[:200]
    own = fit_module(net, [x])
    assert own.facts["labels"] == "the network's own answers"
    assert same(own, fit_module(net, [(x, net(x).argmax(1))]))
    assert same(own, fit_module(net, [(x[:100], digits.labels[:100]), x[100:]]))


def test_fitting_leaves_the_network_as_it_was(net: SmallNet, digits: Digits) -> None:
    before, answer = fingerprint(net), net(digits.images[:5])
    fit_module(net, [digits.images[:200]])
    assert hook_count(net) == 0
    assert fingerprint(net) == before
    assert torch.equal(net(digits.images[:5]), answer)


def test_class_names_sites_and_statistics_can_be_given(net: SmallNet, digits: Digits) -> None:
    options = FitOptions(sites=("act",), statistics=("mean", "max"))
    guard = fit_module(net, [digits.images[:200]], options=options, class_names=NAMES)
    assert guard.class_names == NAMES
    assert guard.router.layout.length == 24


def test_a_supervised_guard_is_fitted_to_the_attacks_that_succeeded(
    net: SmallNet, digits: Digits
) -> None:
    def attack(x: Tensor, y: Tensor) -> Tensor:
        return make_attack("fgsm", eps=0.15).run(net, x, y, seed=0)

    data, options = [(digits.images[:300], digits.labels[:300])], FitOptions(detector="supervised")
    guard = fit_module(net, data, options=options, attack=attack)
    assert guard.detector.name == "supervised"
    assert 10 < guard.facts["attacked_images"] <= 150
    with pytest.raises(DataError, match="is fitted with attacks and there are none"):
        fit_module(net, data, options=options)


def test_an_attack_is_not_run_for_a_detector_that_does_not_look_at_it(
    net: SmallNet, digits: Digits
) -> None:
    def attack(x: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("nobody asked for an attack")

    assert fit_module(net, [digits.images[:200]], attack=attack).facts["attacked_images"] == 0


def test_no_batches_are_an_error(net: SmallNet) -> None:
    with pytest.raises(DataError, match="no batches to fit on; give a loader that yields some"):
        fit_module(net, [])


def test_nothing_to_calibrate_on_is_an_error(net: SmallNet, digits: Digits) -> None:
    with pytest.raises(CalibrationError, match="calibration needs at least one score"):
        fit_module(net, [digits.images[:4]], options=FitOptions(calibration_share=0.1))


def test_a_site_that_does_not_exist_is_an_error(net: SmallNet, digits: Digits) -> None:
    with pytest.raises(SiteError, match="no site 'bloc' in this backbone; did you mean 'block'"):
        fit_module(net, [digits.images[:200]], options=FitOptions(sites=("bloc",)))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.95, 1.0])
def test_a_calibration_share_that_leaves_too_little_on_one_side_is_an_error(share: float) -> None:
    with pytest.raises(ConfigError, match=r"calibration_share must lie between 0\.1 and 0\.9"):
        FitOptions(calibration_share=share)


def test_an_unknown_detector_or_router_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no detector 'densty'; did you mean 'density'"):
        FitOptions(detector="densty")
    with pytest.raises(ConfigError, match="no router 'activatoin'; did you mean 'activation'"):
        FitOptions(router="activatoin")


def test_a_router_that_takes_a_second_pass_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoPasses(ActivationRouter):
        one_forward: ClassVar[bool] = False

    monkeypatch.setitem(ROUTERS, "two-passes", RouterKind(ActivationRecipe, TwoPasses))
    with pytest.raises(
        ConfigError, match="'two-passes' needs more than one forward pass and cannot"
    ):
        FitOptions(router="two-passes")


def test_only_the_activation_router_has_a_choice_of_statistics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Fixed:
        examples: ClassVar[int] = 0

    monkeypatch.setitem(ROUTERS, "fixed", RouterKind(Fixed, ActivationRouter))  # type: ignore[arg-type]
    assert FitOptions(statistics=("max",)).recipe() == ActivationRecipe(("max",))
    with pytest.raises(ConfigError, match="the router 'fixed' has no choice of statistics; leave"):
        FitOptions(router="fixed", statistics=("max",))


def test_a_router_that_learns_takes_rows_that_the_detector_does_not_see() -> None:
    class Learner(ActivationRecipe):
        examples: ClassVar[int] = 30

    router_rows, rest = share_rows(torch.arange(100), Learner())
    assert (router_rows.tolist(), rest.tolist()) == (list(range(30)), list(range(30, 100)))
    router_rows, rest = share_rows(torch.arange(40), Learner())
    assert (len(router_rows), len(rest)) == (20, 20)
    router_rows, rest = share_rows(torch.arange(40), ActivationRecipe())
    assert (len(router_rows), len(rest)) == (0, 40)


def test_shares_that_are_done_become_steps_of_a_bar() -> None:
    steps: list[int] = []

    class Bar:
        def advance(self, count: int = 1) -> None:
            steps.append(count)

    tell = told(Bar(), 10)
    for share in (0.25, 0.5, 1.0):
        tell(share)
    assert sum(steps) == 10
    assert len(steps) == 3


def test_the_split_is_random_complete_and_in_the_share_that_was_asked_for() -> None:
    fit, calibration = split_rows(101, FitOptions(calibration_share=0.3, seed=2))
    assert (len(fit), len(calibration)) == (71, 30)
    assert sorted([*fit.tolist(), *calibration.tolist()]) == list(range(101))
    assert fit.tolist() != sorted(fit.tolist())


def test_successes_are_right_answers_turned_wrong_attack_after_attack() -> None:
    def run(predicted: Sequence[int]) -> Routed:
        return Routed(torch.eye(3)[list(predicted)], torch.arange(float(len(predicted)))[:, None])

    labels = torch.tensor([0, 1, 2])
    found = successes(run([1, 1, 0, 2, 0, 2]), run([0, 1, 1]), labels)
    assert found.path.flatten().tolist() == [0, 3, 4]


def test_an_archive_is_fitted_through_its_own_preprocessing(
    net: SmallNet, digits: Digits, folder: Path
) -> None:
    guard = fit_archive(PngHandler(net), read_images(folder), options=FitOptions())
    assert guard.fingerprint == fingerprint(net)
    assert guard.class_names == NAMES
    assert guard.inputs == InputSpec((1, 8, 8), "float32")
    assert guard.facts["labels"] == "folders"
    assert guard.facts["accuracy"] > 0.8
    assert guard.calibration.count == 130
    assert hook_count(net) == 0


def test_an_archive_is_fitted_to_unlabelled_images_too(net: SmallNet, folder: Path) -> None:
    images = read_images(folder)
    unlabelled = ImageSet(images.root, images.names, None, ())
    guard = fit_archive(PngHandler(net), unlabelled, options=FitOptions())
    assert guard.class_names == tuple(map(str, range(10)))
    assert guard.facts["labels"] == "the network's own answers"


def test_a_supervised_archive_is_fitted_to_attacked_inputs(
    net: SmallNet, digits: Digits, folder: Path
) -> None:
    asked: list[int] = []

    def attack(payloads: Sequence[bytes], labels: Tensor) -> Tensor:
        asked.append(len(payloads))
        x = torch.stack([PngHandler(net).decode(payload) for payload in payloads])
        return make_attack("fgsm", eps=0.15).run(net, x, labels, seed=0)

    options = FitOptions(detector="supervised")
    guard = fit_archive(PngHandler(net), read_images(folder), options=options, attack=attack)
    assert asked == [130]
    assert guard.facts["attacked_images"] > 10


def test_too_few_images_are_an_error_that_says_how_many(net: SmallNet, folder: Path) -> None:
    few = read_images(folder).take(range(99))
    with pytest.raises(
        DataError, match="99 images are too few to fit and calibrate on; give at least 100"
    ):
        fit_archive(PngHandler(net), few, options=FitOptions())


def answers(predicted: Sequence[int], classes: int) -> Routed:
    return Routed(torch.eye(classes)[list(predicted)], torch.zeros(len(predicted), 1))


def folders(labels: tuple[int, ...] | None, names: tuple[str, ...] = ("cat", "dog")) -> ImageSet:
    count = len(labels) if labels else 4
    return ImageSet(Path(), tuple(map(str, range(count))), labels, names)


def test_folders_are_matched_to_outputs_by_what_the_network_mostly_answers() -> None:
    found = label_rows(folders((0, 0, 0, 1, 1)), torch.arange(5), answers([2, 2, 0, 0, 0], 3))
    assert found.labels.tolist() == [2, 2, 2, 0, 0]
    assert found.names == ("dog", "1", "cat")
    assert found.facts == {"labels": "folders", "accuracy": 0.8}


def test_folders_that_share_an_answer_are_not_trusted() -> None:
    found = label_rows(folders((0, 0, 1, 1)), torch.arange(4), answers([1, 1, 1, 1], 3))
    assert found.labels.tolist() == [1, 1, 1, 1]
    assert found.names == ("0", "1", "2")
    assert found.facts["note"] == "folders do not match the classes"


def test_a_folder_without_an_image_among_the_rows_names_no_output() -> None:
    images = folders((0, 0, 1, 2), ("cat", "dog", "eel"))
    found = label_rows(images, torch.tensor([0, 1, 3]), answers([1, 1, 0], 2))
    assert found.names == ("eel", "cat")


def test_a_guard_holds_its_promise_on_images_that_it_has_not_seen(
    guard: Guard, trained: SmallNet, clean: Callable[[int], Tensor], digits: Digits
) -> None:
    """Noise images are all beyond 1 in 1000; most digits, also those of the fit, are not in 1 of 20."""
    with guard.attach(trained) as attached, torch.inference_mode():
        noise = attached(images_like_noise(50, 3)).scored.p_value
        digit = attached(digits.images[:TRAINED_ON]).scored.p_value
    assert float(noise.amax()) < 0.001
    assert float((digit <= 0.05).double().mean()) < 0.15
