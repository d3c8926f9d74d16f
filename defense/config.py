"""`guard.yaml` to frozen, validated settings. Every mistake in it is one sentence.

The file sets what an operator decides: mode, thresholds, consequences, limits. What was fitted is
in the guard. Unknown keys are errors that name the nearest valid one.
"""

from __future__ import annotations

import reprlib
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from PIL import Image
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from defense.errors import ConfigError, nearest

Rate = Annotated[float, Field(gt=0, lt=1)]
MAX_FILE_BYTES = 1_000_000
ATTRIBUTIONS = (
    "neflag",
    "integrated_gradients",
    "smoothgrad",
    "deeplift",
    "saliency",
    "pathway",
    "contribution",
)
"""Names of `defense.attributions.METHODS`, which is imported only where it is used."""


def _text_keys(value: object) -> object:
    """YAML reads the class or model called 3 as a number."""
    if not isinstance(value, dict):
        return value
    return {str(key) if type(key) is int else key: item for key, item in value.items()}


def _off(value: object) -> object:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


def _unless_off(value: object) -> object:
    """`off` switches a block off, where null would read as forgotten."""
    if value is None:
        raise ValueError("give its keys, or off")
    return None if _off(value) == "off" else value


def _known_formats(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return formats by the names that Pillow has for them."""
    Image.init()
    for name in names:
        if name.upper() not in Image.OPEN:
            raise ValueError(f"no format is called '{name}'{nearest(name.upper(), Image.OPEN)}")
    return tuple(name.upper() for name in names)


def _known_attribution(name: str) -> str:
    if name not in ATTRIBUTIONS:
        raise ValueError(f"no attribution method is called '{name}'{nearest(name, ATTRIBUTIONS)}")
    return name


def _absolute(path: Path) -> Path:
    """A worker's own folder is nobody's idea of where a relative path starts."""
    if not path.is_absolute():
        raise ValueError("give an absolute path")
    return path


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Rule(Strict):
    """When a tier applies: at a target false-positive rate, or from a raw score on."""

    target_fpr: Rate | None = Field(
        default=None, description="share of clean requests that may be hit"
    )
    score: float | None = Field(
        default=None, description="raw detector score from which the tier applies"
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.target_fpr is None) == (self.score is None):
            raise ValueError("give either target_fpr or score, and only one of them")
        return self


class TierRule(Rule):
    """A tier's rule, with exceptions per predicted class (by class name or index)."""

    per_class: Annotated[dict[str, Rule], BeforeValidator(_text_keys)] = Field(default_factory=dict)


class SecondLook(Strict):
    """When extra forward passes may be spent on a doubtful request, and for how long in a batch."""

    below_p: Rate = 0.04
    budget_ms: Annotated[float, Field(ge=0, le=10_000)] = 20


class Probing(Strict):
    """When requests are the questions of an attack: so many of the last ones were nearly the same."""

    after: Annotated[int, Field(ge=2, le=1000)] = Field(
        default=8, description="nearly equal, but not equal, requests that must have come before"
    )
    remember: Annotated[int, Field(ge=16, le=65_536)] = Field(
        default=4096, description="different requests that every worker compares with"
    )


class Explanations(Strict):
    """What /explanations answers to whoever shows the key, and what that may cost."""

    key_file: Annotated[Path, AfterValidator(_absolute)] = Field(
        description="file with the secret that the header X-PathGuard-Key has to show"
    )
    method: Annotated[str, AfterValidator(_known_attribution)] = Field(
        default="integrated_gradients", description="attribution method"
    )
    max_pixels: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        default=65_536, description="of an input that is attributed; larger ones get all else"
    )
    budget_ms: Annotated[float, Field(ge=1, le=600_000)] = Field(
        default=5000, description="what the explanations of a batch may take together"
    )


