"""A benchmark's results as one page for people: verdicts first, then curves and tables.

The page loads nothing and needs no script. What the results lack is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from defense.offline.benchmark.attack_tables import (
    alarm_grids,
    attack_grid,
    auroc_grids,
    caught_grids,
    detail_grids,
)
from defense.offline.benchmark.charts import CHART_STYLE, STYLES, Axis, Curve, chart, legend
from defense.offline.benchmark.marks import (
    CLEAN_ONLY,
    SHARE,
    WITH_ATTACKS,
    Row,
    Verdict,
    auroc,
    get,
    losses,
    marks,
    sides_of,
    value_of,
)
from defense.offline.benchmark.tables import (
    KINDS,
    TARGET,
    Grid,
    adaptive_grid,
    contestant_grid,
    mark_grid,
    query_grid,
    sanity_grid,
    sealed_grid,
    shown,
)
from defense.offline.page import definitions, document, table

TITLE = "How well attacks are detected"
LEAST = 1e-3
"""The smallest false-alarm rate that is drawn; smaller ones lie on the edge."""
_RATES = ((1e-3, "0.1 %"), (1e-2, "1 %"), (1e-1, "10 %"), (1.0, "100 %"))
FALSE_ALARMS = Axis("false alarms on clean images", LEAST, 1.0, _RATES, log=True)
CAUGHT = Axis("attacks caught", 0.0, 1.0, tuple((v / 4, f"{25 * v} %") for v in range(5)))
LEVELS = Axis("level of the shift", 0.8, 5.2, tuple((float(v), f"{v}") for v in range(1, 6)))
ALARMS = Axis("false alarms", LEAST, 1.0, _RATES, log=True)

_WORDS = {
    "AUROC": "The chance that an attacked image is given a higher score than a clean one: 1 is "
    "perfect, 0.5 is a coin.",
    "false alarms": "The share of clean images that is rejected. The threshold is fixed on other "
    "images, so what it gives here is measured, not promised.",
    "caught at 1 %": "The share of successful attacks that is rejected where the threshold lets 1 % "
    "of clean images be rejected.",
    "family left out": "The detector was fitted with attacks, but with none of the family that it "
    "is judged on: what a new kind of attack meets.",
    "peer, baseline, control": "Published detectors; scores that every classifier gives for free; "
    "and detectors that must not win, or the benchmark is broken. All on the same images.",
    "sealed images": "Test images that were set aside before any fit and any choice.",
}


def page(results: Row) -> str:
    """Return the page, a whole HTML document."""
    sections = (
        _section("marks", "Held against its marks", *_marks(results)),
        _section("detectors", "All detectors", _NOTES["detectors"], _grids([contestant_grid(results)])),
        _section("roc", "Caught against false alarms", _NOTES["roc"], _roc(results)),
        _section("auroc", "Attack by attack: AUROC", _NOTES["auroc"], _grids(auroc_grids(results))),
        _section("caught", "Attack by attack: caught at 1 %", "", _grids(caught_grids(results))),
        _section("alarms", "False alarms", _NOTES["alarms"],
                 _shifts(results) + _grids(alarm_grids(results))),
        _section("adaptive", "Attackers who know everything", _NOTES["adaptive"],
                 _grids([adaptive_grid(results)])),
        _section("queries", "Attackers who only ask", _NOTES["queries"],
                 _grids([query_grid(results)])),
        _section("sealed", "On sealed images", _NOTES["sealed"], _grids([sealed_grid(results)])),
        _section("sanity", "Does the benchmark itself hold?", "", _grids([sanity_grid(results)])),
        _section("every", "Every figure", "", _folded([attack_grid(results), *detail_grids(results)])),
    )  # fmt: skip
    body = f"{_header(results)}\n<main>\n{''.join(sections)}</main>\n{_footer(results)}"
    return document(f"PathGuard: {TITLE.lower()}", body, CHART_STYLE + _STYLE)


_NOTES = {
    "detectors": "All saw the same images and the same attacks. “Attacks” or “clean” says what a "
    "detector was fitted to; detectors fitted to clean images have no family to leave out.",
    "roc": "The false-alarm axis is logarithmic, because a service can afford only its left end; the "
    "dotted line marks 1 %. Ours are drawn with the best peers.",
    "auroc": "The deeper the blue, the better; orange is worse than a coin. Ours come first, the best "
    "figure of a row is bold.",
    "alarms": "Pictures that are no attacks must pass. Every shift has five levels; the dotted line is "
    "the target of 1 %. Rates are on a logarithmic axis; in the tables orange is above the target.",
    "adaptive": "They differentiate through network and detector. Few published detectors have "
    "withstood this; the table says what evading costs.",
    "queries": "They send images to the running server and go on from its answers and verdicts. The "
    "guard remembers recent requests and refuses nearly equal ones (switched off where the row says "
    "so); the scattered attack knows that, and asks about stripes as unlike each other as it can.",
    "sealed": "If the benchmark had been tuned to its own images, these figures would be lower.",
}


_BOXES: tuple[tuple[Verdict, str], ...] = (
    ("goal", "goals reached"),
    ("floor", "floors held, goals not reached"),
    ("missed", "floors missed"),
    ("open", "goals without a floor, not reached"),
)


def _header(results: Row) -> str:
    data = get(results, "data")
    facts = {
        "test images": _count(data.get("images")),
        "attacked": _count(data.get("attacked")),
        "sealed": _count(data.get("sealed")),
        "network right": SHARE(value_of(data.get("accuracy"))),
        "attacks": _count(len(get(results, "attacks")) or None),
        "detectors": _count(len(get(results, "contestants")) or None),
        "seeds": ", ".join(map(str, get(results, "seeds"))) or "\N{EN DASH}",
    }
    words = definitions(_WORDS)
    return f"""<header>
