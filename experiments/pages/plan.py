"""Where low-rank messages pay, for terminal, report and results: a table, a map over bandwidth and batch, and measured steps on the theory's axes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from experiments import runs
from experiments.pages import figures
from experiments.pages.page import details_block, figure, records, table
from experiments.publish import RESULTS, committed_kinds

NAMES = ("7b-70b", "two-processes")  # labels of committed runs that are drawn together: a plan, measured steps
REDRAWN = "70b"  # the same where V is not kept
KINDS = ("plan", "threshold", "point")
FIGURE = "plan.svg"
GB = 10**9
SHARDS = {"ddp": ("#0072B2", "o"), "fsdp": ("#D55E00", "s"), "hybrid": ("#009E73", "^")}
CAPTION = (
    "Step of LowRank-IPA over that of full AdamW, against seconds of full AdamW's messages over those of its operations. A line goes from where "
    "everything is hidden that can be to where nothing is (marker)."
)


def committed(results: Path = RESULTS) -> list[dict[str, Any]]:
    """The rows of both committed runs together."""
    frames = [frame.assign(kind=kind) for name in NAMES for kind, frame in committed_kinds(f"plan/{name}", KINDS, results).items()]
    return [row for frame in frames for row in records(frame)]


def _of(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == kind]


def _range(row: dict[str, Any]) -> str:
    low, high = sorted((row["ratio_hidden"], row["ratio_serial"]))
    return f"{low:.2f}–{high:.2f}"


def main_table(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One a model, way to share, number of devices and bandwidth, at the smallest batch: what fits, and from which batches messages are hidden."""
    found = _of(rows, "plan")
    smallest = min((row["sequences"] for row in found), default=0)
    tokens = {_key(row): row for row in _of(rows, "threshold")}
    return [
        {
            "model": str(row["model"]),
            "shared": row["shard"],
            "devices": f"{row['devices']:,}",
            "GB/s": f"{row['bandwidth_gb']:g}",
            "AdamW GB": f"{row['full_peak'] / GB:,.3g}" + ("" if row["full_fits"] else " (no room)"),
            "low-rank GB": f"{row['low_peak'] / GB:,.3g}" + ("" if row["low_fits"] else " (no room)"),
            "bytes sent": f"{row['sending_share']:.2f}×",
            "operations": f"{row['operations_share']:.2f}×",
            "step": f"{_range(row)}×",
            "tokens that hide AdamW's": _tokens(tokens[_key(row)]["full_hides"]),
            "low-rank's": _tokens(tokens[_key(row)]["low_hides"]),
        }
        for row in found
        if row["sequences"] == smallest
    ]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "shard", "devices", "bandwidth_gb"))


def _tokens(value: float) -> str:
    return f"{value:,.0f}" if value < 1e4 else f"{value / 1e3:,.0f}k"