class Limits(Strict):
    """What one request may cost, decided before anything of it is decoded."""

    max_bytes: Annotated[int, Field(ge=1)] = Field(
        default=6_000_000, description="of a request's body"
    )
    max_pixels: Annotated[int, Field(ge=1)] = Field(
        default=25_000_000, description="of an image, by its header, before it is decoded"
    )
    formats: Annotated[tuple[str, ...], AfterValidator(_known_formats)] = Field(
        default=("JPEG", "PNG", "WEBP", "GIF"),
        description="that Pillow may open for the archive's handler; of the others it knows, some run "
        "programs, or decode so slowly that no limit on bytes and pixels bounds their time",
    )
    max_passes: Annotated[int, Field(ge=1)] = Field(
        default=20,
        description="over one image: scans of a progressive JPEG (usual are 10), profiles of a PNG",
    )
    max_parts: Annotated[int, Field(ge=1)] = Field(
        default=4000,
        description="of an image: chunks of a PNG; of others, what has to be read to know the size",
    )


class ModelSettings(Strict):
    """How one served model is guarded."""

    mode: Annotated[Literal["off", "shadow", "flag", "enforce"], BeforeValidator(_off)] = Field(
        default="enforce",
        description="off: not scored; shadow: scored and counted, answers untouched; "
        "flag: suspicious answers carry headers; enforce: suspicious requests are refused",
    )
    flag: TierRule = Field(
        default=TierRule(target_fpr=0.01),
        description="share of clean requests that may be flagged (`target_fpr`), or a raw `score`; "
        "`per_class` holds exceptions by predicted class",
    )
    reject: TierRule = Field(
        default=TierRule(target_fpr=0.001), description="the same for refusals"
    )
    reject_status: Annotated[int, Field(ge=400, le=499)] = Field(
        default=403, description="HTTP status of a refusal; 4xx, because 5xx is retried blindly"
    )
    on_error: Literal["open", "closed"] = Field(
        default="open",
        description="when the guard fails: open answers and counts, closed refuses (503)",
    )
    expose_score: bool = Field(
        default=False, description="send p-value and score to clients; an attacker would thank you"
    )
    witness: Annotated[Literal["always", "second_look", "off"], BeforeValidator(_off)] = Field(
        default="always",
        description="when the guard's witness is asked, where it has one: about every request, about "
        "doubtful ones, or never",
    )
    second_look: SecondLook = Field(
        default=SecondLook(),
        description="where a guard has a second look: the first p-value up to which a request gets "
        "it, and what it may take per batch",
    )
    probing: Annotated[Probing | None, BeforeValidator(_unless_off)] = Field(
        default=Probing(),
        description="refuses requests that are nearly those that came before, as an attack by queries "
        "sends them; off where clients send streams of nearly equal images, such as video",
    )
    score_budget_ms: Annotated[float, Field(ge=1, le=600_000)] = Field(
        default=5000,
        description="what a batch's verdicts may take, whatever hangs; after that they are `error`. "
        "Keep it well below TorchServe's responseTimeout, which ends the worker",
    )
    explanations: Annotated[Explanations | None, BeforeValidator(_unless_off)] = Field(
        default=None,
        description="what /explanations tells the holder of a key about any request, refused ones "
        "included: `{key_file: /path, method: integrated_gradients, max_pixels: 65536, "
        "budget_ms: 5000}`; null, written `off`: only the archive's own explanations",
    )
    optimize: bool | Literal["compiled"] = Field(
        default=False,
        description="true: run the model in a faster form (folded, channels-last, bfloat16 where it "
        "pays), checked at the start: same class, logits within a tolerance instead of to the bit; "
        "compiled: by torch.compile as well, where there is a C++ compiler; from the next start on",
    )
    limits: Limits = Limits()


class Payloads(Strict):
    """How much of what suspicious requests carried is kept."""

    max_mib: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        default=256, description="of all of them; the oldest go first"
    )
    max_bytes: Annotated[int, Field(ge=1, le=1_000_000_000)] = Field(
        default=1_000_000, description="of one; what is larger is not kept"
    )


class Audit(Strict):
    """Where every flagged, rejected or failed request leaves a line, and how much of it is kept."""

    folder: Annotated[Path, AfterValidator(_absolute)] = Field(
        description="of this server's trail; it is made where it is missing"
    )
    max_mib: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        default=64, description="of all lines; the oldest files go first"
    )
    payloads: Annotated[Payloads | None, BeforeValidator(_unless_off)] = Field(
        default=None, description="keep what such requests carried"
    )


