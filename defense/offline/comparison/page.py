"""The comparison of routers as a page of tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from defense.offline.page import markdown_table as table

INTRODUCTION = """\
# Routing systems, compared

{networks}. {threads} threads, seeds {seeds}, {versions}.

```sh
{command}
```

All routers saw the same images: test images that the network gets right. An attack counts where it
turned the answer; clean and attacked rows come from the same images, and detectors are judged on
images that they were not fitted to. Detectors here are fitted to the very attack that they are
judged on: the tables compare what paths *tell*, not what a guard catches.
"""

COST = """
## What a path is and what it costs

Times are medians of rounds in which the bare pass and the pass with its path take turns; memory is
the extra peak of torch's allocations. Separability: how often the nearest class mean of a site's
path names the image's class, at the first, a middle and the last site.

"""

DETECTION = """
## What a path tells of attacks

AUROC, mean of three seeds (split and forest), of a logistic regression / a forest of 100 trees.
The share below an attack's name is its success on the plain network.

"""

FEW = """
## The CDRP paper's protocol

AUROC on the CDRP attack of classifiers fitted to 1 / 5 / 10 images per class and their attacked
versions. Unlike the published release: a fresh optimiser for every pass (sharing one leaks the
label), only attacks that succeed, and probabilities instead of hard decisions.

"""


PATHWAYS = """
## What only the pathway answers

The plain network with only an image's pathway left open (channels whose path is above 0). Rises:
share of images whose confidence rises (mIC); falls: mean fall of the confidence (mDC, absolute /
relative); overlap: of two images of a class (acIOU). Below it, images run under the pathway of their
class, which was made of other images, and under two controls.

"""

DECOUPLING = """
## What decoupling saves

{open:.1%} of the controlled channels are open. Multiply-adds per image: {dense:.1f} M for all
channels, {effective:.1f} M for the open ones and the controllers ({share:.0%}).

"""


def render(result: dict[str, Any]) -> str:
    """Return the comparison as Markdown."""
    networks = ", ".join(
        f"{name}: {facts['card']}, {facts['test']['accuracy']:.2%} of "
        f"{facts['test']['images']} test images"
        for name, facts in result["networks"].items()
    )
    head = INTRODUCTION.format(
        networks=networks[0].upper() + networks[1:],
        threads=result["threads"],
        seeds=", ".join(map(str, result["seeds"])),
        versions=", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        command=result["command"],
    )
    rows = result["rows"]
    page = head + COST + costs(rows) + DETECTION + detection(rows) + FEW + few(rows)
    page += PATHWAYS + pathways(result["pathways"]) + "\n" + transfers(result["pathways"])
    return page + (decoupling(result["decoupling"]) if result["decoupling"] else "")


def costs(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of costs and shapes."""
    body = []
    for row in rows:
        if not row["costs"]:
            continue
        one, many = row["costs"]
        body.append(
            [
                called(row),
                "one" if row["one_forward"] else "more",
                f"{one['bare_ms']:.2f} → {one['path_ms']:.2f} ({one['ratio']:.2f}x)",
                f"{many['bare_ms']:.2f} → {many['path_ms']:.2f} ({many['ratio']:.2f}x)",
                f"{one['extra_mib']:.1f} / {many['extra_mib']:.1f}",
                str(row["columns"]),
                f"{row['sparsity']:.0%}",
                course(list(row["separability"].values())),
            ]
        )
    head = ["router", "passes", "ms per image, batch 1", "batch 32", "extra MiB, 1 / 32", "columns"]
    return table([*head, "zeros", "separability"], body)


