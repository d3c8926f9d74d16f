"""What a benchmark found is shown as it is: every figure, every loss, and nothing that runs."""

from __future__ import annotations

import copy
import json
import re
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from defense.artifact import JSON_NAME, TENSORS_NAME, load_guard, save_guard
from defense.cli.show import CARD
from defense.errors import ArtifactError
from defense.guard import Guard
from defense.offline.benchmark.card import MAX_BYTES, report_card, with_card
from defense.offline.benchmark.charts import Axis, Curve, chart
from defense.offline.benchmark.markdown import lost, markdown
from defense.offline.benchmark.marks import Mark, losses, marks, sides_of
from defense.offline.benchmark.report import FALSE_ALARMS, page
from tests.cli import Run, run
from tests.offline.benchmark_results import ATTACKS, CONTESTANTS, make_results

__all__ = ["run"]  # a fixture that pytest finds here

HOSTILE = "<script>alert('x')</script>|**\n# \"&"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return make_results()


@pytest.fixture(scope="module")
def html(results: dict[str, Any]) -> str:
    return page(results)


class Parsed(HTMLParser):
    """Keeps the tags of a page, and complains where they do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def rename(value: Any, names: dict[str, str]) -> Any:
    """Return results with some keys and texts renamed wherever they stand."""
    if isinstance(value, dict):
        return {names.get(key, key): rename(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [rename(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def mark(results: dict[str, Any], key: str) -> Mark:
    return next(mark for mark in marks(results) if mark.standard.key == key)


def test_the_page_is_one_file_that_loads_and_runs_nothing(html: str) -> None:
    parsed = Parsed(html)
    assert parsed.open == []
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in parsed.tags}
    assert not re.search(r"://|url\(|@import|\son[a-z]+=", html)


def test_every_table_has_its_caption_and_every_drawing_says_what_it_shows(html: str) -> None:
    parsed = Parsed(html)
    assert parsed.count("table") == parsed.count("caption") > 10
    assert parsed.count("h1") == 1
    assert all(attrs.get("scope") for tag, attrs in parsed.tags if tag == "th")
    drawings = [attrs for tag, attrs in parsed.tags if tag == "svg"]
    assert all(attrs.get("aria-label") or attrs.get("aria-hidden") for attrs in drawings)
    assert sum("aria-label" in attrs for attrs in drawings) == 1 + len(ATTACKS) + 5


def test_every_figure_of_the_headline_is_in_the_page_and_in_the_markdown(
    results: dict[str, Any], html: str
) -> None:
    text = markdown(results)
    found = marks(results)
    assert all(mark.measured for mark in found)
    for mark in found:
        for shown in (mark.shown(mark.measured), mark.shown(mark.sealed), *mark.limits):
            assert f">{escape(shown)}</td>" in html, mark.standard.key
            assert " ".join(shown.split()) in text, mark.standard.key
        assert escape(mark.standard.words) in html


def test_the_headline_reads_the_results_where_they_stand(results: dict[str, Any]) -> None:
    ours, clean = (
        results["contestants"][name]["summary"] for name in ("pathguard", "pathguard_clean")
    )
    expected = {
        "seen_mean": ours["seen"]["mean"]["mean"],
        "seen_worst": ours["seen"]["worst"]["mean"],
        "unseen_mean": ours["unseen"]["mean"]["mean"],
        "unseen_worst": ours["unseen"]["worst"]["mean"],
        "clean_mean": clean["seen"]["mean"]["mean"],
        "clean_worst": clean["seen"]["worst"]["mean"],
        "tpr_1": ours["seen"]["tpr_1"]["mean"],
        "fpr_attacks": 0.0104,
        "shift_clean": clean["shift_fpr"],
        "noise_attacks": ours["noise_fpr"],
        "passes_clean": 0.21,
        "http": 0.55 / 0.96,
    }
    for key, value in expected.items():
        measured = mark(results, key).measured
        assert measured is not None
        assert measured.value == pytest.approx(value), key
    sealed = mark(results, "seen_mean").sealed
    assert sealed is not None
    assert sealed.value == results["sealed"]["pathguard"]["summary"]["seen"]["mean"]["mean"]


def test_the_margin_is_over_the_best_of_peers_and_baselines_and_names_it(
    results: dict[str, Any],
) -> None:
    means = {
        name: results["contestants"][name]["summary"]["seen"]["mean"]["mean"]
        for name, (kind, *_) in CONTESTANTS.items()
        if kind in ("peer", "baseline")
    }
    best = max(means, key=lambda name: means[name])
    measured = mark(results, "margin").measured
    ours = mark(results, "seen_mean").measured
    assert measured is not None
    assert ours is not None
    assert measured.value == pytest.approx(ours.value - means[best])
    assert measured.at == best


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (0.985, "goal"),
        (0.9849, "floor"),
        (0.95, "floor"),
        (0.9499, "missed"),
        (None, "not measured"),
    ],
)
def test_a_mark_is_judged_by_its_figure_with_both_limits_inside(
    results: dict[str, Any], value: float | None, verdict: str
) -> None:
    changed = copy.deepcopy(results)
    changed["contestants"]["pathguard"]["summary"]["seen"]["mean"] = (
        None if value is None else {"mean": value, "sd": 0.1, "low": 0.1, "high": 1.0}
    )
    assert mark(changed, "seen_mean").verdict == verdict


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(0.004, "missed"), (0.005, "floor"), (0.01, "goal"), (0.0121, "floor"), (0.016, "missed")],
)
def test_too_few_false_alarms_miss_the_target_as_too_many_do(
    results: dict[str, Any], value: float, verdict: str
) -> None:
    changed = copy.deepcopy(results)
    changed["contestants"]["pathguard"]["summary"]["realised_fpr_1"] = {"mean": value}
    assert mark(changed, "fpr_attacks").verdict == verdict


def test_attackers_who_know_everything_have_a_goal_and_no_floor(results: dict[str, Any]) -> None:
    changed = copy.deepcopy(results)
    changed["adaptive"]["worst"]["4"]["through"] = changed["adaptive"]["bare"]["4"]["fooled"]
    assert mark(changed, "adaptive").verdict == "open"
    assert "goal not reached" in page(changed)


def test_a_floor_that_is_missed_stands_beside_the_goals_that_are_reached(html: str) -> None:
    boxes = dict(re.findall(r"<h3><span>(\d+)</span> ([^<]+)</h3>", html))
    names = {words: int(count) for count, words in boxes.items()}
    assert names["floors missed"] == 1
    assert sum(names.values()) == len(marks(make_results()))
    assert '<td class="bad">floor missed</td>' in html


def test_an_attack_that_a_rival_sees_better_is_named_everywhere(
    results: dict[str, Any], html: str
) -> None:
    (loss,) = losses(results)
    assert (loss.attack, loss.rival, loss.theirs) == ("cw_0", "max_softmax", 0.991)
    assert f"cw_0: <b>{loss.ours:.3f}</b> against <b>0.991</b> of max_softmax" in html
    assert f"cw_0: AUROC {loss.ours:.3f} of pathguard, 0.991 of max\\_softmax" in markdown(
        results
    ).replace("max_softmax", "max\\_softmax")
    assert report_card(results)["behind"] == [f"cw_0: {loss.ours:.3f}, max_softmax 0.991"]


def test_losses_on_sealed_images_are_told_with_their_own_figures(results: dict[str, Any]) -> None:
    changed = copy.deepcopy(results)
    changed["sealed"]["pathguard"]["summary"]["seen"]["mean"] = {"mean": 0.8765}
    (told,) = [text for text in lost(changed) if "0.876" in text or "0.877" in text]
    assert "on sealed images, floor ≥" in told
    assert "check failed: grid" in lost(changed)


def test_a_control_that_wins_counts_as_a_loss(results: dict[str, Any]) -> None:
    changed = copy.deepcopy(results)
    changed["contestants"]["shuffled_path"]["seen"]["pgd_8"]["auroc"]["mean"] = 0.9999
    assert ("pgd_8", "shuffled_path") in {(loss.attack, loss.rival) for loss in losses(changed)}


def test_names_are_text_wherever_they_stand(results: dict[str, Any]) -> None:
    names = (
        "cw_0",
        "pathguard",
        "squeezing",
        "airplane",
        "blur",
        "mimic",
        "square",
        "grid",
        "torch",
    )
    hostile = rename(results, {name: name + HOSTILE for name in names})
    hostile["command"] = hostile["fingerprint"] = HOSTILE
    hostile["sanity"]["null"]["says"] = HOSTILE
    html, text = page(hostile), markdown(hostile)
    assert Parsed(html).open == []
    assert "<script" not in html
    assert f"cw_0{HOSTILE}" in unescape(html)
    body = text.split("```", 2)[2]
    assert "<script" not in body
    assert "\n# " not in body
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in body.splitlines() if line[:2] == "| "]
    assert len(widths) > 50
    rules = [line for line in body.splitlines() if line.startswith("| ---")]
    assert set(widths) <= {line.count("|") for line in rules}


SECTIONS = {
    "sealed": "sealed",
    "adaptive": "adaptive",
    "queries": "queries",
    "sanity": "sanity",
    "roc": "roc",
    "contestants": "detectors",
}


@pytest.mark.parametrize(
    "missing", [*SECTIONS, "attacks", "data", "versions", "artefacts", "command"]
)
def test_what_the_results_lack_is_left_out(
    results: dict[str, Any], missing: str, html: str
) -> None:
    empty: tuple[dict[str, Any] | None, ...] = ({}, None)
    for value in empty:
        less = page({**results, missing: value})
        assert Parsed(less).open == []
        assert "None" not in unescape(less)
        if missing in SECTIONS:
            assert f'<section id="{SECTIONS[missing]}">' in html
            assert f'<section id="{SECTIONS[missing]}">' not in less
        assert markdown({**results, missing: value}).startswith("# How well")


def test_results_of_nothing_make_a_page_of_nothing() -> None:
    assert "<section" not in page({})
    assert report_card({})["marks"] == {}


def test_a_cell_that_could_not_be_measured_is_a_dash(results: dict[str, Any]) -> None:
    changed = copy.deepcopy(results)
    changed["contestants"]["pathguard"]["seen"]["pgd_2"]["auroc"] = None
    changed["contestants"]["knn"]["seen"]["pgd_2"] = None
    changed["contestants"]["pathguard"]["shifts"]["blur"]["3"] = None
    html = page(changed)
    assert re.search(r'<tr><th scope="row">pgd_2</th><td>\N{EN DASH}</td>', html)


def test_equal_ratios_of_false_alarms_are_equally_far_apart(html: str) -> None:
    figure = re.search(r"<figure>(.*?)</figure>", html, re.DOTALL)
    assert figure is not None
    across = {
        name: float(x)
        for x, name in re.findall(r'<text x="([\d.]+)"[^>]*"middle">([\d.]+ %)</text>', figure[1])
    }
    steps = [
        across[b] - across[a] for a, b in (("0.1 %", "1 %"), ("1 %", "10 %"), ("10 %", "100 %"))
    ]
    assert steps[0] > 100
    assert steps == pytest.approx([steps[0]] * 3, abs=0.2)
    assert FALSE_ALARMS.along(1e-2) == pytest.approx(1 / 3)


def test_a_curve_is_drawn_where_its_points_are_and_leaves_out_what_is_off_the_axes() -> None:
    x = Axis("x", 1e-3, 1.0, (), log=True)
    y = Axis("y", 0.0, 1.0, ())
    drawn = chart(
        [Curve("a", [(0.0, 0.5), (1e-3, 0.0), (1.0, 1.0)], 0)], x, y, says="a", size="small"
    )
    (points,) = re.findall(r'class="curve s0" points="([^"]*)"', drawn)
    assert points == "46,160 278,8"


def test_who_is_drawn_are_ours_and_the_best_peers(html: str, results: dict[str, Any]) -> None:
    side, _ = sides_of(results)
    legend = re.search(r'<ul class="legend">(.*?)</ul>', html)
    assert legend is not None
    names = re.findall(r"</svg>([^<]+)</li>", legend[1])
    assert names == ["pathguard", "pathguard_clean", *side.rivals()[:3]]


def test_the_same_results_make_the_same_page(html: str) -> None:
    assert page(make_results()) == html


def test_the_card_is_small_json_of_the_headline(results: dict[str, Any]) -> None:
    card = report_card(results)
    assert json.loads(json.dumps(card)) == card
    assert set(card["marks"]) == {mark.standard.key for mark in marks(results)}
    assert card["marks"]["http"]["verdict"] == "floor missed"
    assert card["marks"]["http"]["value"] == pytest.approx(0.55 / 0.96, rel=1e-3)
    assert card["failed_checks"] == 1


def test_long_names_and_many_losses_do_not_make_the_card_large(results: dict[str, Any]) -> None:
    changed = copy.deepcopy(results)
    for cell in changed["contestants"]["max_softmax"]["seen"].values():
        cell["auroc"]["mean"] = 0.9999
    long = rename(changed, {name: name * 50 for name in ("max_softmax", *ATTACKS)})
    card = report_card({**long, "command": "x" * 5000, "seeds": list(range(500))})
    assert len(json.dumps(card)) < MAX_BYTES
    assert card["behind_count"] == len(ATTACKS) > len(card["behind"])


@pytest.fixture
def carded(guard: Guard, tmp_path: Path, results: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    save_guard(guard, tmp_path / "guard")
    return tmp_path / "guard", report_card({**results, "fingerprint": guard.fingerprint})


def test_a_card_goes_into_a_guard_and_changes_nothing_else(
    carded: tuple[Path, dict[str, Any]], guard: Guard
) -> None:
    folder, card = carded
    before = {name: (folder / name).read_bytes() for name in (JSON_NAME, TENSORS_NAME)}
    with_card(folder, card)
    assert load_guard(folder).facts == guard.facts | {CARD: card}
    assert (folder / TENSORS_NAME).read_bytes() == before[TENSORS_NAME]
    document = json.loads((folder / JSON_NAME).read_text())
    del document["facts"][CARD]
    assert document == json.loads(before[JSON_NAME])


def test_a_card_of_another_network_is_refused(
    carded: tuple[Path, dict[str, Any]], results: dict[str, Any]
) -> None:
    folder, _ = carded
    with pytest.raises(
        ArtifactError, match=r"report card is about the network 5e5e.* is for .*; run"
    ):
        with_card(folder, report_card(results))
    assert CARD not in load_guard(folder).facts


def test_inspect_prints_the_card_and_a_guard_without_one_as_before(
    run: Run, carded: tuple[Path, dict[str, Any]]
) -> None:
    folder, card = carded
    _, plain, _ = run("inspect", folder)
    with_card(folder, card | {"command": "pathguard [bold]benchmark[/bold]"})
    code, shown, _ = run("inspect", folder)
    assert code == 0
    assert shown.startswith(plain.rstrip("\n"))
    assert "report card" not in plain
    for mark in card["marks"].values():
        line = next(
            line for line in shown.splitlines() if re.search(re.escape(mark["says"]) + "  ", line)
        )
        assert all(mark[key] in line for key in ("floor", "goal", "measured", "verdict"))
    assert "behind another detector on 1 attacks: cw_0" in shown
    assert "pathguard [bold]benchmark[/bold]" in shown
    assert json.loads(run("inspect", folder, "--json")[1])[CARD]["marks"] == card["marks"]
