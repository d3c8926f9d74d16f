"""Fitting: one part of the data shapes the guard, the other part calibrates it, and neither is lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from defense.detectors import DETECTORS, DetectorKind
from defense.errors import ArchiveError, CalibrationError, ConfigError, DataError, SiteError
from defense.fingerprint import fingerprint
from defense.guard import Guard, InputSpec
from defense.looks import Extras, Perturbation
from defense.offline.attacks import make_attack
from defense.offline.data import ImageSet, read_images
from defense.offline.fit import (
    FitOptions,
    calibrate,
    fit_archive,
    fit_module,
    fit_steps,
    judged_half,
    label_rows,
    share_rows,
    split_rows,
    told,
)
from defense.offline.harmless import CHANGES, harmless
from defense.offline.twins import successes
from defense.routers import ROUTERS, RouterKind
from defense.routers.activation import ActivationRecipe, ActivationRouter
from defense.types import FitData, PathLayout, Routed
from tests.conftest import TRAINED_ON, Digits
from tests.looks import ECHO, NORMALISATION, Disagreement, small_network, small_witness
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
    assert whole.detector.name == "fused"
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
    asked: list[int] = []

    def attack(x: Tensor, y: Tensor) -> Tensor:
        asked.append(len(x))
        return make_attack("fgsm", eps=0.15).run(net, x, y, seed=0)

    data, options = [(digits.images[:300], digits.labels[:300])], FitOptions(detector="supervised")
    guard = fit_module(net, data, options=options, attack=attack)
    assert guard.detector.name == "supervised"
    assert asked == [75]
    assert 10 < guard.facts["attacked_images"] <= 75
    with pytest.raises(DataError, match="is fitted with attacks and there are none"):
        fit_module(net, data, options=options)


def test_an_attack_is_not_run_for_a_detector_that_does_not_look_at_it(
    net: SmallNet, digits: Digits
) -> None:
    def attack(x: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("nobody asked for an attack")

    options = FitOptions(detector="density")
    guard = fit_module(net, [digits.images[:200]], options=options, attack=attack)
    assert guard.facts["attacked_images"] == 0


def test_no_batches_are_an_error(net: SmallNet) -> None:
    with pytest.raises(DataError, match="no batches to fit on; give a loader that yields some"):
        fit_module(net, [])


def test_nothing_to_calibrate_on_is_an_error(net: SmallNet, digits: Digits) -> None:
    options = FitOptions(detector="density", calibration_share=0.1)
    with pytest.raises(CalibrationError, match="calibration needs at least one score"):
        fit_module(net, [digits.images[:4]], options=options)


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
    options, attacks = FitOptions(detector="supervised"), [make_attack("fgsm", eps=0.15)]
    guard = fit_archive(PngHandler(net), read_images(folder), options=options, attacks=attacks)
    assert 10 < guard.facts["attacked_images"] <= 65
    assert guard.facts["attacks"] == ["fgsm"]


class Recipe:
    """Keeps what it was fitted to."""

    kept: ClassVar[list[FitData]] = []

    def fit(self, data: FitData, layout: PathLayout, *, seed: int) -> Disagreement:
        self.kept.append(data)
        return Disagreement()


class Signed(PngHandler):
    """Gives its model inputs in [-1, 1]."""

    def decode(self, payload: object) -> Tensor:
        return super().decode(payload) * 2 - 1


class NoGradient(nn.Module):
    """A network that no gradient passes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.detach())  # type: ignore[no-any-return]


class Squaring(PngHandler):
    """Preprocesses by more than a shift and a scale."""

    def decode(self, payload: object) -> Tensor:
        return super().decode(payload).square()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[FitData]:
    """What recipes are given; the detector `disagreement` is one that attacks are welcome to."""
    kind = DetectorKind(Recipe, Disagreement, attacks="welcome")
    monkeypatch.setitem(DETECTORS, "disagreement", kind)
    monkeypatch.setattr(Recipe, "kept", [])
    return Recipe.kept