def detection(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of AUROCs; the best one-forward figure of a column is bold."""
    attacks = list(rows[0]["auroc"])
    best = {
        attack: max(
            (
                figure
                for row in rows
                if row["one_forward"] and row["backbone"] == "plain"
                for figure in figures(row, attack)
                if not math.isnan(figure)
            ),
            default=math.inf,
        )
        for attack in attacks
    }
    plain = next(row for row in rows if row["backbone"] == "plain")
    head = [f"{attack} ({plain['auroc'][attack]['success'][0]:.0%})" for attack in attacks]
    body = [
        [
            called(row),
            str(row["images"]),
            *(
                " / ".join(marked(figure, best[attack]) for figure in figures(row, attack))
                for attack in attacks
            ),
        ]
        for row in rows
    ]
    return table(["router", "images", *head], body)


def few(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of the CDRP protocol."""
    named = [row for row in rows if row["few"]]
    body = [
        [
            called(row),
            *(
                " / ".join(marked(mean(values), math.inf) for values in by_count.values())
                for by_count in row["few"].values()
            ),
        ]
        for row in named
    ]
    return table(["router", *(named[0]["few"] if named else [])], body)


def pathways(found: Sequence[dict[str, Any]]) -> str:
    """Return the table of faithfulness."""
    body = [
        [
            one["router"],
            str(one["images"]),
            f"{one['closed']:.0%} ± {one['closed_deviation']:.0%}",
            f"{one['agreement']:.1%}",
            f"{one['increase']:.0%}",
            f"{one['drop']:.3f} / {one['drop_relative']:.3f}",
            f"{one['same_class_overlap']:.2f}",
        ]
        for one in found
    ]
    return table(["router", "images", "closed", "same answer", "rises", "falls", "overlap"], body)


def transfers(found: Sequence[dict[str, Any]]) -> str:
    """Return the table of class pathways on other images."""
    body = [
        [
            one["router"],
            kind,
            f"{moved['accuracy']:.1%}",
            f"{moved['increase']:.0%}",
            f"{moved['drop']:.3f} / {moved['drop_relative']:.3f}",
        ]
        for one in found
        for kind, moved in one["transfer"].items()
    ]
    return table(["router", "pathway of", "accuracy", "rises", "falls"], body)


def decoupling(found: dict[str, Any]) -> str:
    """Return what the controllers close and save."""
    dense, effective = found["dense_multiply_adds"], found["effective_multiply_adds"]
    head = DECOUPLING.format(
        open=found["open_ratio"],
        dense=dense / 1e6,
        effective=effective / 1e6,
        share=effective / dense,
    )
    controllers = [
        [
            name,
            f"{one['open_ratio']:.0%}",
            f"{one['variation']:.2f}",
            f"{one['always_open']:.0%} / {one['always_closed']:.0%} / {one['dependent']:.0%}",
        ]
        for name, one in found["controllers"].items()
    ]
    one, many = found["against_plain"]
    skipping = found["skipping_against_masking"]
    times = [
        ["decoupled against plain, batch 1", f"{one['ratio']:.2f}"],
        ["decoupled against plain, batch 32", f"{many['ratio']:.2f}"],
        ["skipping against masking, batch 1", f"{skipping['ratio']:.2f}"],
    ]
    fates = "always open / always closed / depends on the image"
    return (
        head
        + table(["controller", "open", "variation", fates], controllers)
        + "\n"
        + table(["time", "ratio"], times)
    )


def called(row: dict[str, Any]) -> str:
    """Return a row's name: router, network where it is not the plain one, note."""
    inside = [] if row["backbone"] == "plain" else [f"{row['backbone']} network"]
    inside += [row["note"]] if row["note"] else []
    return f"{row['router']} ({'; '.join(inside)})" if inside else str(row["router"])


def figures(row: dict[str, Any], attack: str) -> list[float]:
    """Return the mean AUROC of every classifier."""
    found = row["auroc"][attack]
    return [mean(values) for name, values in found.items() if name != "success"]


def marked(figure: float, best: float) -> str:
    """Return a figure, bold where it is the best; a dash where there was too little to judge."""
    if math.isnan(figure):
        return "-"
    return f"**{figure:.3f}**" if figure == best else f"{figure:.3f}"


def course(values: Sequence[float]) -> str:
    """Return the first, a middle and the last of some figures."""
    if not values:
        return "-"
    picked = (values[0], values[len(values) // 2], values[-1])
    return " → ".join(f"{value:.2f}" for value in (picked if len(values) > 1 else picked[:1]))


def mean(values: Sequence[float]) -> float:
    """Return the mean over seeds."""
    return sum(values) / len(values)