<h1>{TITLE}</h1>
<p>An attacked image looks like any other and makes a network answer wrongly. PathGuard reads what the
network's channels do on the way to the answer and gives every image a score of suspicion. This page
holds that score against marks that were set before it was built, against other detectors, and against
attackers who know it.</p>
{definitions(facts)}
<details class="words"><summary>What the words mean</summary>{words}</details>
</header>"""


def _section(name: str, title: str, text: str, body: str) -> str:
    if not body:
        return ""
    note = f"<p>{escape(text)}</p>" if text else ""
    return f'<section id="{name}">\n<h2>{escape(title)}</h2>\n{note}{body}\n</section>\n'


def _grids(grids: Iterable[Grid | None]) -> str:
    return "\n".join(
        table(grid.caption, grid.head, grid.rows, groups=grid.groups) for grid in grids if grid
    )


def _folded(grids: Iterable[Grid | None]) -> str:
    return "\n".join(
        f"<details><summary>{escape(grid.caption)}</summary>{_grids([grid])}</details>"
        for grid in grids
        if grid
    )


def _marks(results: Row) -> tuple[str, str]:
    """Return what was reached and what was not, side by side, and the table of all marks."""
    found = [mark for mark in marks(results) if mark.measured is not None]
    if not found:
        return "", ""
    kinds = _BOXES
    boxes = []
    for verdict, title in kinds:
        these = [mark for mark in found if mark.verdict == verdict]
        items = "".join(
            f"<li>{escape(mark.standard.words)} "
            f"<b>{escape(mark.standard.unit(mark.measured.value))}</b></li>"
            for mark in these
            if mark.measured
        )
        if these or verdict != "open":
            boxes.append(
                f'<div class="box {KINDS[verdict]}"><h3><span>{len(these)}</span> {title}</h3>'
                f"<ul>{items}</ul></div>"
            )
    return (
        "Floors and goals were set before the detector was built. The figure itself is judged, not "
        "the better end of its interval.",
        f'<div class="boxes">{"".join(boxes)}</div>{_rivals(results)}{_grids([mark_grid(results)])}',
    )


def _rivals(results: Row) -> str:
    """Say on how many attacks ours is best, and name every attack that another detects better."""
    side, _ = sides_of(results)
    parts = []
    for fit, words in (
        (WITH_ATTACKS, "fitted with attacks"),
        (CLEAN_ONLY, "fitted on clean images"),
    ):
        name = side.ours(fit)
        if name is None:
            continue
        measured = [
            a for a in get(side.rows, name, "seen") if auroc(side.rows[name], a) is not None
        ]
        lost, total = losses(results, fit), len(measured)
        text = (
            f"No other detector is better than {name}, {words}, on "
            f"{total - len(lost)} of {total} attacks."
        )
        items = "".join(
            f"<li>{escape(loss.attack)}: <b>{loss.ours:.3f}</b> against <b>{loss.theirs:.3f}</b> "
            f"of {escape(loss.rival)}</li>"
            for loss in lost
        )
        behind = f"<p>Behind on:</p><ul>{items}</ul>" if items else ""
        parts.append(f'<div class="box"><p>{escape(text)}</p>{behind}</div>')
    return f'<div class="boxes">{"".join(parts)}</div>' if parts else ""


def _roc(results: Row) -> str:
    """Return the curves over all attacks, and small ones attack by attack."""
    found = get(results, "roc")
    names = [name for name in shown(results) if found.get(name)][:STYLES]
    if not names:
        return ""
    kinds = list(dict.fromkeys(kind for name in names for kind in found[name]))
    attacks = [kind for kind in kinds if kind != "all"]
    pooled = ""
    if "all" in kinds:
        pooled = f"<figure>{_curves(found, names, 'all', 'large')}</figure>"
    small = "".join(
        f"<div><h3>{escape(attack)}</h3>{_curves(found, names, attack, 'small')}</div>"
        for attack in attacks
    )
    return f'{legend(names)}{pooled}<div class="many">{small}</div>'


def _curves(found: Row, names: list[str], attack: str, size: str) -> str:
    curves = [
        Curve(name, [(x, y) for x, y in get(found[name], attack) or []], style)
        for style, name in enumerate(names)
    ]
    says = f"Attacks caught against false alarms, {attack}, of {', '.join(names)}."
    return chart(curves, FALSE_ALARMS, CAUGHT, says=says, size=size, rule=("x", TARGET))


def _shifts(results: Row) -> str:
    """Return false alarms against the level of every benign shift."""
    rows = get(results, "contestants")
    names = [name for name in shown(results) if get(rows[name], "shifts")][:STYLES]
    kinds = list(dict.fromkeys(kind for name in names for kind in rows[name]["shifts"]))
    charts = []
    for kind in kinds:
        curves = [
            Curve(name, _levels(get(rows[name], "shifts", kind)), style)
            for style, name in enumerate(names)
        ]
        says = f"False alarms against the level of {kind}, of {', '.join(names)}."
        drawn = chart(
            curves, LEVELS, ALARMS, says=says, size="small", rule=("y", TARGET), dots=True
        )
        charts.append(f"<div><h3>{escape(kind)}</h3>{drawn}</div>")
    return f'{legend(names)}<div class="many">{"".join(charts)}</div>' if charts else ""


def _levels(row: Row) -> list[tuple[float, float]]:
    """Return level and rate; rates below the axis lie on its edge."""
    rates = ((level, value_of(rate)) for level, rate in row.items())
    return [(float(level), max(rate, LEAST)) for level, rate in rates if rate is not None]


def _footer(results: Row) -> str:
    facts = {
        "command": results.get("command"),
        "seeds": ", ".join(map(str, get(results, "seeds"))),
        "versions": ", ".join(
            f"{name} {value}" for name, value in get(results, "versions").items()
        ),
        "network": results.get("fingerprint"),
        **{f"SHA-256, {name}": digest for name, digest in get(results, "artefacts").items()},
    }
    known = {name: f"{text}" for name, text in facts.items() if text}
    return f"""<footer>