def test_attacked_and_harmless_runs_are_made_of_the_judged_half(
    net: SmallNet, folder: Path, kept: list[FitData]
) -> None:
    attacks = [make_attack(name, eps=0.15) for name in ("fgsm", "bim")]
    options, steps = FitOptions(detector="disagreement"), Steps()
    guard = fit_archive(
        Signed(net), read_images(folder), options=options, attacks=attacks, progress=steps
    )
    (data,) = kept
    assert data.judged is not None
    assert (len(data.judged), int(data.judged.sum())) == (130, 65)
    assert data.shifted is not None
    assert len(data.shifted) == 65 * CHANGES == guard.facts["shifted_images"]
    assert guard.facts["harmless"] == list(harmless(torch.zeros(1, 1, 8, 8), 0))
    assert data.attacked is not None
    assert len(data.attacked) == guard.facts["attacked_images"] > 30
    assert guard.facts["attacks"] == ["fgsm", "bim"]
    assert data.clean.look == data.attacked.look == data.shifted.look
    # The first change moves every judged image by one pixel: by hand, from the files.
    images = read_images(folder).shuffled(0)
    rows = split_rows(len(images), options)[0][data.judged].tolist()
    pixels = torch.stack([PngHandler(net).decode(payload) for payload in images.payloads(rows)])
    moved = harmless(pixels, 0)["shifted"] * 2 - 1
    torch.testing.assert_close(data.shifted.logits[:65], net(moved), rtol=1e-4, atol=1e-4)
    once_more = 0 if guard.facts["echo"] else 130
    assert steps.done == fit_steps(260, options, 2) - once_more


class Steps:
    """Adds up how far it was advanced."""

    done = 0

    def advance(self, steps: int = 1) -> None:
        self.done += steps


def test_without_attacks_a_fit_still_knows_harmless_changes(
    net: SmallNet, folder: Path, kept: list[FitData]
) -> None:
    options, images = FitOptions(detector="disagreement"), read_images(folder)
    fit_archive(PngHandler(net), images, options=options)
    assert kept[0].attacked is None
    assert kept[0].shifted is not None


def test_where_pixels_do_not_simply_become_inputs_nothing_is_made_of_them(
    net: SmallNet, folder: Path, kept: list[FitData]
) -> None:
    options, images = FitOptions(detector="disagreement"), read_images(folder)
    guard = fit_archive(Squaring(net), images, options=options)
    assert (kept[0].attacked, kept[0].shifted, kept[0].judged) == (None, None, None)
    assert guard.facts["harmless"].startswith("none")
    attacks = [make_attack("fgsm", eps=0.1)]
    with pytest.raises(
        ArchiveError, match="attacks on pixels are not defined for it; fit without attacks"
    ):
        fit_archive(Squaring(net), images, options=options, attacks=attacks)


def test_attacks_that_are_welcome_if_possible_are_left_out_where_they_are_not(
    net: SmallNet, folder: Path, kept: list[FitData]
) -> None:
    options, images = FitOptions(detector="disagreement"), read_images(folder)
    attacks = [make_attack("fgsm", eps=0.1)]
    for handler in (Squaring(net), PngHandler(NoGradient(net))):
        guard = fit_archive(handler, images, options=options, attacks=attacks, if_possible=True)
        assert guard.facts["attacks"] == []
        assert kept[-1].attacked is None
    guard = fit_archive(PngHandler(net), images, options=options, attacks=attacks, if_possible=True)
    assert guard.facts["attacks"] == ["fgsm"]


def test_a_network_without_gradients_cannot_be_attacked(
    net: SmallNet, folder: Path, kept: list[FitData]
) -> None:
    options, attacks = FitOptions(detector="disagreement"), [make_attack("fgsm", eps=0.1)]
    with pytest.raises(ArchiveError, match=r"the network cannot be attacked .*fit without attacks"):
        fit_archive(
            PngHandler(NoGradient(net)), read_images(folder), options=options, attacks=attacks
        )


