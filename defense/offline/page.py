"""The skeleton of PathGuard's pages: one file, no script, nothing loaded, light and dark; tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Palette:
    """Colours of one appearance. `own` is the accent: the image's own class, and our quantities."""

    paper: str
    ink: str
    faint: str
    soft: str
    own: str
    target: str
    control: str
    opposite: str
    """The end of the diverging map for -1; 1 is `own` and 0 is `paper`."""


LIGHT = Palette(
    paper="#ffffff",
    ink="#1f2328",
    faint="#e3e6ea",
    soft="#57606a",
    own="#0b62c4",
    target="#c9510c",
    control="#7a828c",
    opposite="#8a3b7c",
)
DARK = Palette(
    paper="#15191f",
    ink="#d8dee6",
    faint="#2b323b",
    soft="#9aa5b1",
    own="#5aa7f5",
    target="#f08a4b",
    control="#8b95a1",
    opposite="#cf7fc0",
)


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, the class of its style, and its heat from -1 to 1."""

    text: str
    kind: str = ""
    heat: float | None = None


def document(title: str, body: str, style: str = "") -> str:
    """Return a whole page; `body` and `style` are markup, `title` is text."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def definitions(facts: Mapping[str, str]) -> str:
    """Return short facts as a list of definitions."""
    pairs = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items()
    )
    return f"<dl>{''.join(pairs)}</dl>"


def table(
    caption: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str | Cell]],
    *,
    groups: Sequence[tuple[str, int]] = (),
) -> str:
    """Return a table whose first column names its rows; all text is escaped.

    groups: names over the columns after the first, each with how many of them it spans.
    """
    over = "".join(
        f'<th scope="colgroup" colspan="{span}">{escape(name)}</th>' for name, span in groups
    )
    first = f'<tr class="groups"><th scope="col"></th>{over}</tr>' if groups else ""
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(_row(row) for row in rows)
    return f"""<div class="wide"><table>
<caption><span>{escape(caption)}</span></caption>
<thead>{first}<tr>{names}</tr></thead><tbody>{body}</tbody>
</table></div>"""


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of texts as they are."""
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(row: Sequence[str | Cell]) -> str:
    name, *cells = (cell if isinstance(cell, Cell) else Cell(cell) for cell in row)
    kind = f' class="{name.kind}"' if name.kind else ""
    data = "".join(_data(cell) for cell in cells)
    return f'<tr><th scope="row"{kind}>{escape(name.text)}</th>{data}</tr>'


def _data(cell: Cell) -> str:
    kinds = [cell.kind] if cell.kind else []
    style = ""
    if cell.heat is not None:
        kinds.append("hot" if cell.heat >= 0 else "cold")
        style = f' style="--heat:{abs(cell.heat):.0%}"'
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    return f"<td{kind}{style}>{escape(cell.text)}</td>"


def _colours(palette: Palette) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in vars(palette).items())


_STYLE = f"""
:root {{ {_colours(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_colours(DARK)} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }}
header > p, figcaption, section > p {{ max-width: 44rem; }}
h1 {{ font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }}
h2 {{ font-size: 1.2rem; margin: 3.2rem 0 .8rem; padding-top: 1.2rem;
  border-top: 1px solid var(--faint); }}
dl {{ display: flex; flex-wrap: wrap; gap: .8rem 2rem; margin: 1.5rem 0 0; }}
dt {{ color: var(--soft); font-size: .8rem; }}
dd {{ margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }}
figure {{ margin: 0; }}
figcaption, .note, section > p, footer {{ color: var(--soft); font-size: .92rem; margin-top: .7rem; }}
details {{ border-bottom: 1px solid var(--faint); padding: .5rem 0; }}
summary {{ cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }}
summary:focus-visible {{ outline: 2px solid var(--own); outline-offset: 2px; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; color: var(--soft); padding-bottom: .5rem; }}
th, td {{ padding: .28rem .7rem; text-align: right; border-bottom: 1px solid var(--faint);
  white-space: nowrap; }}
thead th {{ vertical-align: bottom; white-space: normal; font-weight: 500; color: var(--soft); }}
th:first-child {{ text-align: left; padding-left: 0; font-weight: 500; }}
footer {{ margin-top: 3rem; }}
"""
