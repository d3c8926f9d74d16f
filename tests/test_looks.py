"""Echoes change inputs a little and always alike; settings choose which looks are taken."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from defense.calibration import Calibration
from defense.config import ModelSettings
from defense.errors import CalibrationError, ConfigError, GuardFailure
from defense.looks import PERTURBATIONS, Echo, Extras, Pace, Perturbation, make_plan
from defense.types import Routed
from tests.looks import ECHO, small_witness
from tests.served import images_like_noise, seeded_net

AMOUNTS = {"noise": 0.1, "mirror": 0.0, "shift": 2.0, "blur": 0.5}
IMAGES = images_like_noise(4, 0)
FOUR = ("path", "path+witness", "path+echoes", "path+witness+echoes")


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_a_perturbation_treats_every_row_alike_and_always_the_same(kind: str) -> None:
    change = Perturbation(kind, AMOUNTS[kind])
    whole = change.apply(IMAGES, 1)
    assert whole.shape == IMAGES.shape
    assert not torch.equal(whole, IMAGES)
    torch.testing.assert_close(
        torch.cat([change.apply(image[None], 1) for image in IMAGES]), whole, rtol=1e-6, atol=1e-7
    )


def test_noise_has_the_spread_that_was_asked_for_and_another_pattern_at_another_place() -> None:
    zeros, noise = torch.zeros(1, 3, 40, 40), Perturbation("noise", 0.5)
    first, second = noise.apply(zeros, 0), noise.apply(zeros, 1)
    assert float(first.std()) == pytest.approx(0.5, rel=0.05)
    assert float((first * second).mean()) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize(
    ("amount", "expected"), [(1, [1, 1, 2, 3]), (-2, [3, 4, 4, 4]), (9, [1, 1, 1, 1])]
)
def test_a_shift_moves_columns_and_repeats_the_border(amount: int, expected: list[float]) -> None:
    row = torch.arange(1.0, 5.0).view(1, 1, 1, 4)
    assert Perturbation("shift", amount).apply(row, 0).flatten().tolist() == expected


def test_a_blur_spreads_a_point_by_its_share_and_leaves_a_plain_image_alone() -> None:
    point = torch.zeros(1, 2, 5, 5)
    point[0, 0, 2, 2] = 1.0
    found = Perturbation("blur", 0.5).apply(point, 0)
    assert float(found[0, 0, 2, 2]) == pytest.approx(1 - 0.5 * 0.75)
    assert float(found[0, 0, 1, 1]) == pytest.approx(0.5 / 16)
    assert float(found[0, 1].abs().sum()) == 0
    flat = torch.full((1, 2, 3, 3), 0.7)
    torch.testing.assert_close(Perturbation("blur", 1.0).apply(flat, 0), flat)


@pytest.mark.parametrize(
    ("kind", "amount"),
    [
        *[("noise", 0), ("noise", -1), ("mirror", 1), ("shift", 0), ("shift", 0.5)],
        *[("shift", float("nan")), ("shift", float("inf")), ("blur", 0), ("blur", 1.5)],
    ],
)
def test_an_amount_that_makes_no_sense_is_an_error(kind: str, amount: float) -> None:
    with pytest.raises(ConfigError, match=f"'{kind}' has the amount .*; noise takes more than 0"):
        Perturbation(kind, amount)


def test_an_unknown_perturbation_and_an_empty_echo_are_errors() -> None:
    with pytest.raises(ConfigError, match="no perturbation 'nois'; did you mean 'noise'"):
        Perturbation("nois", 1)
    with pytest.raises(ConfigError, match="an echo has no perturbation; give at least one"):
        Echo(())


def test_echoes_are_the_answers_to_every_change_from_one_forward_pass() -> None:
    net, calls = seeded_net(), []
    handle = net.register_forward_hook(lambda _m, args, _o: calls.append(len(args[0])))
    with torch.inference_mode():
        echoes = ECHO.logits(net, IMAGES)
        handle.remove()
        expected = [net(p.apply(IMAGES, i)) for i, p in enumerate(ECHO.perturbations)]
    assert calls == [3 * len(IMAGES)]
    torch.testing.assert_close(echoes, torch.stack(expected, dim=1), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_shown_is_a_failure_that_names_its_stage() -> None:
    extras, run = Extras(small_witness(), ECHO), Routed(torch.zeros(2, 10), torch.zeros(2, 3))
    vectors, colours = torch.zeros(2, 7), torch.zeros(2, 5, 8, 8)
    for look, stage in (("path+witness", "witness"), ("path+echoes", "second_look")):
        with pytest.raises(GuardFailure, match=r"shape \(2, 7\) are no images \(N, C") as caught:
            extras.show(look, run, nn.Identity(), vectors)
        assert caught.value.stage == stage
        with pytest.raises(GuardFailure, match="no answer was had: RuntimeError") as caught:
            extras.show(look, run, nn.Conv2d(1, 1, 1), colours)
        assert caught.value.stage == stage
    with pytest.raises(GuardFailure, match=r"carry 'path' and not 'path\+witness'; collect them"):
        Extras().show("path+witness", run, nn.Identity(), vectors)


CLASSES = torch.arange(100) % 2


def calibrations(*looks: str) -> dict[str, Calibration]:
    return {look: Calibration(torch.arange(100.0), CLASSES) for look in looks}


@pytest.mark.parametrize(
    ("witness", "looks", "has", "first", "second"),
    [
        ("always", FOUR, "we", "path+witness", "path+witness+echoes"),
        ("second_look", FOUR, "we", "path", "path+witness+echoes"),
        ("off", FOUR, "we", "path", "path+echoes"),
        ("always", FOUR[:2], "w", "path+witness", None),
        ("second_look", FOUR[:2], "w", "path", "path+witness"),
        ("off", FOUR[:2], "w", "path", None),
        ("always", ("path", "path+echoes"), "e", "path", "path+echoes"),
        ("always", ("path",), "we", "path", None),
        ("always", ("path+witness", "path+echoes"), "we", "path+witness", None),
    ],
)
def test_settings_and_what_is_calibrated_choose_the_looks(
    witness: str, looks: tuple[str, ...], has: str, first: str, second: str | None
) -> None:
    extras = Extras(small_witness() if "w" in has else None, ECHO if "e" in has else None)
    settings = ModelSettings.model_validate({"witness": witness})
    plan = make_plan(settings, calibrations(*looks), extras)
    assert (plan.first, plan.second) == (first, second)
    assert (plan.again is None) == (second is None)


def test_settings_that_leave_no_look_are_an_error() -> None:
    settings = ModelSettings.model_validate({"witness": "off"})
    with pytest.raises(ConfigError, match="'witness: off' leaves the guard no look that it is"):
        make_plan(settings, calibrations("path+witness"), Extras(small_witness()))


def test_doubtful_rows_come_most_doubtful_first() -> None:
    extras = Extras(echo=ECHO)
    settings = ModelSettings.model_validate({"second_look": {"below_p": 0.2}})
    plan = make_plan(settings, calibrations("path", "path+echoes"), extras)
    scores = torch.tensor([85.0, 3.0, 99.5, 85.0, 79.0])
    scored = plan.calibration.rank(scores, torch.zeros(5).long())
    assert plan.doubtful(scored).tolist() == [2, 0, 3]


def test_looks_that_were_calibrated_on_different_images_are_an_error() -> None:
    first = Calibration(torch.arange(100.0), CLASSES)
    other = Calibration(torch.arange(100.0), 1 - CLASSES)
    with pytest.raises(CalibrationError, match="calibrated on different images; fit it again"):
        first.again(other, 0.2)


def ticking(*times: float) -> Pace:
    clock: Iterator[float] = iter(times)
    return Pace(lambda: next(clock))


def test_a_budget_fits_as_many_rows_as_the_last_measure_says() -> None:
    pace = ticking(0.0, 0.02, 1.0, 1.5)
    with pace.measured(4):
        pass
    assert (pace.fitting(0.02), pace.fitting(0.004), pace.fitting(0)) == (4, 0, 0)
    with pace.measured(1):
        pass
    assert pace.fitting(1.01) == 2


def test_a_slow_moment_does_not_switch_the_second_look_off_for_good() -> None:
    pace = ticking(0.0, 1.0)
    with pace.measured(1):
        pass
    waits = next(count for count in range(1000) if pace.fitting(0.1))
    assert 50 < waits < 200


def test_the_second_look_is_measured_also_where_it_fails() -> None:
    pace = ticking(0.0, 3.0)
    with pytest.raises(KeyError), pace.measured(1):
        raise KeyError
    assert pace.fitting(2.0) == 0
