"""Figures of ``lowrank bench``: ratios to peers with their quartiles, and how cost grows beside operations."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from experiments.pages.figures import colour, style


def ratios(rows: list[dict[str, Any]]) -> Figure:
    """One line a row that has a peer, the groups below one another; logarithmic."""
    style()
    shown = [row for row in rows if "ratio_q1" in row and row["name"] != "peer" and row["kind"] != "growth"]
    figure, ax = plt.subplots(figsize=(8.0, 0.2 * len(shown) + 1.2))
    place = np.arange(len(shown))[::-1]
    groups = list(dict.fromkeys(row["kind"] for row in shown))
    for y, row in zip(place, shown, strict=True):
        mine = plt.get_cmap("cividis")(groups.index(row["kind"]) / max(1, len(groups) - 1) * 0.8)
        ax.plot([row["ratio_q1"], row["ratio_q3"]], [y, y], color=mine, linewidth=3)
        ax.plot(row["ratio"], y, "o", color=mine, markersize=3.5)
        if "target" in row:
            ax.plot([row["target"]] * 2, [y - 0.4, y + 0.4], color="#000000", linewidth=1.2)
    ax.axvline(1, color="#000000", linewidth=0.6)
    names = [f"{row['kind']}: {row['name']} {row.get('shape', '')} / {row.get('over', 'peer')}" for row in shown]
    ax.set_yticks(place, [name if len(name) < 80 else name[:78] + "…" for name in names], fontsize=6)
    ax.set(xscale="log", xlabel="time over that of the peer (log)", ylim=(-1, len(shown)))
    figure.tight_layout()
    return figure


def growth(rows: list[dict[str, Any]]) -> Figure:
    """A panel a quantity: seconds over the first point's, and operations over its."""
    style()
    mine = [row for row in rows if row["kind"] == "growth"]
    names = list(dict.fromkeys(row["name"] for row in mine))
    figure, axes = plt.subplots(1, len(names), figsize=(2.6 * len(names), 2.6), squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        points = [row for row in mine if row["name"] == name]
        values = [row["value"] for row in points]
        ax.plot(values, [row["predicted"] for row in points], "-", color="#000000", linewidth=1, label="operations")
        ax.plot(values, [row["ratio"] for row in points], "o", color=colour("haar_stiefel"), markersize=4, label="seconds")
        ax.set(xscale="log", yscale="linear" if name == "K" else "log", xlabel=name)
        ax.set_xticks(values, [str(value) for value in values], rotation=45)
        ax.minorticks_off()
        if name != "K":
            seen = [row["ratio"] for row in points]
            ax.set_yticks(seen, [f"{value:.3g}" for value in seen])
    axes[0][0].set(ylabel="over the first point")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    return figure
