"""Gradients in tokens as tables and a figure: for the terminal, the report and the README."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from experiments import runs
from experiments.pages.figures import colour, legend, marker, style
from experiments.pages.nature import nature
from experiments.pages.page import details_block, figure, records, table, verdict
from experiments.publish import RESULTS

COMMITTED = ("smollm2", "tiny")
KINDS = ("direction", "kept", "estimator", "layer")
SHOWN = 5  # tokens of a list where there is no room for all
WTA = ("#332288", "D")  # colour and marker of the one estimator that no law names
SIDES = {"input": "inputs of q, k, v, gate, up", "output": "outputs of o, down"}
EXPLANATION = (
    "Overlap: Jaccard of the top tokens of the leading directions of an estimate and of the gradient, matched one to one; directions: cosine of "
    "their scores of all tokens. The rest is of whole matrices, measured ± one standard error (exact). Energy: Σ‖Ĝℓ‖² over the directions ℓ of "
    "all tokens, over that of the gradient; top tokens: the same over the gradient's own top tokens alone. Cosine: between the scores of Ĝ and of "
    "G, every token and output taken together, E⟨Ĝ, G⟩ over √E‖Ĝ‖². z: the largest of those of the energies and of E⟨Ĝ, G⟩. A fitted law knows "
    "this very gradient, and WTA-CRS its errors."
)


def asked(config: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What was looked at, in a sentence or two."""
    layers = [row for row in rows if row["kind"] == "layer"]
    length = f"{layers[0]['tokens']:.0f}"
    draws = max(row["draws"] for row in rows if row["kind"] == "estimator")
    ranks = sorted({int(row["rank"]) for row in layers})
    defect = max(row["defect"] for row in layers)
    return (
        f"{Path(config['model']).name}, “{config['prompt']}”, {length} tokens; {len(layers)} layers, whose gradients have rank {ranks[0]} to "
        f"{ranks[-1]}, at most {length}; Σ δᵢxᵢᵀ is autograd's gradient to {f'{defect:.0e} of its largest entry' if defect else 'the last bit'}. "
        f"Estimates of r = {config['rank']:g}, {draws:.0f} draws of each a layer; the top {config['top']} tokens count."
    )


