"""Each check catches the mistake that it is for, and lets a sound study pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from defense.errors import DataError
from defense.offline.benchmark.discipline import (
    attack_works,
    different_images_are_no_questions,
    digests,
    grids_do_not_matter,
    near_target,
    null_test,
    require,
    splits_apart,
    threshold_unseen,
    twins_together,
)
from defense.offline.benchmark.metrics import auroc
from defense.offline.benchmark.sanity import Check
from defense.offline.benchmark.shifts import eight_bit, jpeg
from defense.offline.nearness import fit_nearness

QUALITY = 75


def pictures(count: int, *, seed: int) -> Tensor:
    """Return random pictures (count, 1, 16, 16) with shapes and texture, of 8 bits."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 5, 5, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, (16, 16), mode="bicubic")
    return eight_bit(smooth * 0.8 + 0.1 * torch.rand(count, 1, 16, 16, generator=draw))


def photographs(count: int, *, seed: int) -> Tensor:
    """Return pictures as they were read from JPEG files."""
    return jpeg(pictures(count, seed=seed), QUALITY)


def fgsm_like(images: Tensor, *, eps: float = 4 / 255) -> Tensor:
    draw = torch.Generator().manual_seed(9)
    return eight_bit(images + eps * torch.randn(images.shape, generator=draw).sign())


def saved_as_jpeg(images: Tensor) -> Tensor:
    """Score what was no JPEG: writing a JPEG once more at its quality changes next to nothing."""
    return (jpeg(images, QUALITY) - images).abs().mean(dim=(1, 2, 3))


def looks_at_brightness(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def test_an_image_in_two_splits_is_found_by_its_content() -> None:
    images = pictures(30, seed=0)
    sound = {"fit": digests(images[:10]), "calibration": digests(images[10:20])}
    check = splits_apart(sound | {"test": digests(images[20:])})
    assert check.passed
    assert check.says == (
        "no image is in two splits (10 in 'fit', 10 in 'calibration', 10 in 'test')"
    )
    leaked = splits_apart(sound | {"test": digests(images[[20, 7, 21]])})
    assert not leaked.passed
    assert "images in both 'fit' and 'test': 1 (row 7 and row 1 are one image)" in leaked.says


def test_a_digest_is_of_what_a_file_would_hold() -> None:
    images = pictures(2, seed=0)
    assert digests(images + 0.2 / 255) == digests(images)
    assert digests(images + 1 / 255) != digests(images)


def test_an_attacked_image_is_found_by_the_digest_of_its_clean_twin() -> None:
    images = pictures(20, seed=0)
    of_twins = digests(images[5:15])  # the attacked rows of the test
    assert not splits_apart({"fit": digests(images[:10]), "test": of_twins}).passed
    assert splits_apart({"fit": digests(images[:5]), "test": of_twins}).passed


def test_an_attacked_image_whose_clean_twin_was_fitted_is_found_by_its_pixels() -> None:
    images = pictures(40, seed=0)
    fit, apart = images[:20], fgsm_like(images[20:])
    sound = twins_together(fit, apart)
    assert sound.passed, sound.says
    leaked = twins_together(fit, torch.cat([apart, fgsm_like(images[3:4])]))
    assert not leaked.passed
    assert leaked.says.startswith("images of the test within 8.0/255 of one of the fit: 1 (")
    assert "row 20 of the test and row 3 of the fit: 4.0/255" in leaked.says


def test_a_picture_encoded_again_is_a_near_duplicate() -> None:
    images = pictures(10, seed=0)
    assert not twins_together(images, jpeg(images[4:5], 90)).passed


def test_nothing_has_no_twin() -> None:
    images = pictures(3, seed=0)
    assert twins_together(images[:0], images).passed
    assert "nothing to compare" in twins_together(images, images[:0]).says


def test_a_threshold_tuned_on_images_of_the_test_is_found() -> None:
    images = digests(pictures(30, seed=0))
    assert threshold_unseen(images[:15], images[15:]).passed
    tuned = threshold_unseen(images[:16], images[15:])
    assert (tuned.name, tuned.passed) == ("threshold unseen", False)
    assert "images in both 'calibration' and 'test': 1 (row 15 and row 0" in tuned.says


def test_clean_images_that_a_detector_can_tell_from_clean_ones_are_found() -> None:
    first, second = photographs(100, seed=0), photographs(100, seed=1)
    sound = null_test(looks_at_brightness(first), looks_at_brightness(second))
    assert sound.passed, sound.says
    same = null_test(looks_at_brightness(first), looks_at_brightness(first))
    assert same.says.startswith("clean against clean images give an AUROC of 0.500 (0.3")
    brighter = null_test(looks_at_brightness(first), looks_at_brightness(second) + 0.1)
    assert not brighter.passed
    assert brighter.says.endswith("; expected one half, so find what else than the attack differs")
    assert not null_test(torch.zeros(0), torch.zeros(3)).passed


def test_a_null_test_passes_for_nearly_every_pair_of_clean_sets() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 2, 60, generator=draw)
    assert sum(null_test(first, second).passed for first, second in rows) >= 29


