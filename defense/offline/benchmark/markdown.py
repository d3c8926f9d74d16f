"""A benchmark's results as Markdown: the headline with its losses, then attack by attack."""

from __future__ import annotations

from defense.offline.benchmark.attack_tables import attack_grid, auroc_grids, caught_grids
from defense.offline.benchmark.marks import (
    CLEAN_ONLY,
    WITH_ATTACKS,
    Row,
    get,
    losses,
    marks,
    sides_of,
)
from defense.offline.benchmark.tables import (
    Grid,
    adaptive_grid,
    contestant_grid,
    mark_grid,
    query_grid,
    sanity_grid,
    sealed_grid,
)
from defense.offline.page import Cell, markdown_table


def markdown(results: Row) -> str:
    """Return the page of results; what they lack is left out."""
    sections = (
        ("Floors, goals, figures", [mark_grid(results)]),
        ("All detectors", [contestant_grid(results)]),
        ("Attack by attack", [*auroc_grids(results), *caught_grids(results)]),
        ("Attackers who know everything", [adaptive_grid(results)]),
        ("Attackers who only ask", [query_grid(results)]),
        ("On sealed images", [sealed_grid(results)]),
        ("Does the benchmark itself hold?", [sanity_grid(results)]),
        ("The attacks", [attack_grid(results)]),
    )
    parts = [_head(results)]
    for title, found in sections:
        grids = [_grid(grid) for grid in found if grid]
        if grids:
            parts.append(f"## {title}\n\n" + "\n".join(grids))
        if title == "Floors, goals, figures":
            parts.append("## What it loses\n\n" + _losses(results))
    return "\n".join(parts)


def lost(results: Row) -> list[str]:
    """Return every loss as a sentence: marks, attacks that others see better, failed checks."""
    found = [
        f"{mark.standard.words}: {mark.standard.unit(measure.value)}{where}, "
        f"{'floor' if verdict == 'missed' else 'goal'} {mark.limits[verdict != 'missed']}"
        for mark in marks(results)
        for measure, where in ((mark.measured, ""), (mark.sealed, " on sealed images"))
        if measure and (verdict := mark.judge(measure)) != "goal"
    ]
    side, _ = sides_of(results)
    for fit in (WITH_ATTACKS, CLEAN_ONLY):
        found += [
            f"{loss.attack}: AUROC {loss.ours:.3f} of {side.ours(fit)}, {loss.theirs:.3f} of "
            f"{loss.rival}"
            for loss in losses(results, fit)
        ]
    failed = [name for name, check in get(results, "sanity").items() if not check.get("passed")]
    return found + [f"check failed: {name}" for name in failed]


def _head(results: Row) -> str:
    data = get(results, "data")
    counts = ", ".join(f"{key}: {value:g}" for key, value in data.items() if value is not None)
    made = {
        "seeds": ", ".join(map(str, get(results, "seeds"))),
        "versions": ", ".join(
            f"{name} {value}" for name, value in get(results, "versions").items()
        ),
        "network": results.get("fingerprint"),
        **{f"SHA-256 of {name}": digest for name, digest in get(results, "artefacts").items()},
        "images": counts,
    }
    lines = "".join(f"- {name}: {_safe(f'{text}')}\n" for name, text in made.items() if text)
    command = results.get("command")
    ran = f"```sh\n{f'{command}'.replace('```', '')}\n```\n\n" if command else ""
    return f"# How well attacks are detected\n\n{ran}{lines}"


def _losses(results: Row) -> str:
    found = lost(results)
    return "".join(f"- {_safe(text)}\n" for text in found) or "Nothing that was measured.\n"


def _grid(grid: Grid) -> str:
    head = grid.head
    if grid.groups:
        over = [name for name, span in grid.groups for _ in range(span)]
        head = [
            grid.head[0],
            *(f"{a}: {b}" if a else b for a, b in zip(over, head[1:], strict=True)),
        ]
    rows = [[_cell(cell) for cell in row] for row in grid.rows]
    return f"{_safe(grid.caption)}\n\n{markdown_table([_safe(name) for name in head], rows)}"


def _cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return _safe(cell)
    return f"**{_safe(cell.text)}**" if cell.kind in ("strong", "bad") else _safe(cell.text)


def _safe(text: str) -> str:
    """Return text that starts no tag, no column and no line of its own."""
    plain = " ".join(text.split())
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*")
