"""Guards and reports for people: tables instead of JSON."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from defense.archive import FOLDER, WRAP, extract_archive
from defense.artifact import load_guard
from defense.config import Settings, read_settings
from defense.errors import PathGuardError
from defense.guard import Guard
from defense.policy import make_policy, target_fpr

CARD = "report_card"
"""The fact under which a guard carries the headline of its benchmark."""


def describe_guard(subject: Path, config: Path | None) -> dict[str, Any]:
    """Return what is in a guard folder or in a guarded archive, ready for JSON."""
    if subject.is_dir() and not (subject / WRAP).is_file():
        return _facts(load_guard(subject), config)
    with tempfile.TemporaryDirectory(prefix="pathguard-") as folder:
        archive = extract_archive(subject, Path(folder))
        if not archive.is_wrapped:
            raise PathGuardError(
                f"{subject} is not guarded; fit a guard with 'pathguard fit --archive {subject} ...'"
            )
        facts = _facts(load_guard(Path(folder) / FOLDER), config)
    return {"archive": str(subject), "model": archive.model_name, **facts}


def _facts(guard: Guard, config: Path | None) -> dict[str, Any]:
    layout = guard.router.layout
    settings = (read_settings(config) if config else Settings()).defaults
    return {
        "fingerprint": guard.fingerprint,
        "router": guard.router.name,
        "detector": guard.detector.name,
        "input": {"shape": list(guard.inputs.shape), "dtype": guard.inputs.dtype},
        "path": {
            "columns": layout.length,
            "statistics": list(layout.statistics),
            "sites": [{"name": site.name, "channels": site.channels} for site in layout.sites],
        },
        "classes": list(guard.class_names),
        "thresholds": {tier: _threshold(guard, settings, tier) for tier in ("flag", "reject")},
        **guard.facts,
    }


def _threshold(guard: Guard, settings: Any, tier: str) -> str:
    """Return a tier in words, or why the guard cannot keep it."""
    only = settings.model_copy(
        update={"flag": getattr(settings, tier), "reject": getattr(settings, tier)}
    )
    try:
        policy = make_policy(only, guard.calibration, guard.class_names)
    except PathGuardError as error:
        return str(error)
    rule = getattr(policy, tier).rule
    rate = target_fpr(getattr(policy, tier), guard.calibration)
    return (
        f"score >= {rule.score:g} (target rate {rate:.4g})"
        if rule.score
        else f"p-value <= {rate:g}"
    )


def print_guard(out: Console, facts: dict[str, Any]) -> None:
    """Print what `describe_guard` returned."""
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        if name == CARD:
            continue
        if name == "path":
            names = [f"{site['name']} ({site['channels']})" for site in value["sites"]]
            text = (
                f"{value['columns']} columns ({', '.join(value['statistics'])}): {', '.join(names)}"
            )
        elif isinstance(value, dict):
            text = "\n".join(f"{key}: {item}" for key, item in value.items())
        elif isinstance(value, list):
            text = ", ".join(map(str, value[:20])) + (", ..." if len(value) > 20 else "")
        else:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(f"[bold]{name.replace('_', ' ')}[/bold]", text)
    out.print(table)
    if isinstance(card := facts.get(CARD), dict):
        _print_card(out, card)


def _print_card(out: Console, card: dict[str, Any]) -> None:
    """Print the headline of the benchmark that a guard went through."""
    columns = ("report card", "floor", "goal", "measured", "sealed", "verdict")
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for mark in card.get("marks", {}).values():
        sealed = mark["sealed"]
        texts = [mark[key] for key in ("says", "floor", "goal", "measured")]
        texts += ["-" if sealed is None else f"{sealed:.4g}", mark["verdict"]]
        style = "bold red" if mark["verdict"] == "floor missed" else ""
        table.add_row(*(Text(text, style) for text in texts))
    out.print(table)
    behind = "; ".join(card.get("behind", [])) or "no attack"
    lines = (
        f"AUROC behind another detector on {card.get('behind_count', 0)} attacks: {behind}.",
        f"Failed checks of the benchmark: {card.get('failed_checks', 0)}.",
        f"Measured on {card.get('images')} images, sealed {card.get('sealed_images')}, by: "
        f"{card.get('command')}",
    )
    for line in lines:
        out.print(Text(line))


def print_report(out: Console, report: dict[str, Any]) -> None:
    """Print an evaluation report as two tables."""
    clean = report["clean"]
    rates = ", ".join(
        f"{_percent(v)} at {k}" for k, v in clean["realised_fpr"].items() if v is not None
    )
    out.print(
        f"Clean: {clean['n']} images, accuracy {_percent(clean['accuracy'])}, false positives {rates}."
    )
    if not report["attacks"]:
        return
    baselines = report["baselines"]
    columns = (
        "attack",
        "n",
        "fools",
        "AUROC",
        "TPR at\n5 % FPR",
        "TPR at\n1 % FPR",
        "fools\nguarded",
    )
    names = [f"AUROC\n{name.replace('_', ' ')}" for name in baselines]
    table = Table(*columns, *names, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name, row in report["attacks"].items():
        table.add_row(
            name,
            str(row["n"]),
            _percent(row["success_rate"]),
            _number(row["auroc"]),
            _percent(row["tpr"]["0.05"]),
            _percent(row["tpr"]["0.01"]),
            _percent(row["guarded_success_rate"]),
            *(_number(baseline[name]) for baseline in baselines.values()),
        )
    out.print(table)
    for name, row in report["controls"].items():
        out.print(f"Control, {name}: {_percent(row['fpr']['0.01'])} hit at 1 %.")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
