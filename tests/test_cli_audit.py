"""`pathguard incidents` and `pathguard recalibrate`, as an operator runs them."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from defense.cli import rates
from defense.cli.rates import with_rates
from defense.config import parse_settings
from defense.errors import ConfigError
from defense.recalibrate import Rates
from defense.trail import Incident, Tally, read_trail, write_call
from tests.cli import Run, run
from tests.trails import incident, tally, uniform, write

__all__ = ["run"]  # a fixture that pytest finds here

GUARD_YAML = """\
# Ours. Ask ada before you touch it.
version: 1
defaults:
  mode: enforce   # since March
  flag: {target_fpr: 0.01}  # agreed
  reject:
    target_fpr: 0.001
    per_class: {"stop": {target_fpr: 0.01}}
models:
  other: {mode: off}
"""


@pytest.fixture
def trail(tmp_path: Path) -> Path:
    folder = tmp_path / "trail"
    lines: list[Incident | Tally] = [
        incident(0, id="a" * 32, verdict="reject", p_value=0.0005),
        incident(1, id="b" * 32),
        incident(
            2, id="c" * 32, verdict="invalid", p_value=None, reason="not_an_image", reasons=None
        ),
        incident(3, id="b1" * 16, model="large", probing=True),
        tally(4, verdicts={"accept": 9990, "flag": 9, "reject": 1}, p_values=uniform(10_000)),
    ]
    write(folder, lines)
    return folder


def listed(run: Run, trail: Path, *words: object) -> list[str]:
    """Return the first letters of the ids that `incidents list` prints."""
    code, printed, said = run("incidents", "list", "--trail", trail, "--json", *words)
    assert code == 0, said
    return [json.loads(line)["id"][:2] for line in printed.splitlines()]


def test_incidents_are_listed_the_latest_first(run: Run, trail: Path) -> None:
    write_call(trail, "b" * 32, "false_alarm")
    code, printed, said = run("incidents", "list", "--trail", trail)

    assert code == 0
    rows = [line.split("  ")[1].strip() for line in printed.splitlines()[1:]]
    assert rows == ["b1b1b1b1", "cccccccc", "bbbbbbbb", "aaaaaaaa"]
    assert "not an image" in printed
    assert "taken for cat, 1 of 2 sites read another class" in printed
    assert "false_alarm" in printed
    assert "4 of 4 incidents." in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--since", "2026-03-01T12:01"], ["b1", "cc", "bb"]),
        (["--until", "2026-03-01T12:01:00+00:00"], ["aa"]),
        (["--since", "1m"], []),
        (["--model", "large"], ["b1"]),
        (["--verdict", "reject"], ["aa"]),
        (["--max-p", "0.001"], ["aa"]),
        (["--call", "attack"], ["bb"]),
        (["--call", "none", "--limit", "2"], ["b1", "cc"]),
    ],
)
def test_incidents_are_chosen(
    run: Run, trail: Path, words: Sequence[str], expected: list[str]
) -> None:
    write_call(trail, "b" * 32, "attack")

    assert listed(run, trail, *words) == expected


def test_since_so_long_ago_finds_what_just_happened(run: Run, trail: Path) -> None:
    write(trail, [incident(time=datetime.now(UTC) - timedelta(minutes=30), id="d" * 32)])

    assert listed(run, trail, "--since", "1h") == ["dd"]


def test_an_incident_is_shown_with_its_reasons(run: Run, trail: Path) -> None:
    write_call(trail, "a" * 32, "attack", by="ada")
    code, printed, _ = run("incidents", "show", "aa", "--trail", trail)

    assert code == 0
    for part in (
        "reject (mode enforce)", "0.0005 (targets: flag 0.01, reject 0.001)", "attack by ada",
        "cat, then dog", "dog (80%)", "layer2.relu#0", "17 (-6.1)",
        "nearest clean paths", "dog/1.png", "nearest of that class", "1.73",
    ):  # fmt: skip
        assert part in printed
    assert (
        json.loads(run("incidents", "show", "aa", "--trail", trail, "--json")[1])["call"]
        == "attack"
    )


def test_hostile_texts_are_printed_as_text(run: Run, trail: Path) -> None:
    write(trail, [incident(9, id="e" * 32, model="[red]x[/red]\x1b[2J")])
    printed = "".join(
        run("incidents", *words, "--trail", trail)[1] for words in (["list"], ["show", "ee"])
    )

    assert printed.count("[red]x[/red]\ufffd[2J") == 2


def test_damaged_lines_are_told_and_left_out(run: Run, trail: Path) -> None:
    with (trail / "trail-1-0.jsonl").open("a") as file:
        file.write("{half")
    code, _, said = run("incidents", "list", "--trail", trail)

    assert code == 0
    assert "1 damaged lines were left out." in said


def test_a_call_is_kept(run: Run, trail: Path) -> None:
    code, _, said = run("incidents", "call", "aa", "attack", "--trail", trail, "--by", "ada")

    assert code == 0, said
    call = read_trail(trail).calls["a" * 32]
    assert (call.call, call.by) == ("attack", "ada")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["list", "--trail", "nowhere"], "there is no audit trail in nowhere; name the folder"),
        (["list", "--since", "soon"], "'soon' is no time; give 90m, 12h or 7d"),
        (["list", "--since", "999999d"], "'999999d' is no time"),
        (["list", "--verdict", "rejekt"], "--verdict knows no 'rejekt'; did you mean 'reject'?"),
        (["list", "--call", "atack"], "--call knows no 'atack'; did you mean 'attack'?"),
        (["show", "f"], "no incident begins with 'f'; see 'pathguard incidents list'"),
        (["show", "b"], "2 incidents begin with 'b'"),
        (
            ["call", "aa", "fine"],
            "nothing is called 'fine'; known are: attack, false_alarm, unsure",
        ),
        (
            ["replay", "--archive", "x", "--guard", "x"],
            "none of 4 incidents has a payload to replay",
        ),
    ],
)
def test_mistakes_are_one_sentence(run: Run, trail: Path, words: list[str], sentence: str) -> None:
    given = words if "--trail" in words else [*words, "--trail", str(trail)]
    code, _, said = run("incidents", *given)

    assert code == 1
    assert sentence in " ".join(said.split())


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "guard.yaml"
    path.write_text(GUARD_YAML)
    path.chmod(0o640)
    return path


@pytest.fixture
def answered(trail: Path) -> Path:
    """A trail in which an attack was flagged, and answered."""
    write(trail, [incident(5, id="d" * 32, p_value=0.0042)])
    write_call(trail, "d" * 32, "attack")
    return trail


def test_a_proposal_is_shown_and_nothing_changes(run: Run, answered: Path, config: Path) -> None:
    code, printed, said = run("recalibrate", "--trail", answered, "--config", config)

    assert code == 0, said
    shown = " ".join(printed.split())
    assert "small now 0.01 0.001 10000 " in shown
    assert "small proposed 0.01 0.0043 10000 " in shown
    assert "1 called attacks were answered" in shown
    assert "exceptions by class stay as they are" in shown
    assert "+ reject:" in shown
    assert "add --write" in said
    assert config.read_text() == GUARD_YAML


def test_a_written_proposal_keeps_comments_modes_and_other_models(
    run: Run, answered: Path, config: Path
) -> None:
    code, _, said = run("recalibrate", "--trail", answered, "--config", config, "--write")

    assert code == 0, said
    text = config.read_text()
    for line in GUARD_YAML.splitlines():
        assert line in text
    before, after = (parse_settings(t, where="guard.yaml") for t in (GUARD_YAML, text))
    own = after.for_model("small")
    assert (own.flag, own.reject.target_fpr) == (before.defaults.flag, 0.0043)
    assert own.reject.per_class == before.defaults.reject.per_class
    assert (after.defaults, after.for_model("other")) == (
        before.defaults,
        before.for_model("other"),
    )
    assert stat.S_IMODE(config.stat().st_mode) == 0o640
    assert list(config.parent.glob(".guard.yaml-*")) == []
    assert (
        "Nothing is to be changed."
        in run("recalibrate", "--trail", answered, "--config", config)[2]
    )


def test_where_nothing_speaks_against_the_rates_nothing_is_written(
    run: Run, trail: Path, config: Path
) -> None:
    code, _, said = run("recalibrate", "--trail", trail, "--config", config, "--write")

    assert (code, config.read_text()) == (0, GUARD_YAML)
    assert "Nothing is to be changed." in said


def test_a_trail_without_a_record_of_the_model_says_so(run: Run, trail: Path, config: Path) -> None:
    code, _, said = run("recalibrate", "--trail", trail, "--config", config, "--model", "x")

    assert code == 1
    assert "has no record of 'x' to learn from; audit some traffic first" in " ".join(said.split())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "version: 1\n",
        "models: {3: {flag: {score: 2.5}}}\n",
        "defaults:\n  flag: {target_fpr: 2.0e-2}\nmodels:\n  '3': {reject: {target_fpr: 1.0e-3}}\n",
    ],
)
def test_rates_are_written_into_any_valid_file(text: str) -> None:
    edited = with_rates(text, {"3": Rates(0.02, 0.00008)}, where="guard.yaml")
    own = parse_settings(edited, where="guard.yaml").for_model("3")

    assert (own.flag.target_fpr, own.flag.score, own.reject.target_fpr) == (0.02, None, 0.00008)
    assert "0.00008" in edited


@pytest.mark.parametrize(
    "text",
    [
        "models:\n  a: &one {flag: {target_fpr: 0.5}}\n  b: *one\n",
        "version: 1\nversion: 1\n",
    ],
    ids=["shared", "twice"],
)
def test_a_file_that_cannot_be_edited_alone_is_left_to_its_owner(text: str) -> None:
    with pytest.raises(ConfigError, match=r"guard\.yaml cannot be edited without changing more"):
        with_rates(text, {"a": Rates(0.02, 0.002)}, where="guard.yaml")


def test_a_file_that_is_edited_meanwhile_stays_as_it_is(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"was edited meanwhile and stays as it is; run"):
        rates.replace_file(config, "as it was", "as it shall be")

    assert config.read_text() == GUARD_YAML


def test_a_link_to_a_configuration_stays_a_link(config: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to(config)
    rates.replace_file(link, GUARD_YAML, "version: 1\n")

    assert link.is_symlink()
    assert config.read_text() == "version: 1\n"


def test_a_file_that_cannot_be_replaced_says_so(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: object) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "replace", busy)  # a file that is mounted alone, for instance
    with pytest.raises(ConfigError, match=r"cannot replace .*: Device or resource busy; get the"):
        rates.replace_file(config, GUARD_YAML, "version: 1\n")

    assert [path.name for path in config.parent.iterdir()] == ["guard.yaml"]


def test_editing_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ruamel.yaml", None)
    with pytest.raises(ConfigError, match=r"needs the extra 'console'; pip install 'pathguard\["):
        with_rates("", {"3": Rates(0.02, 0.002)}, where="guard.yaml")