def test_an_archive_gets_a_witness_from_its_card(
    net: SmallNet, folder: Path, tmp_path: Path
) -> None:
    card = write_card(tmp_path / "witness.json", NAMES)
    guard = fit_archive(PngHandler(net), read_images(folder), options=FitOptions(), witness=card)
    assert guard.facts["witness"]["card"] == "witness.json"
    assert guard.witness is not None
    assert guard.witness.classes == 10
    assert "path+witness" in guard.calibrations
    with pytest.raises(ConfigError, match="'density' does not look at a witness; leave --witness"):
        fit_archive(
            PngHandler(net),
            read_images(folder),
            options=FitOptions(detector="density"),
            witness=card,
        )


def write_card(card: Path, classes: Sequence[str]) -> Path:
    """Write the card and weights of a network for 8x8 images that knows nothing."""
    network = small_network()
    weights = save({name: value.contiguous() for name, value in network.state_dict().items()})
    card.with_suffix(".safetensors").write_bytes(weights)
    shape = asdict(network.architecture) | {"network": "CifarResNet"}
    facts = {
        "weights": card.with_suffix(".safetensors").name,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "architecture": shape,
        "classes": classes,
        "input": {"shape": [3, 8, 8]} | asdict(NORMALISATION),
    }
    card.write_text(json.dumps(facts))
    return card


def test_a_guard_fitted_to_tensors_has_the_echo_that_suits_them(
    net: SmallNet, digits: Digits
) -> None:
    guard = fit_module(net, [digits.images[:200]])
    assert guard.witness is None
    echo = guard.echo.perturbations if guard.echo else ()
    assert Perturbation("mirror") not in echo
    assert tuple(guard.calibrations) == (("path", "path+echoes") if echo else ("path",))


def test_a_half_of_the_rows_judges() -> None:
    assert judged_half(5).tolist() == [False, False, True, True, True]


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


def test_a_guard_is_calibrated_for_every_look_that_its_detector_takes(
    net: SmallNet, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DETECTORS, "disagreement", DetectorKind(DisagreementRecipe, Disagreement))
    options, extras = FitOptions(detector="disagreement"), Extras(small_witness(), ECHO)
    images = [digits.images[:200]]
    guard = fit_module(net, images, options=options, extras=extras)
    assert tuple(guard.calibrations) == Disagreement.looks
    assert (guard.witness, guard.echo) == (extras.witness, ECHO)
    assert {c.count for c in guard.calibrations.values()} == {100}
    scores = [c.score for c in guard.calibrations.values()]
    assert not any(torch.equal(a, b) for a, b in pairwise(scores))
    only = fit_module(net, images, options=options, extras=Extras(echo=ECHO))
    assert tuple(only.calibrations) == ("path", "path+echoes")
    assert torch.equal(only.calibration.score, guard.calibrations["path"].score)


def test_a_guard_keeps_no_witness_that_its_detector_does_not_look_at(
    net: SmallNet, digits: Digits
) -> None:
    images, options = [digits.images[:200]], FitOptions(detector="density")
    guard = fit_module(net, images, options=options, extras=Extras(small_witness(), ECHO))
    assert tuple(guard.calibrations) == ("path",)
    assert (guard.witness, guard.echo) == (None, None)
    assert same(guard, fit_module(net, images, options=options))


def test_a_detector_that_needs_a_witness_is_not_fitted_without_one() -> None:
    class Choosy(Disagreement):
        looks = ("path+witness",)

    run = Routed(torch.zeros(3, 10), torch.zeros(3, 4))
    with pytest.raises(
        ConfigError, match=r"looks at path\+witness, and there is only path; fit it with a witness"
    ):
        calibrate(Choosy(), run)


class DisagreementRecipe:
    """Asserts that what it is fitted to carries all that was collected."""

    def fit(self, data: FitData, layout: PathLayout, *, seed: int) -> Disagreement:
        assert data.clean.echoes is not None
        return Disagreement()
