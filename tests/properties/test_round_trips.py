"""What is written comes back: settings as YAML, guards as folders. What is nonsense is a ConfigError."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from defense.artifact import load_guard, save_guard
from defense.calibration import Calibration
from defense.config import ModelSettings, Rule, Settings, TierRule, parse_settings
from defense.detectors.density import DensityRecipe
from defense.errors import ConfigError
from defense.guard import Guard, InputSpec
from defense.routers.activation import STATISTICS, ActivationRouter
from defense.types import FitData, PathLayout, Routed, Site

rates = st.floats(1e-6, 0.999)
finite = st.floats(allow_nan=False, allow_infinity=False)
# Printable, because YAML has no way to hold most control characters; digits, because 3 is a class.
words = st.text(
    st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=12
)
thresholds = st.one_of(
    rates.map(lambda rate: {"target_fpr": rate}), finite.map(lambda score: {"score": score})
)
tiers = st.builds(
    lambda rule, own: rule | {"per_class": own},
    thresholds,
    st.dictionaries(words | st.integers(0, 999).map(str), thresholds, max_size=3),
)
models = st.fixed_dictionaries(
    {},
    optional={
        "mode": st.sampled_from(["off", "shadow", "flag", "enforce"]),
        "flag": tiers,
        "reject": tiers,
        "reject_status": st.integers(400, 499),
        "on_error": st.sampled_from(["open", "closed"]),
        "expose_score": st.booleans(),
        "second_look": st.fixed_dictionaries({"below_p": rates, "budget_ms": st.floats(0, 10_000)}),
        "witness": st.sampled_from(["always", "second_look", "off"]),
        "optimize": st.booleans(),
        "limits": st.fixed_dictionaries(
            {
                "max_bytes": st.integers(1, 10**12),
                "max_pixels": st.integers(1, 10**12),
                "formats": st.lists(st.sampled_from(["JPEG", "PNG", "TIFF"])),
                "max_passes": st.integers(1, 10**6),
                "max_parts": st.integers(1, 10**9),
            }
        ),
    },
)
files = st.fixed_dictionaries(
    {},
    optional={
        "version": st.just(1),
        "defaults": models,
        "models": st.dictionaries(words, models, max_size=3),
        "metrics": st.fixed_dictionaries({"host": words, "port": st.integers(1, 65535)}),
    },
)


def written(settings: Settings) -> str:
    text: str = yaml.safe_dump(settings.model_dump(exclude_none=True), allow_unicode=True)
    return text


@given(files)
def test_settings_come_back_from_yaml(raw: dict[str, Any]) -> None:
    settings = Settings.model_validate(raw)
    assert parse_settings(written(settings), where="guard.yaml") == settings


@given(files, words)
def test_a_model_has_its_own_keys_and_the_defaults_for_the_rest(
    raw: dict[str, Any], other: str
) -> None:
    settings = parse_settings(yaml.safe_dump(raw, allow_unicode=True), where="guard.yaml")
    defaults = raw.get("defaults", {})
    for name, own in raw.get("models", {}).items():
        assert settings.for_model(name) == ModelSettings.model_validate(defaults | own)
    if other not in raw.get("models", {}):
        assert settings.for_model(other) == ModelSettings.model_validate(defaults)


KEYS = sorted(
    {key for model in (Settings, ModelSettings, Rule, TierRule) for key in model.model_fields}
    | {"port", "host", "below_p", "max_bytes", "<<", "3", "off"}
)
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), words, st.binary(max_size=5), st.dates()
)
nonsense = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.integers() | words, inner, max_size=4)
    ),
    max_leaves=12,
)


def read(text: str | bytes) -> Settings | str:
    """Return the settings of a text, or what is said of it."""
    try:
        return parse_settings(text, where="guard.yaml")
    except ConfigError as error:
        return str(error)


@given(nonsense)
def test_any_document_is_settings_or_one_sentence(document: object) -> None:
    found = read(yaml.safe_dump(document, allow_unicode=True))
    assert isinstance(found, Settings) or (found.startswith("guard.yaml") and "\n" not in found)


SYNTAX = st.text(
    st.sampled_from(":-?!&*[]{},#|>@`%'\"\n\t 0123456789.e_xodefaultsmv<~=\\"), max_size=60
)
TAGS = ["int", "float", "bool", "null", "timestamp", "binary", "set", "omap", "pairs", "map", "seq"]
tagged = st.builds(
    lambda tag, text: f"a: !!{tag} {text}",
    st.sampled_from([*TAGS, "str", "python/name:os"]),
    SYNTAX,
)


@given(st.one_of(SYNTAX, tagged, st.text(max_size=40), st.binary(max_size=60)))
def test_any_text_is_settings_or_one_sentence(text: str | bytes) -> None:
    found = read(text)
    assert isinstance(found, Settings) or found.startswith("guard.yaml")


sites = st.builds(Site, words, st.integers(0, 3), st.integers(1, 5), st.sampled_from([1, -1]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | finite | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


def random_guard(
    places: Sequence[Site],
    statistics: Sequence[str],
    seed: int,
    names: Sequence[str],
    facts: dict[str, Any],
) -> Guard:
    """Fit a density guard to random runs."""
    layout = PathLayout(tuple(places), tuple(statistics))
    draw = torch.Generator().manual_seed(seed)
    count, classes = 40, len(names)
    run = Routed(
        torch.randn(count, classes, generator=draw),
        torch.randn(count, layout.length, generator=draw),
    )
    detector = DensityRecipe(rank=4).fit(FitData(run, run.predicted), layout, seed=seed)
    return Guard(
        fingerprint=f"{seed:064x}",
        router=ActivationRouter(layout),
        detector=detector,
        calibrations={"path": Calibration(detector.score(run), run.predicted)},
        class_names=tuple(names),
        inputs=InputSpec((3, -1, 8), "bfloat16"),
        facts=facts,
    )


@given(
    st.lists(sites, min_size=1, max_size=4),
    st.lists(st.sampled_from(STATISTICS), min_size=1, max_size=3, unique=True),
    st.integers(0, 2**31),
    st.lists(words, min_size=2, max_size=5),
    st.dictionaries(words, json_values, max_size=4),
)
def test_a_guard_comes_back_from_its_folder(
    places: list[Site], statistics: list[str], seed: int, names: list[str], facts: dict[str, Any]
) -> None:
    guard = random_guard(places, statistics, seed, names, facts)
    with tempfile.TemporaryDirectory() as folder:
        save_guard(guard, Path(folder) / "guard")
        again = load_guard(Path(folder) / "guard")
    assert replace(again, detector=guard.detector, calibrations=guard.calibrations) == guard
    assert torch.equal(again.calibration.score, guard.calibration.score)
    assert torch.equal(again.calibration.predicted, guard.calibration.predicted)
    run = Routed(torch.eye(len(names)), torch.ones(len(names), guard.router.layout.length))
    torch.testing.assert_close(
        again.detector.score(run), guard.detector.score(run), rtol=1e-4, atol=1e-6
    )