class MetricsSettings(Strict):
    """Where Prometheus finds the metrics."""

    host: str = Field(
        default="127.0.0.1", description="address of the exporter; from the next start on"
    )
    port: Annotated[int, Field(ge=1, le=65535)] = Field(default=8083, description="its port")


class Settings(Strict):
    """All of `guard.yaml`."""

    version: Literal[1] = Field(default=1, description="of this file's format")
    defaults: ModelSettings = ModelSettings()
    models: Annotated[dict[str, ModelSettings], BeforeValidator(_text_keys)] = Field(
        default_factory=dict, description="a model's own keys, laid over `defaults`"
    )
    metrics: MetricsSettings = MetricsSettings()
    audit: Annotated[Audit | None, BeforeValidator(_unless_off)] = Field(
        default=None,
        description="a line for every flagged, rejected or failed request, outside `off`: "
        "`{folder: /path, max_mib: 64, payloads: off}`, where payloads may be `{max_mib: 256, "
        "max_bytes: 1000000}`; null, written `off`: no trail; from the next start on",
    )

    def for_model(self, name: str) -> ModelSettings:
        """Return the settings of the model called `name`."""
        return self.models.get(name, self.defaults)


def parse_settings(text: str | bytes, *, where: str) -> Settings:
    """Return the settings that a YAML text describes; ConfigError names `where` and the key."""
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError(f"{where} is over {MAX_FILE_BYTES} bytes; expected a short YAML file")
    try:
        raw = yaml.safe_load(text)
    except Exception as error:
        # A bad scalar (the date 2001-99-99) raises ValueError, KeyError and others, not YAMLError.
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = f"{where}, line {line + 1}" if line is not None else where
        raise ConfigError(f"{place} is not valid YAML; mend the syntax there") from error
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} holds a {type(raw).__name__}; expected keys such as 'defaults'")
    try:
        return Settings.model_validate(_with_defaults(raw))
    except ValidationError as error:
        raise ConfigError(f"{where}: {_sentence(error)}") from error


def read_settings(path: Path) -> Settings:
    """Read and validate a `guard.yaml`."""
    return parse_settings(read_content(path), where=str(path))


def read_content(path: Path) -> bytes:
    """Read a `guard.yaml` as it is; ConfigError where that cannot be."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; give a readable YAML file"
        ) from error


def _with_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """Lay every model's keys over the defaults, key by key."""
    defaults, models = raw.get("defaults"), raw.get("models")
    if not isinstance(models, dict) or not isinstance(defaults, dict | None):
        return raw
    merged = {
        name: _laid_over(defaults or {}, own) if isinstance(own, dict) else own
        for name, own in models.items()
    }
    return {**raw, "models": merged}


def _laid_over(defaults: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Lay keys over others; blocks key by key, but rules whole: one may be a rate, one a score."""
    merged = {**defaults, **own}
    for block in ("limits", "second_look", "probing", "explanations"):
        if isinstance(defaults.get(block), dict) and isinstance(own.get(block), dict):
            merged[block] = {**defaults[block], **own[block]}
    return merged


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        return f"unknown key '{place}'{nearest(key, _keys_at(first['loc'][:-1]))}"
    message = first["msg"].removeprefix("Value error, ")
    got = first["input"]
    shown = "" if isinstance(got, dict) else f" (got {_short(got)})"
    return f"'{place}' is not valid{shown}: {message[0].lower()}{message[1:]}"


def _short(value: object) -> str:
    """Return a value as text; YAML's references make small files of endless values."""
    brief = reprlib.Repr()
    brief.maxlevel = 2
    return brief.repr(value)


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Settings
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[str(part)].annotation
            if isinstance(model, types.UnionType):  # a block that may be off
                model = model.__args__[0]
        else:
            model = model.__args__[-1]
    return sorted(model.model_fields)