def point_table(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One a measured batch."""
    return [
        {
            "tokens a device": f"{row['sequences'] * (row['length'] - 1):,}",
            "messages / operations": f"{row['full_sending'] / row['full_compute']:.2f}",
            "operations": f"{row['low_compute'] / row['full_compute']:.2f}×",
            "bytes sent": f"{row['low_sending'] / row['full_sending']:.2f}×",
            "predicted": f"{row['low']:.2f}–{row['high']:.2f}×",
            "measured": f"{row['ratio']:.2f}× ({row['ratio_q1']:.2f}–{row['ratio_q3']:.2f})",
            "between": "yes" if row["between"] else "no",
        }
        for row in _of(rows, "point")
    ]


def thresholds(rows: list[dict[str, Any]]) -> Figure:
    """Ratio of the steps over tokens a device, for every bandwidth of the most devices: where it leaves the ratio of the operations."""
    found = pd.DataFrame(_of(rows, "plan"))
    models = list(dict.fromkeys(found.model))
    fig, axes = plt.subplots(1, len(models), figsize=(4.6 * len(models), 3.4), sharey=True, squeeze=False)
    for ax, model in zip(axes[0], models, strict=True):
        mine = found[(found.model == model) & (found.devices == found.devices.max())]
        for shard, group in mine.groupby("shard", sort=False):
            hue, mark = SHARDS[str(shard)]
            for dash, (bandwidth, some) in zip(figures.DASHES, group.groupby("bandwidth_gb"), strict=False):
                each = some.tokens / some.devices
                ax.plot(each, some.ratio_serial, dash, color=hue, marker=mark, label=f"{shard}, {bandwidth:g} GB/s")
        ax.axhline(1, color="#7F7F7F", linewidth=0.8)
        ax.set(
            xscale="log", xlabel="tokens a device and step", title=f"LLaMA-{model.upper()}, {found.devices.max():,} devices", ylim=(0, None)
        )
        ax.set_ylim(top=max(1.1, ax.get_ylim()[1]))
        ax.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    axes[0][0].set_ylabel("time of a step, low-rank over full\n(nothing hidden)")
    return fig


def bounds(rows: list[dict[str, Any]]) -> Figure:
    """Plans and measured steps on one pair of axes: how much is sent against how much is gained."""
    fig, ax = plt.subplots(figsize=(6.4, 3.8))
    for row in _of(rows, "plan"):
        x = row["full_sending"] / row["full_compute"]
        if x > 0:
            hue, mark = SHARDS[row["shard"]]
            ax.plot([x, x], [row["ratio_hidden"], row["ratio_serial"]], "-", color=hue, alpha=0.25, linewidth=1)
            ax.plot(x, row["ratio_serial"], mark, color=hue, markersize=4.5, markeredgewidth=0)
    for shard, (hue, mark) in SHARDS.items():
        if any(row["shard"] == shard for row in _of(rows, "plan")):
            ax.plot([], [], mark, color=hue, label=f"planned, {shard}")
    for i, row in enumerate(_of(rows, "point")):
        x = row["full_sending"] / row["full_compute"]
        ax.plot([x, x], [row["low"], row["high"]], "-", color="#000000", linewidth=4, alpha=0.25)
        error = np.abs(np.array([[row["ratio"] - row["ratio_q1"]], [row["ratio_q3"] - row["ratio"]]]))
        label = f"measured, {row['processes']} processes (quartiles; grey: its bounds)" if i == 0 else None
        ax.errorbar([x], [row["ratio"]], yerr=error, fmt="D", color="#000000", markersize=5, label=label)
    ax.axhline(1, color="#7F7F7F", linewidth=0.8)
    ax.set(
        xscale="log",
        xlabel="full AdamW: seconds of messages / seconds of operations",
        ylabel="time of a step, low-rank over full",
        ylim=(0, None),
    )
    ax.set_ylim(top=max(1.1, ax.get_ylim()[1]))
    ax.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return fig


def told(rows: list[dict[str, Any]]) -> list[str]:
    """What the rows say, a sentence each."""
    found, lines = pd.DataFrame(_of(rows, "plan")), []
    if not found.empty:
        lines.append(f"messages of full AdamW take longer than the low-rank operations in {found.pays.sum()} of {len(found)} settings")
        only = found[found.low_fits & ~found.full_fits]
        if len(only):
            where = ", ".join(dict.fromkeys(f"{row['model']} under {row['shard']}" for row in records(pd.DataFrame(only))))
            lines.append(f"low-rank alone has room: {where}")
        largest = found.loc[found.low_projectors.idxmax()]
        if largest.low_projectors:
            lines.append(
                f"V and what a fitted law knows are whole on every device: {largest.low_projectors / GB:.3g} GB of {largest.model}"
            )
    points = _of(rows, "point")
    if points:
        inside = sum(row["between"] for row in points)
        least, most = (pick(row["ratio"] for row in points) for pick in (min, max))
        lines.append(
            f"{points[0]['processes']} processes: {inside} of {len(points)} measured ratios, {least:.2f} to {most:.2f}, are between the bounds"
        )
    return lines


def section(run: runs.Run, rows: list[dict[str, Any]]) -> str:
    """Of the report."""
    del run
    text = "".join(f"<p>{line}.</p>" for line in told(rows))
    if _of(rows, "plan"):
        text += figure(lambda: thresholds(rows), "Ratio of the steps where nothing is hidden, by batch, on the most devices.")
        text += figure(lambda: bounds(rows), CAPTION)
        text += table(main_table(rows)) + details_block("All settings", table(_of(rows, "plan")))
    if _of(rows, "point"):
        text += figure(lambda: bounds(rows), CAPTION) + table(point_table(rows))
    return text


def markdown(results: Path = RESULTS) -> str:
    """For the results: both committed runs."""
    rows = committed(results)
    if not rows:
        return "not yet run"
    parts = [assumed(results), "\n".join(f"- {line}" for line in told(rows))]
    most = max((row["devices"] for row in _of(rows, "plan")), default=math.inf)
    for lines in (main_table([row for row in rows if row.get("devices") == most]), point_table(rows)):
        if lines:
            parts.append(_lines(lines))
    parts.append(f"Figure: {CAPTION} Black: measured, with quartiles; grey: their bounds.")
    redrawn = committed_kinds(f"plan/{REDRAWN}", KINDS, results)
    if redrawn:
        rows = [row for kind, frame in redrawn.items() for row in records(frame.assign(kind=kind))]
        parts += ["Where V is drawn from its key at each use:", _lines(main_table(rows))]
    return "\n\n".join(parts)


def _lines(lines: list[dict[str, str]]) -> str:
    return "\n".join([f"| {' | '.join(lines[0])} |", "|" + "---|" * len(lines[0]), *(f"| {' | '.join(line.values())} |" for line in lines)])


def assumed(results: Path = RESULTS) -> str:
    """Of devices and links, as the committed plan was asked."""
    asked = json.loads((results / "plan" / f"{NAMES[0]}.json").read_text(encoding="utf-8"))["config"]
    links = ", ".join(f"{one:g}" for one in asked["bandwidth_gb"])
    return (
        f"Assumed: {asked['rate_tera']:g}·10¹² operations a second and {asked['memory_gb']:g} GB a device; nodes of {asked['node']}, "
        f"{asked['near_gb']:g} GB/s inside, {links} GB/s between them, {asked['latency_us']:g} µs a message; {asked['precision']}, "
        f"r/n = {asked['rank']:g}, {asked['length']:,} tokens a sequence, blocks {'recomputed' if asked['checkpoint_activations'] else 'kept'}. "
        f"The table is of {asked['sequences'][0]} sequence a device."
    )


def drawn(results: Path = RESULTS) -> Figure | None:
    """The committed plans and points together; None where there are none."""
    rows = committed(results)
    if not rows:
        return None
    figures.style()
    return bounds(rows)