def lines(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One an estimator, means over the layers."""
    return [
        {
            "estimator": row["law"],
            "gradient": nature(row["law"]),
            "overlap": _near(row, "overlap"),
            "directions": _near(row, "direction_cosine"),
            "energy": _near(row, "energy", 3 if row["energy"] < 10 else 1),
            "top tokens": _near(row, "kept", 3 if row["kept"] < 10 else 1),
            "cosine": _near(row, "cosine"),
            "z": f"{row['z']:+.1f}",
        }
        for row in rows
        if row["kind"] == "estimator"
    ]


def _near(row: dict[str, Any], name: str, digits: int = 3) -> str:
    exact = f" ({row[f'{name}_exact']:.{digits}f})" if f"{name}_exact" in row else ""
    return f"{row[name]:.{digits}f} ± {row[f'{name}_error']:.{digits}f}{exact}"


def said(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One a layer: its heaviest token of the prompt and its leading direction, and what they say."""
    first = [row for row in rows if row["kind"] == "direction" and row["number"] == 1]
    singular = {row["layer"]: row for row in first if row["what"] == "direction"}
    return [
        {
            "layer": short(row["layer"]),
            "heaviest": f"{row['what']} at {row['word']}",
            "says": few(row["tokens"]),
            "share of ‖G‖²": f"{100 * singular[row['layer']]['share']:.0f} %",
            "leading direction": few(singular[row["layer"]]["tokens"]),
        }
        for row in first
        if row["what"] != "direction"
    ]


def short(layer: str) -> str:
    """The number of the block and the last part of the name."""
    return f"{block(layer)} {layer.rsplit('.', 1)[-1]}"


def block(layer: str) -> int:
    """The number of the block."""
    (number,) = re.findall(r"\.layers\.(\d+)\.", layer)
    return int(number)


def few(words: str) -> str:
    """The first of a list of tokens."""
    return " ".join(words.split(" ")[:SHOWN])


def look(law: str) -> dict[str, Any]:
    """Colour, marker and line of an estimator; on the tokens a law is open and dashed."""
    if law == "wta_crs":
        return {"color": WTA[0], "marker": WTA[1], "linestyle": "--"}
    name = law.removeprefix("tokens:")
    face = {} if name == law else {"markerfacecolor": "white"}
    return {"color": colour(name), "marker": marker(name), "linestyle": "-" if name == law else "--", **face}


def drawn(rows: list[dict[str, Any]]) -> Figure:
    """Overlap of top tokens, and cosine of scores, by block; left layers that read the residual stream, right those that write into it."""
    style()
    kept = pd.DataFrame([row for row in rows if row["kind"] == "kept"])
    kept["block"] = kept.layer.map(block)
    blocks, laws = sorted(kept.block.unique()), list(dict.fromkeys(kept.law))
    sides = [side for side in SIDES if side in set(kept.side)]
    figure, axes = plt.subplots(2, len(sides), figsize=(4.6 * len(sides), 5.6), sharex=True, sharey="row", squeeze=False)
    for column, side in enumerate(sides):
        for place, law in enumerate(laws):
            mine = kept[(kept.side == side) & (kept.law == law)].groupby("block")
            x = np.array([blocks.index(b) for b in mine.groups]) + 0.09 * (place - (len(laws) - 1) / 2)
            style_of = {**look(law), "markersize": 4.5, "linewidth": 0.9, "capsize": 1.5}
            error = lambda name, mine=mine: 2 * np.sqrt(mine[name].apply(lambda e: (e**2).sum())) / mine.size()  # noqa: E731
            axes[0][column].errorbar(x, mine.overlap.mean(), error("overlap_error"), label=law, **style_of)
            axes[1][column].plot(x, mine.cosine_exact.mean(), color=style_of["color"], linestyle=style_of["linestyle"], linewidth=0.9)
            axes[1][column].errorbar(x, mine.cosine.mean(), error("cosine_error"), label=law, **{**style_of, "linestyle": "none"})
        axes[0][column].set_title(SIDES[side])
        axes[1][column].set_xlabel("block")
        axes[1][column].set_xticks(range(len(blocks)), [str(b) for b in blocks])
    axes[0][0].set_ylabel("overlap of top tokens (Jaccard)")
    axes[1][0].set_ylabel("cosine of the token scores")
    for ax in axes.flat:
        ax.set_ylim(-0.03, 1.05)
    figure.tight_layout()
    legend(figure, axes[0][0])
    return figure


CAPTION = (
    "Bars: ±2 standard errors over draws of the mean over the layers of a block. Above, measured points are joined; below, lines are exact values "
    "and points are measured. Dashed: on the tokens."
)


def section(run: runs.Run, rows: list[dict[str, Any]]) -> str:
    """For the report."""
    means = [row for row in rows if row["kind"] == "estimator"]
    directions = [
        {
            "layer": short(row["layer"]),
            "of": f"direction {row['number']}" if row["what"] == "direction" else f"{row['what']} at {row['word']}",
            "share": f"{100 * row['share']:.0f} %",
            "top tokens": row["tokens"],
        }
        for row in rows
        if row["kind"] == "direction"
    ]
    first = {row["layer"]: row for row in rows if row["kind"] == "direction" and row["what"] == "direction" and row["number"] == 1}
    estimates = [
        {"layer": short(row["layer"]), "estimator": row["law"], "overlap": row["overlap"], "one draw": row["tokens"]}
        | {"the gradient": first[row["layer"]]["tokens"]}
        for row in rows
        if row["kind"] == "kept"
    ]
    facts = [
        {"layer": short(row["layer"]), **{k: v for k, v in row.items() if k not in ("kind", "layer")}}
        for row in rows
        if row["kind"] == "layer"
    ]
    return (
        verdict(sum(bool(row["holds"]) for row in means), len(means), "estimators, energies and means against their exact values")
        + f"<p>{html.escape(asked(run.config, rows))} {html.escape(EXPLANATION)}</p>"
        + table(lines(rows))
        + figure(lambda: drawn(rows), CAPTION)
        + "<h3>Layer by layer</h3><p>x: an input, of layers that read the residual stream; −δ: what a step of descent moves an output to, of those "
        "that write into it; shares are of Σ‖xᵢ‖‖δᵢ‖ and of ‖G‖². ␣ is a space, ⏎ the end of a line.</p>"
        + table(said(rows))
        + details_block("All heavy tokens and leading directions", table(directions))
        + details_block("The leading direction, as one draw of each estimator has it", table(estimates))
        + details_block("Every layer", table(facts))
    )  # fmt: skip


def committed(name: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    """The rows of a committed run; none if it was not run."""
    files = {kind: results / "lens" / f"{name}-{kind}.csv" for kind in KINDS}
    return [
        {"kind": kind} | row
        for kind, file in files.items()
        if file.exists()
        for row in records(pd.read_csv(file, keep_default_na=False, na_values={}))
    ]


def figure_of(name: str, results: Path = RESULTS) -> Figure | None:
    """The figure of a committed run; None if it is not there."""
    rows = committed(name, results)
    return drawn(rows) if rows else None


def markdown(name: str, results: Path = RESULTS) -> str:
    """For the README: what the estimators keep, and the layers of the first, a middle and the last block in tokens."""
    rows = committed(name, results)
    if not rows:
        return "not yet run"
    config = json.loads((results / "lens" / f"{name}.json").read_text(encoding="utf-8"))["config"]
    blocks = sorted({block(row["layer"]) for row in rows if row["kind"] == "layer"})
    some = {blocks[0], blocks[len(blocks) // 2], blocks[-1]}
    layers = [row for row in said(rows) if int(row["layer"].split(" ")[0]) in some]
    words = [{key: code(cell) if key in ("says", "leading direction") else cell for key, cell in row.items()} for row in layers]
    for row in words:
        what, _, word = row["heaviest"].partition(" at ")
        row["heaviest"] = f"{what} at {code(word)}"
    kept = [{"estimator": f"`{row['estimator']}`"} | {k: v for k, v in row.items() if k != "estimator"} for row in lines(rows)]
    told = asked(config, rows) + (f" {EXPLANATION}" if name == COMMITTED[0] else "")
    return "\n\n".join([told, _markdown(kept), _markdown(words)])


def code(words: str) -> str:
    """Tokens as they are inside a cell of a Markdown table."""
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", words)), default=0))
    pad = " " if len(ticks) > 1 else ""
    return f"{ticks}{pad}{words}{pad}{ticks}".replace("|", "\\|")


def _markdown(told: list[dict[str, str]]) -> str:
    head = ["| " + " | ".join(told[0]) + " |", "|" + "---|" * len(told[0])]
    return "\n".join([*head, *("| " + " | ".join(line.values()) + " |" for line in told)])