<p>Written by PathGuard from the results of one command; the same command, data and network give the
same page. Detection raises the cost of an attack and makes attacks seen; it certifies nothing.</p>
{definitions(known)}
</footer>"""


def _count(value: int | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:,}"


_STYLE = """
.wide { max-height: 88vh; overflow: auto; margin: 1rem 0 1.8rem; }
table { border-collapse: separate; border-spacing: 0; }
caption { font-size: .92rem; }
caption span { display: inline-block; position: sticky; left: 0;
  max-width: min(44rem, calc(100vw - 2.5rem)); }
thead th { position: sticky; top: 0; background: var(--paper); z-index: 1; }
thead tr.groups th { position: static; text-align: center; }
th:first-child { position: sticky; left: 0; background: var(--paper); padding-right: .9rem; }
thead th:first-child { z-index: 2; }
tbody th:first-child { white-space: normal; max-width: 19rem; overflow-wrap: break-word; }
.strong, th.ours { font-weight: 700; }
th.ours { color: var(--own); }
td.soft { color: var(--soft); }
td.text { text-align: left; white-space: normal; min-width: 18rem; }
#sanity thead th { text-align: left; }
td.good { color: var(--own); font-weight: 600; }
td.bad { color: var(--target); font-weight: 600; }
.hot { background: color-mix(in srgb, var(--own) calc(var(--heat) * .5), transparent); }
.cold { background: color-mix(in srgb, var(--target) calc(var(--heat) * .6), transparent); }
.boxes { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr));
  gap: 1rem; margin: 1rem 0; }
.box { border: 1px solid var(--faint); border-top: 4px solid var(--control); border-radius: 4px;
  padding: .7rem 1rem; font-size: .88rem; overflow-wrap: anywhere; }
.box.good { border-top-color: var(--own); }
.box.bad { border-top-color: var(--target); }
.box h3 { margin: 0 0 .4rem; font-size: .92rem; }
.box h3 span { font-size: 1.5rem; margin-right: .3rem; font-variant-numeric: tabular-nums; }
.box p { margin: 0 0 .3rem; }
.box ul { margin: 0; padding-left: 1.1rem; }
.box li { margin-bottom: .3rem; }
.box b { font-variant-numeric: tabular-nums; }
body { max-width: 70rem; }
#marks tbody th { min-width: 9rem; }
#marks td:is(:nth-child(4), :nth-child(6)) { white-space: normal; min-width: 5.5rem; }
.words { margin-top: 1.2rem; border: 0; }
.words dl { display: grid; gap: .7rem; margin: .7rem 0; }
.words dd { font-size: .92rem; max-width: 44rem; }
footer dl { display: grid; gap: .6rem; }
footer dd { font: .82rem/1.45 ui-monospace, monospace; }
"""
