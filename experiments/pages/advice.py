"""What ``lowrank advise`` found, for terminal, report and notebook: candidates, a figure of the Pareto set, the reasons in words."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from experiments.advising.costs import FULL
from experiments.pages import figures, page

HEADING = "error over that of the mini-batch gradient, peak of a step, time of a step over full AdamW"
GB = 10**9


def _of(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == kind]


def lines(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One a candidate, best error first; a star is on the Pareto set of the three columns."""
    candidates = sorted(_of(rows, "candidate"), key=lambda row: row["error"])
    full = next(row["seconds"] for row in candidates if row["law"] == FULL)
    return [
        {
            "law": row["law"],
            "r/n": "" if row["law"] == FULL else f"{row['ratio']:.3g}",
            "unbiased": "yes" if row["unbiased"] else "no",
            "error": f"{row['error']:.3g}" + (f" ± {row['error_se']:.2g}" if row["error_se"] else ""),
            "peak GB": f"{row['peak_bytes'] / GB:.3g}",
            "time": f"{row['seconds'] / full:.3f}×",
            "K": "" if row["refresh_every"] is None else str(row["refresh_every"]),
            "Pareto": "*" if row["pareto"] else "",
            "fits": "yes" if row["fits"] else "no",
        }
        for row in candidates
    ]


def reasons(rows: list[dict[str, Any]], config: dict[str, Any]) -> list[str]:
    """The recommendation and why, a sentence each."""
    candidates, advice = _of(rows, "candidate"), _of(rows, "advice")[0]
    full = next(row for row in candidates if row["law"] == FULL)
    budget = float(config["budget_gb"])
    within = "without a budget" if math.isinf(budget) else f"within {budget:g} GB"
    if advice["low_rank"] is None:
        smallest = f"the smallest is {advice['smallest_law']} with {advice['smallest_bytes'] / GB:.3g} GB"
        if full["fits"]:
            return [f"recommended {within}: full AdamW; no low-rank candidate was asked for that fits and is unbiased"]
        return [f"nothing unbiased fits {within}; {smallest}: a smaller batch, a shorter length or a smaller ratio takes less"]
    mine = next(row for row in candidates if row["law"] == advice["low_rank"] and row["ratio"] == advice["ratio"])
    times = f"{mine['seconds'] / full['seconds']:.2f}× its time a step and {mine['peak_bytes'] / full['peak_bytes']:.2f}× its memory"
    told = [f"recommended {within}: {'full AdamW' if advice['recommended'] == FULL else advice['recommended']}"]
    if full["fits"]:
        told.append(
            f"full AdamW fits ({full['peak_bytes'] / GB:.3g} GB): no estimate has less error; the products below buy memory with error"
        )
    else:
        told.append(f"full AdamW takes {full['peak_bytes'] / GB:.3g} GB and does not fit")
    told.append(
        f"low-rank choice: {mine['law']} at r/n = {mine['ratio']:g}: {mine['error']:.3g} ± {mine['error_se']:.2g} times the error of full training, "
        f"{times}; the least error × time of all unbiased candidates that fit"
    )
    others = sorted(
        (row for row in candidates if row["ratio"] == mine["ratio"] and row["law"] not in (FULL, mine["law"])), key=lambda row: row["error"]
    )
    compared = [
        f"{row['law']} {row['error']:.3g}" + ("" if row["unbiased"] else " (biased: its error does not average out)") for row in others
    ]
    if compared:
        told.append(f"at the same rank: {', '.join(compared)}")
    told.append(
        f"K = {advice['refresh_every']}: the smallest whose redraws take at most {100 * config['overhead']:g} % of a step; a V that is held repeats "
        "its error, a new one averages it out"
    )
    shrunk = (
        f"c = {advice['best_c']:.3g} has the least error of a single estimate"
        if advice["best_c"] > 0
        else "these mini-batches show no mean gradient"
    )
    told.append(f"c = 1 keeps the mean; {shrunk}")
    told.append(
        f"a rank for every layer (ranks.json), in the same memory: error {advice['error_by_layer']:.3g} in the place of {advice['error_uniform']:.3g}"
    )
    told.append(
        f"time of a step over full AdamW: predicted {advice['predicted_over_full']:.3f}×, measured {advice['measured_over_full']:.3f}× "
        f"({advice['measured_q1']:.3f}–{advice['measured_q3']:.3f})"
    )
    told.append(
        f"convert(model, law={mine['law']!r}, rank={mine['ratio']:g}, refresh_every={advice['refresh_every']})  # or rank=json of ranks.json"
    )
    return told


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Error against peak memory and against time of every candidate; a ring is on the Pareto set. Bars: ±2 standard errors."""
    figures.style()
    frame = pd.DataFrame(_of(rows, "candidate"))
    full = frame[frame.law == FULL].iloc[0]
    panels = (("peak of a step, GB", frame.peak_bytes / GB), ("time of a step over full AdamW", frame.seconds / full.seconds))
    drawn, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for ax, (label, x) in zip(axes, panels, strict=True):
        for law, group in frame.groupby("law", sort=False):
            at = x[group.index]
            bars = {"yerr": 2 * group.error_se, "color": figures.colour(str(law)), "marker": figures.marker(str(law)), "label": str(law)}
            ax.errorbar(at, group.error, linestyle="--" if not group.unbiased.all() else "-", linewidth=1, **bars)
        front = frame[frame.pareto.astype(bool)]
        ax.scatter(x[front.index], front.error, s=110, facecolors="none", edgecolors="#000000", linewidths=0.8)
        ax.set(xlabel=label, yscale="log")
    axes[0].set_ylabel("error / mini-batch error")
    figures.legend(drawn, axes[0])
    return drawn


def section(rows: list[dict[str, Any]], config: dict[str, Any]) -> str:
    """Of the report."""
    said = "".join(f"<li>{page.html.escape(line)}</li>" for line in reasons(rows, config))
    return (
        f"<ul>{said}</ul>"
        + page.figure(lambda: figure(rows), "Rings: the Pareto set of error, memory and time; dashed: biased; bars ±2 standard errors.")
        + page.table(lines(rows))
        + page.details_block("Every layer", page.table([{k: v for k, v in row.items() if k != "kind"} for row in _of(rows, "layer")]))
    )
