"""Every mistake in guard.yaml is one sentence that names the file, the key and the way out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from defense.config import ModelSettings, Probing, Settings, parse_settings, read_settings
from defense.errors import ConfigError

DESIGN = """
version: 1
defaults:
  mode: enforce
  flag:   {target_fpr: 0.01}
  reject: {target_fpr: 0.001}
  reject_status: 403
  on_error: open
  expose_score: false
  witness: always
  second_look: {below_p: 0.04, budget_ms: 20}
  probing: {after: 8, remember: 4096}
  optimize: false
models:
  resnet18: {reject: {target_fpr: 0.0005}}
metrics: {host: 127.0.0.1, port: 8083}
"""


def parsed(text: str | bytes) -> Settings:
    return parse_settings(text, where="guard.yaml")


def test_the_file_of_the_design_says_what_the_defaults_say() -> None:
    settings = parsed(DESIGN)
    assert settings.defaults == ModelSettings()
    assert settings.metrics == Settings().metrics
    assert settings.for_model("resnet18").reject.target_fpr == 0.0005
    assert settings.for_model("another") == settings.defaults


@pytest.mark.parametrize("text", ["", "# nothing", "{}", "version: 1"])
def test_an_empty_file_is_all_defaults(text: str) -> None:
    assert parsed(text) == Settings()


def test_a_model_takes_from_the_defaults_what_it_does_not_say_itself() -> None:
    settings = parsed("defaults: {mode: flag, reject_status: 418}\nmodels: {a: {mode: shadow}}")
    assert settings.for_model("a").mode == "shadow"
    assert settings.for_model("a").reject_status == 418
    assert settings.for_model("b").mode == "flag"


def test_off_needs_no_quotes_although_yaml_reads_it_as_false() -> None:
    assert parsed("defaults: {mode: off}").defaults.mode == "off"


def test_a_witness_can_be_switched_off_without_quotes() -> None:
    assert parsed("defaults: {witness: off}").defaults.witness == "off"
    assert parsed("defaults: {witness: second_look}").defaults.witness == "second_look"


def test_the_memory_of_requests_can_be_switched_off_without_quotes() -> None:
    assert parsed("defaults: {probing: off}").defaults.probing is None
    assert parsed("defaults: {probing: {after: 4}}").defaults.probing == Probing(after=4)
    laid_over = parsed("defaults: {probing: {after: 4}}\nmodels: {a: {probing: {remember: 64}}}")
    assert laid_over.for_model("a").probing == Probing(after=4, remember=64)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{probing: }", "'defaults.probing' is not valid .*give its keys, or off"),
        ("{probing: {after: 1}}", "'defaults.probing.after' is not valid"),
        ("{probing: {after: 4, window: 9}}", "unknown key 'defaults.probing.window'"),
    ],
)
def test_a_mistake_about_the_memory_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parsed(f"defaults: {text}")


def test_classes_and_models_may_be_called_by_a_bare_number() -> None:
    text = "models: {7: {flag: {score: 1, per_class: {3: {score: 2}}}}}"
    assert parsed(text).for_model("7").flag.per_class["3"].score == 2


def test_settings_cannot_be_changed() -> None:
    settings = ModelSettings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.mode = "off"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("defauls: {}", "unknown key 'defauls'; did you mean 'defaults'?"),
        ("defaults: {mod: off}", "unknown key 'defaults.mod'; did you mean 'mode'?"),
        (
            "models: {a: {flag: {targetfpr: 1}}}",
            "'models.a.flag.targetfpr'; did you mean 'target_fpr'",
        ),
        (
            "defaults: {flag: {score: 1, per_class: {cat: {scor: 1}}}}",
            "unknown key 'defaults.flag.per_class.cat.scor'; did you mean 'score'?",
        ),
        ("metrics: {x: 1}", "unknown key 'metrics.x'; known are: host, port"),
        (
            "defaults: {mode: on}",
            "'defaults.mode' is not valid (got True): input should be 'off', ",
        ),
        (
            "defaults: {flag: {}}",
            "'defaults.flag' is not valid: give either target_fpr or score, and",
        ),
        (
            "defaults: {flag: {score: 1, target_fpr: 0.1}}",
            "give either target_fpr or score, and only",
        ),
        (
            "defaults: {flag: {target_fpr: 0}}",
            "'defaults.flag.target_fpr' is not valid (got 0): input",
        ),
        ("defaults: {flag: {target_fpr: 1}}", "(got 1): input should be less than 1"),
        ("defaults: {flag: {score: .nan}}", "(got nan): input should be a finite number"),
        ("defaults: {flag: {score: .inf}}", "(got inf): input should be a finite number"),
        (
            "defaults: {witness: sometimes}",
            "'defaults.witness' is not valid (got 'sometimes'): input should be 'always', ",
        ),
        ("defaults: {reject_status: 503}", "(got 503): input should be less than or equal to 499"),
        ("defaults: {limits: {max_bytes: 0}}", "'defaults.limits.max_bytes' is not valid (got 0)"),
        ("defaults: {limits: {formats: [JPG]}}", "no format is called 'JPG'; did you mean 'JPEG'?"),
        ("version: 2", "'version' is not valid (got 2): input should be 1"),
        ("models: [a]", "'models' is not valid (got ['a'])"),
        ("models: {a: 3}", "'models.a' is not valid (got 3)"),
        ("defaults: 3\nmodels: {a: {}}", "'defaults' is not valid (got 3)"),
        ("{5: 1}", "'5' is not valid (got 5): keys should be strings"),
        ("- a", "holds a list; expected keys such as 'defaults'"),
        ("just text", "holds a str; expected keys"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)) as caught:
        parsed(text)
    assert str(caught.value).startswith("guard.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["a: [1", "a: b: c", "\t- x", "a: !!python/object/apply:os.getpid []"]
)
def test_a_syntax_mistake_names_its_line(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"guard\.yaml, line 2 is not valid YAML; mend the syntax"
    ):
        parsed("version: 1\n" + text)


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe\x00",
        "\x00",
        "version: 2001-99-99",
        "x: !!int a",
        "x: !!bool a",
        f"x: {'1' * 5000}",
        "x: !!timestamp a",
        "[" * 1000,
    ],
)
def test_what_yaml_itself_stumbles_over_is_a_syntax_mistake(text: str | bytes) -> None:
    with pytest.raises(
        ConfigError, match=r"guard\.yaml.* is not valid YAML; mend the syntax there"
    ):
        parsed(text)


def test_a_wrong_value_that_unfolds_without_end_is_shown_in_short() -> None:
    layers = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 40)]
    bomb = "\n".join(["metrics:", "  port: {l0: &l0 [x]}", *layers, "defaults: {mode: *l39}"])
    with pytest.raises(ConfigError, match=r"'defaults\.mode' is not valid \(got \[") as caught:
        parsed(bomb)
    assert len(str(caught.value)) < 1000


def test_a_file_that_is_far_too_long_is_not_parsed() -> None:
    with pytest.raises(
        ConfigError, match=r"guard\.yaml is over 1000000 bytes; expected a short YAML"
    ):
        parsed(" " * 1_000_001)


def test_a_file_is_read_and_named_in_its_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    path.write_text("defaults: {mode: shadow}")
    assert read_settings(path).defaults.mode == "shadow"
    path.write_text("mode: shadow")
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))}: unknown key 'mode'"):
        read_settings(path)


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"cannot read .*g\.yaml: No such file or directory; give a"
    ):
        read_settings(tmp_path / "g.yaml")


def test_a_models_own_limits_are_laid_over_those_of_the_defaults_key_by_key() -> None:
    text = """
        defaults: {limits: {max_pixels: 1000}, reject: {score: 2.0}}
        models: {small: {limits: {max_bytes: 50}, reject: {target_fpr: 0.01}}}
    """
    small = parse_settings(text, where="guard.yaml").for_model("small")

    assert (small.limits.max_bytes, small.limits.max_pixels) == (50, 1000)
    assert (small.reject.target_fpr, small.reject.score) == (0.01, None)


def test_formats_are_named_as_pillow_names_them_in_any_case() -> None:
    settings = parsed("defaults: {limits: {formats: [png, Tiff]}}")
    assert settings.defaults.limits.formats == ("PNG", "TIFF")


def test_explanations_are_off_unless_a_key_file_is_named() -> None:
    assert parsed("").defaults.explanations is None
    assert parsed("defaults: {explanations: off}").defaults.explanations is None
    found = parsed("models: {a: {explanations: {key_file: /run/key}}}").for_model("a").explanations
    assert found is not None
    assert (found.key_file, found.method) == (Path("/run/key"), "integrated_gradients")
    assert (found.max_pixels, found.budget_ms) == (65_536, 5000)


def test_a_model_takes_from_the_default_explanations_what_it_does_not_say_itself() -> None:
    settings = parsed(
        "defaults: {explanations: {key_file: /run/key}}\n"
        "models: {a: {explanations: {method: saliency}}, b: {explanations: off}}"
    )
    found = settings.for_model("a").explanations
    assert found is not None
    assert (found.key_file, found.method) == (Path("/run/key"), "saliency")
    assert settings.for_model("b").explanations is None


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        ("{key_file: /k, method: salience}", "method is called 'salience'; did you mean 'saliency'?"),
        ("{key_file: keys/one}", "give an absolute path"),
        ("{key_file: /k, budgets: 3}", "key 'defaults.explanations.budgets'; did you mean 'budget_ms'?"),
        ("{method: neflag}", "'defaults.explanations.key_file' is not valid: field required"),
        ("{key_file: /k, max_pixels: 0}", "greater than or equal to 1"),
        ("{key_file: /k, budget_ms: .inf}", "finite number"),
        ("", "give its keys, or off"),
    ],
)  # fmt: skip
def test_a_mistake_in_explanations_is_one_sentence(block: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        parsed(f"defaults:\n  explanations: {block}")