def test_an_attack_that_does_nothing_is_found() -> None:
    images = pictures(10, seed=0)
    won, lost = torch.arange(10) < 6, torch.zeros(10, dtype=torch.bool)
    sound = attack_works("pgd_8", images, fgsm_like(images), won, noise_won=torch.arange(10) < 1)
    assert sound.passed
    assert sound.says == (
        "pgd_8 changes 100.0% of the images and fools the network on 60.0%, "
        "noise of its norm on 10.0%"
    )
    assert not attack_works("idle", images, images, won).passed
    failed = attack_works("weak", images, fgsm_like(images), lost)
    assert failed.says.endswith("on 0.0%; it is no attack, so leave it out or repair it")
    assert not attack_works("noise", images, fgsm_like(images), won, noise_won=won).passed


def test_controls_must_be_flagged_about_as_often_as_clean_images() -> None:
    few, many = torch.arange(200) < 12, torch.arange(200) < 60
    sound = near_target({"noise": few}, 0.05)
    assert sound.passed
    assert sound.says == "at a target rate of 5.0% harmless images are flagged: noise 6.0%"
    loud = near_target({"noise": few, "dithered": many}, 0.05)
    assert not loud.passed
    assert loud.says.endswith("the detector sees something else than attacks in: dithered")
    assert not near_target({}, 0.05).passed


def test_a_detector_of_lost_jpeg_grids_looks_brilliant_and_is_found() -> None:
    calibration, images = photographs(100, seed=0), photographs(100, seed=1)
    area = auroc(saved_as_jpeg(images), saved_as_jpeg(fgsm_like(images)))
    assert area is not None
    assert area > 0.95  # what a study without the control would publish
    check = grids_do_not_matter(saved_as_jpeg, images, saved_as_jpeg(calibration), seed=0)
    assert (check.name, check.passed) == ("JPEG grids", False)
    assert "shifted" in check.says.split("attacks in: ")[1]
    assert "dithered" in check.says.split("attacks in: ")[1]


def test_a_detector_that_looks_at_the_picture_passes() -> None:
    calibration, images = photographs(100, seed=0), photographs(100, seed=1)
    scores = looks_at_brightness(calibration)
    check = grids_do_not_matter(looks_at_brightness, images, scores, seed=0)
    assert check.passed, check.says


def test_a_memory_that_takes_different_images_for_questions_is_found() -> None:
    paths = torch.randn(600, 30, generator=torch.Generator().manual_seed(0))
    sound = fit_nearness(paths[:300], paths[300:], seed=0)
    check = different_images_are_no_questions(sound, paths)
    assert (check.name, check.passed) == ("different images are no questions", True)
    loose = dataclasses.replace(sound, radius=4 * sound.radius)
    check = different_images_are_no_questions(loose, paths)
    assert not check.passed
    assert "of 600 different clean images were taken for questions" in check.says


def test_too_few_calibration_scores_for_the_target_are_an_error() -> None:
    images = photographs(4, seed=0)
    with pytest.raises(DataError, match="4 calibration scores cannot fix a threshold at a target"):
        grids_do_not_matter(looks_at_brightness, images, looks_at_brightness(images), seed=0)


def test_failed_checks_are_an_error_with_what_the_first_one_says() -> None:
    sound, first, second = (
        Check("a", True, "fine"),
        Check("b", False, "bad"),
        Check("c", False, "worse"),
    )
    require([sound])
    with pytest.raises(DataError, match=r"^bad$"):
        require([sound, first])
    with pytest.raises(DataError, match=r"^bad \(failed as well: c\)$"):
        require([first, sound, second])
