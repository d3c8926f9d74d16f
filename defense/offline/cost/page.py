"""The page of `pathguard bench`, written anew from all cells that were ever measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from defense.offline.cost.subjects import SUBJECTS

INTRODUCTION = """\
# What being guarded costs

Default guards that refuse nothing, with an audit trail. Stock, control (stock once more) and the \
guarded kinds take turns within every round of one run; ratios to stock are medians over rounds of the \
ratio within a round, with 95 % bootstrap intervals. The control's interval is the noise of the machine.

* **guarded** answers to the bit as the stock archive does; with a witness it asks it about everything.
* **optimized** is guarded with `optimize: true`: the same class, logits within a tolerance.
* **second_look**, **off**: when the witness is asked. Its cost has no budget where the network \
itself is as small as the shipped one.

HTTP is a client's view of a real TorchServe; *library* calls the model in one process. A cell is \
measured by itself, `pathguard bench --network NAME --batch N`, and replaced when it is measured again.

What is behind the figures:

* The guard's work is some 100 small operations per batch, however many requests are in it: a mean per \
site, one reading of the path for both views of the detector, one comparison with the requests before. \
After a forward pass their data is in no cache, so for a single image of a small network they weigh \
more than for eight.
* Tried, and kept: all sites in a few stacked products; one standardised path for both views (they were \
fitted to the same one); ranks by bisection in lists; distances to earlier requests by a matrix \
product, exact ones only to those that may be near (1.0 to 0.4 ms for a batch of repeated images). \
Tried, and dropped: means on one thread, which busy machines like and idle ones pay for.
* Every operation that two threads share waits until both have a core. Where other programs take the \
cores, each waits up to a scheduler's turn (8 ms here), in the network as in the guard. Scoring stays \
on one thread for that reason.
* What `optimize: true` gains depends on the processor and on the guard. A form is taken only where \
class, logits, path and p-values stay within their tolerances. On a processor with avx512_bf16 the \
ResNet-18 in bfloat16 passes a batch of four 3.2 times as fast as the model was, folded float32 1.4 to \
1.8 times. It is refused because the p-value of a probe would move by 0.047, where 0.02 is allowed: the \
guard was calibrated in float32, and the rounding makes paths look more unusual. To calibrate a guard \
in the form that serves is the way past this; it is not built.
* An answer's last bits depend on how many requests share its batch, guarded or not. Where guarded \
ones are not all among the stock archive's to the same image, a batch had a size that the stock's had \
not.
"""
SHARES = {
    "forward": "forward pass",
    "path": "path",
    "check": "limits checked",
    "witness": "witness",
    "score": "scored",
    "decide": "compared with earlier ones, decided",
    "handler": "archive's handler",
}


def render(cells: dict[str, Any]) -> str:
    """Return results, by "network/batch", as a Markdown page."""
    parts = [INTRODUCTION]
    for name, subject in SUBJECTS.items():
        found = [cell for cell in cells.values() if cell["network"] == name]
        found.sort(key=lambda cell: cell["batch"])
        if found:
            parts += [f"## {subject.title}\n", _ratios(found), _shares(found), _memory(found)]
            parts += [_provenance(cell) for cell in found]
    return "\n".join(parts)


def _ratios(cells: list[dict[str, Any]]) -> str:
    head = ["figure", "kind", "batch", "stock", "kind's own", "ratio to stock", "control to stock"]
    rows = [_ratio(cell["batch"], row) for cell in cells for row in cell["rows"]]
    return table([*head, "budget", "met"], rows)


def _ratio(batch: int, row: dict[str, Any]) -> list[str]:
    def spread(name: str) -> str:
        low, high = row[f"{name}interval"]
        return f"[{low:.3f}, {high:.3f}]"

    return [
        row["what"],
        row["kind"],
        str(batch),
        *(f"{row[side]:.1f} {row['unit']}" for side in ("stock", "guarded")),
        f"**{row['ratio']:.3f}** {spread('')}",
        f"{row['control']:.3f} {spread('control_')}",
        "" if row["budget"] is None else f"{row['budget']:.2f}",
        {None: "", True: "yes", False: "no"}[row["met"]],
    ]


def _shares(cells: list[dict[str, Any]]) -> str:
    rows = []
    for cell in cells:
        parts = cell["shares"]
        whole = sum(parts.values())
        shown = [f"{parts[name]:.2f} ms ({parts[name] / whole:.1%})" for name in SHARES]
        rows.append([str(cell["batch"]), *shown])
    return "Where the time of a guarded batch goes, in one process:\n\n" + table(
        ["batch", *SHARES.values()], rows
    )


def _memory(cells: list[dict[str, Any]]) -> str:
    rows = []
    for cell in cells:
        peaks, resident = cell["peak_mib"], cell["resident_mib"]
        rows.append(
            [
                str(cell["batch"]),
                ", ".join(f"{name} {mib:.0f}" for name, mib in resident.items()),
                ", ".join(f"{name} {mib:.1f}" for name, mib in peaks.items()),
            ]
        )
    return "Memory in MiB:\n\n" + table(
        ["batch", "resident, of a worker after the run", "most that a forward pass holds"], rows
    )


def _provenance(cell: dict[str, Any]) -> str:
    machine, same = cell["machine"], cell["answers"]
    versions = ", ".join(f"{name} {version}" for name, version in cell["versions"].items())
    return (
        f"Batch {cell['batch']}: `{cell['command']}`, {cell['rounds']} rounds, seed {cell['seed']}, "
        f"{cell['date']}, {machine['cores']} cores ({machine['processor']}), {machine['threads']} "
        f"torch threads, {'a' if machine['gpu'] else 'no'} GPU, {versions}. Guarded answers that the "
        f"stock archive gave for the same image, to the byte: {same['identical']} of "
        f"{same['compared']}; optimized ones of the same class: {same['same_class']} of "
        f"{same['optimized']}. `optimize` chose: {cell['form']}.\n"
    )


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
