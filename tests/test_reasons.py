"""Why a path is unusual: sites and channels, what every layer reads, what the witness believes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from defense.calibration import Calibration
from defense.detectors import DETECTORS, Detector
from defense.guard import Guard, InputSpec
from defense.reasons import FARTHEST, Reasons, reasons
from defense.routers.activation import ActivationRouter
from defense.types import Routed
from tests.synthetic import CLASSES, LAYOUT, clean_looks, full_data, misled_looks

NAMES = ("ant", "bee", "cat", "dog")
CLEAN, LABELS = clean_looks(60, seed=50)
MISLED = misled_looks(60, seed=60)
_guards: dict[str, Guard] = {}


def guarded(detector: Detector) -> Guard:
    calibration = {"path": Calibration(torch.linspace(0, 1, 60), CLEAN.predicted)}
    spec, router = InputSpec((1, 8, 8), "float32"), ActivationRouter(LAYOUT)
    return Guard("0" * 64, router, detector, calibration, NAMES, spec, {})


def guard(name: str) -> Guard:
    """Return a guard with a detector that is fitted once."""
    if name not in _guards:
        _guards[name] = guarded(DETECTORS[name].recipe().fit(full_data(), LAYOUT, seed=0))
    return _guards[name]


def share_of_majority(found: list[Reasons], site: str) -> float:
    """Return how often `site` reads the class that was predicted."""
    said = [dict(one.votes)[site].label == one.predicted for one in found]
    return sum(said) / len(said)


def test_a_pushed_channel_is_the_first_reason_of_the_first_site_with_its_distance_and_sign() -> (
    None
):
    fused = guard("fused")
    usual = CLEAN.take(torch.arange(5))
    site, channel = 1, 7
    column = LAYOUT.columns[site].start + channel
    path = usual.path.clone()
    path[:, column] -= 40.0
    before, after = reasons(fused, usual), reasons(fused, replace(usual, path=path))

    for one, two in zip(before, after, strict=True):
        assert two.sites[0].site == "b"
        assert two.sites[0].channels[0].channel == channel
        assert two.sites[0].channels[0].deviation < -5
        assert two.sites[0].deviation > one.sites[0].deviation


def test_a_deviation_is_counted_in_standard_deviations_from_the_class_mean() -> None:
    """With as many directions as columns the class mean is exact: compare with plain arithmetic."""
    data = full_data()
    detector = DETECTORS["density"].recipe().fit(data, LAYOUT, seed=0)
    found = reasons(guarded(detector), CLEAN, most=20)
    x, label = CLEAN.path[0], int(CLEAN.predicted[0])
    first = data.clean.path[data.labels == label].mean(0)
    deviation = (x - first) / data.clean.path.std(0)
    said = {site.site: site for site in found[0].sites}
    for name, columns in zip("abc", LAYOUT.columns, strict=True):
        by_channel = {c.channel: c.deviation for c in said[name].channels}
        assert len(by_channel) == columns.stop - columns.start
        for channel, expected in enumerate(deviation[columns].tolist()):
            assert by_channel[channel] == pytest.approx(expected, abs=0.5)


def test_the_first_layers_of_an_attacked_run_read_another_class_than_the_last() -> None:
    found = reasons(guard("fused"), MISLED)
    assert share_of_majority(found, "a") < 0.2
    assert share_of_majority(found, "c") > 0.8
    assert share_of_majority(reasons(guard("fused"), CLEAN), "a") > 0.8


def test_the_witness_is_named_with_its_class_where_the_run_has_one() -> None:
    found = reasons(guard("fused"), CLEAN)
    right = [
        one.witness is not None and one.witness.label == NAMES[label]
        for one, label in zip(found, LABELS.tolist(), strict=True)
    ]
    assert sum(right) > 0.9 * len(right)
    assert all(one.witness is None for one in reasons(guard("fused"), CLEAN.at("path")))


def test_the_answer_and_its_runner_up_are_the_two_largest_logits() -> None:
    first, second = (NAMES[i] for i in CLEAN.logits[3].topk(2).indices.tolist())
    found = reasons(guard("fused"), CLEAN)[3]
    assert (found.predicted, found.runner_up) == (first, second)


@pytest.mark.parametrize(
    ("name", "sites", "votes"),
    [
        ("fused", True, True),
        ("density", True, False),
        ("trajectory", False, True),
        ("overlap", False, False),
        ("supervised", False, False),
    ],
)
def test_a_detector_gives_the_reasons_that_it_has_learnt_and_empty_lists_else(
    name: str, sites: bool, votes: bool
) -> None:
    said = [one.as_json() for one in reasons(guard(name), CLEAN)]
    assert set(DETECTORS) == {"fused", "density", "trajectory", "overlap", "supervised"}
    assert len(said) == len(CLEAN)
    assert all(bool(one["sites"]) is sites and bool(one["votes"]) is votes for one in said)


def test_a_rows_reasons_are_the_same_alone_and_among_others() -> None:
    together = [one.as_json() for one in reasons(guard("fused"), MISLED)]
    alone = [
        one.as_json()
        for row in torch.arange(len(MISLED)).split(1)
        for one in reasons(guard("fused"), MISLED.take(row))
    ]
    for one, other in zip(together, alone, strict=True):
        assert [site["site"] for site in one["sites"]] == [site["site"] for site in other["sites"]]
        assert [site["deviation"] for site in one["sites"]] == pytest.approx(
            [site["deviation"] for site in other["sites"]], rel=1e-2
        )
        assert [vote["class"] for vote in one["votes"]] == [
            vote["class"] for vote in other["votes"]
        ]


def test_at_most_so_many_sites_and_channels_are_named_and_most_unusual_comes_first() -> None:
    for one in reasons(guard("fused"), MISLED, most=2):
        assert len(one.sites) == 2
        assert one.sites[0].deviation >= one.sites[1].deviation
        for site in one.sites:
            sizes = [abs(channel.deviation) for channel in site.channels]
            assert len(sizes) == 2
            assert sizes == sorted(sizes, reverse=True)


def test_what_is_written_down_is_json_even_of_paths_beyond_all_bounds() -> None:
    run = CLEAN.take(torch.arange(2))
    wild = Routed(run.logits, torch.stack([run.path[0] + 1e30, run.path[1] * torch.nan]))
    said = [one.as_json() for one in reasons(guard("fused"), wild)]
    text = json.dumps(said, allow_nan=False)
    assert json.loads(text) == said
    assert said[0]["sites"][0]["channels"][0]["deviation"] == FARTHEST


def test_one_class_has_no_runner_up() -> None:
    run = Routed(torch.zeros(1, 1), torch.zeros(1, LAYOUT.length))
    assert reasons(guard("overlap"), run)[0].runner_up is None


def test_no_run_has_no_reasons() -> None:
    assert reasons(guard("fused"), CLEAN.take(torch.arange(0))) == []


def test_the_classes_of_the_layers_are_those_of_the_guard() -> None:
    said = {belief.label for one in reasons(guard("fused"), CLEAN) for _, belief in one.votes}
    assert said == set(NAMES)
    assert len(NAMES) == CLASSES
