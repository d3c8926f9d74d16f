"""The table of hardening: rows that add up over runs, and the page that shows them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from defense.errors import ArtifactError
from defense.offline.page import markdown_table
from defense.offline.training import write_atomically

Row = dict[str, Any]
"""A network that was measured: see `defense.cli.harden`."""
KEY = ("weights", "role", "beside")
"""What makes two rows the same row: the later one replaces the other."""
SPELT = {"pgd50": "PGD-50", "autoattack": "AutoAttack"}
NOTES = """Below a network stands what was made of it. All measures are of test images that the
benchmark does not keep sealed, in brackets with 95 % intervals over images. PGD-50: right after 50
steps up the cross-entropy, in the ball of that radius. AutoAttack: right after these and after
AutoAttack's four, tried on what PGD-50 had left (torchattacks' APGD and targeted APGD of 20 steps,
targeted FAB, Square of 1000 queries; the standard has 5000 queries). Cosines compare the last features
of images that PGD-50 turned, at the largest radius, with the mean clean image of their own class and
of the answered one; r is the distance to the former over that to the latter, above 1 for an image that
looks like the answered class inside. Selectivity: the mean over all layers, and that of the last. The
guard is fitted with these attacks and judged as in [detection.md](detection.md), mean over attacks and
seeds; a backbone is the network that is guarded, a witness is asked beside the one that is named.
"""


def read_rows(path: Path) -> list[Row]:
    """Return the rows of the table at `path`, none where there is no such file."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())["rows"]
        for row in rows:
            _key(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} is no table of hardening ({error!r}); move it away to begin a new one"
        ) from error
    return list(rows)


def write_rows(folder: Path, measured: Sequence[Row]) -> None:
    """Put rows into hardening.json and hardening.md of `folder`, in the place of older ones alike."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "hardening.json"
    rows = {_key(row): row for row in read_rows(path)} | {_key(row): row for row in measured}
    text = json.dumps({"rows": list(rows.values())}, indent=1, allow_nan=False) + "\n"
    page = render(list(rows.values()))
    write_atomically(path, lambda unfinished: unfinished.write_text(text))
    write_atomically(folder / "hardening.md", lambda unfinished: unfinished.write_text(page))


def render(rows: Sequence[Row]) -> str:
    """Return the page of `rows`: one table, the guard attack by attack, and where all comes from."""
    rows = by_descent(rows)
    radii = list(dict.fromkeys(name for row in rows for name in row["network"]["robust"]))
    head = [
        *("network", "role", "made by", "clean"),
        *(_attack(name) for name in radii),
        *("cosine, own", "cosine, answered", "r", "selectivity", "of the last"),
        *("guard: AUROC", "guard: caught at 1 %", "guard: false alarms at 1 %"),
    ]
    body = [_line(row, radii) for row in rows]
    sections = [
        "# What hardening buys",
        markdown_table(head, body),
        NOTES,
        "## The guard, attack by attack",
        "AUROC, and the share caught at 1 % false alarms; `path alone` has neither witness nor echoes.",
        _by_attack(rows),
        "## Where this comes from",
        "\n".join(_origin(row) for row in rows),
    ]
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def by_descent(rows: Sequence[Row]) -> list[Row]:
    """Return rows with those of every network behind those of the network that it was made of."""
    known = {row["weights"] for row in rows}

    def family(row: Row) -> list[Row]:
        made = [one for one in rows if one["started_from"] == row["weights"]]
        return [row, *(kin for one in made for kin in family(one))]

    found = [kin for row in rows if row["started_from"] not in known for kin in family(row)]
    # A network that was measured in two roles would bring its descendants twice.
    return list({_key(row): row for row in found}.values())


def _line(row: Row, radii: Sequence[str]) -> list[str]:
    found, units = row["network"], row["network"]["units"]
    near = units["consistency"] or {}
    guard = row["detection"].get("pathguard", {}).get("summary", {})
    return [
        row["name"],
        f"witness of {row['beside']}" if row["role"] == "witness" else row["role"],
        row["made_by"],
        _percent(found["clean"]),
        *(_percent(found["robust"].get(name)) for name in radii),
        *(_number(near.get(name)) for name in ("true", "target", "ratio")),
        *(_number(units[name]) for name in ("selectivity", "last_selectivity")),
        _spread((guard.get("seen") or {}).get("mean")),
        _percent((guard.get("seen") or {}).get("tpr_1")),
        _percent(guard.get("realised_fpr_1")),
    ]


def _by_attack(rows: Sequence[Row]) -> str:
    attacks = list(dict.fromkeys(name for row in rows for name in row["attacks"]))
    body = []
    for row in rows:
        for contestant, found in row["detection"].items():
            cells = [found["seen"].get(name) for name in attacks]
            shown = [_cell(cell) for cell in cells]
            body.append([row["name"], contestant, *shown, _mean(found["summary"]["seen"])])
    return markdown_table(["network", "what tells", *attacks, "mean"], body)


def _cell(cell: Row | None) -> str:
    if not cell or not cell["auroc"]:
        return "-"
    hits = cell["tpr"]["0.01"]
    caught = "-" if hits is None else f"{hits['mean']:.0%}"
    return f"{cell['auroc']['mean']:.3f}, {caught} of {cell['n']}"


def _mean(summary: Row) -> str:
    area, hits = summary["mean"], summary["tpr_1"]
    return "-" if not area or not hits else f"{area['mean']:.3f}, {hits['mean']:.0%}"


def _origin(row: Row) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in row["versions"].items())
    facts = {
        "images": f"{row['network']['n']} attacked, for the guard {row['guard_images']} at most",
        "seed": f"{row['seed']}, of the guard {', '.join(map(str, row['guard_seeds']))}",
        "threads": row["threads"],
        "versions": versions,
        "SHA-256 of the weights": row["weights"],
        "SHA-256 of the witness's": row["witness"],
        "fingerprint of the guarded network": row["fingerprint"],
    }
    lines = "".join(f"- {name}: {value}\n" for name, value in facts.items() if value)
    return f"### {row['name']}\n\n```sh\n{row['command']}\n```\n\n{lines}"


def _attack(name: str) -> str:
    kind, _, radius = name.rpartition("_")
    return f"{SPELT[kind]} {radius}/255"


def _percent(spread: Row | None) -> str:
    if not spread:
        return "-"
    return f"{spread['mean']:.1%} ({spread['low']:.1%} to {spread['high']:.1%})".replace("%", " %")


def _spread(spread: Row | None) -> str:
    if not spread:
        return "-"
    return f"{spread['mean']:.3f} ({spread['low']:.3f} to {spread['high']:.3f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)
