"""Figures of the notebooks about gradients in training, convergence, training, memory and speed, beside those that the report has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.pages.figures import LAYERS, colour, legend, marker, style

DASHES = ("-", "--", ":", "-.")  # of the variants of a law, in their order
KINDS = dict(zip(LAYERS, "osD^v<>P", strict=True))  # marker of a kind of layer
SHADES = {  # categories of bytes: colour and hatch
    "weights": ("#0072B2", ""),
    "masters": ("#66C2A5", "++"),
    "gradients": ("#D55E00", "//"),
    "states": ("#E69F00", ".."),
    "activations": ("#56B4E9", "\\\\"),
    "loss": ("#882255", "||"),
    "projector": ("#CC79A7", "xx"),
    "projectors": ("#CC79A7", "xx"),
    "temporaries": ("#999999", "--"),
    "communication": ("#000000", "oo"),
}


def lines(
    rows: pd.DataFrame,
    x: str,
    y: str,
    *,
    xlabel: str,
    ylabel: str,
    error: str | None = None,
    points: pd.DataFrame | None = None,
    scales: tuple[str, str] = ("linear", "linear"),
    height: float = 3.4,
) -> Figure:
    """A line a label, column ``y`` against ``x``, in panels (column ``panel``), with bars of column ``error`` at every point.

    Labels begin with a law or method, which gives the colour and the marker; a column ``variant`` gives the dashes. ``points``: rows of the same
    columns that are drawn as markers with bars and no line; then the lines have no markers.
    """
    style()
    every = rows if points is None else pd.concat([rows, points])
    panels = list(dict.fromkeys(every.panel)) if "panel" in every else [""]
    variants = list(dict.fromkeys(_variant(row) for row in rows.to_dict("records")))
    figure, axes = plt.subplots(1, len(panels), figsize=(1.2 + 3.9 * len(panels), height), sharey=True, squeeze=False)
    for ax, panel in zip(axes[0], panels, strict=True):
        for frame, joined in ((rows, True), (points, False)):
            if frame is not None:
                mine = frame if panel == "" else frame.query("panel == @panel")
                _drawn(ax, mine, (x, y, error), variants, joined, marked=points is None or not joined)
        ax.set(xlabel=xlabel, xscale=scales[0], yscale=scales[1], title=panel)
    axes[0][0].set_ylabel(ylabel)
    figure.tight_layout()
    legend(figure, axes[0][int(np.argmax([len(ax.get_legend_handles_labels()[1]) for ax in axes[0]]))])
    return figure


def _drawn(
    ax: Axes, rows: pd.DataFrame, columns: tuple[str, str, str | None], variants: list[str | None], joined: bool, marked: bool
) -> None:
    x, y, error = columns
    kind = pd.Series([(str(row["label"]), _variant(row)) for row in rows.to_dict("records")], index=rows.index)
    for label, variant in dict.fromkeys(kind):
        group = rows[[one == (label, variant) for one in kind]]
        look: dict[str, Any] = {"color": colour(label), "linewidth": 1.3, "markersize": 4.5}
        look["linestyle"] = DASHES[variants.index(variant) % len(DASHES)] if joined else "none"
        look["marker"] = marker(label.split(" ")[0]) if marked else ""
        name = label if variant is None else f"{label}, {variant}"
        if error is not None and error in group:
            ax.errorbar(group[x], group[y], group[error], capsize=2, label=name, **look)
        else:
            ax.plot(group[x], group[y], label=name, **look)


def _variant(row: dict[Any, Any]) -> str | None:
    value = row.get("variant")
    return value if isinstance(value, str) else None


def gains(rows: pd.DataFrame) -> Figure:
    """A ratio of errors layer by layer, in model order; a column of panels a ratio, a row a model; colour and marker say the kind of layer.

    ``rows``: columns model, what, layer (its full name), gain.
    """
    style()
    models, whats = list(dict.fromkeys(rows.model)), list(dict.fromkeys(rows.what))
    figure, axes = plt.subplots(len(models), len(whats), figsize=(5.0 * len(whats), 2.9 * len(models)), squeeze=False)
    for line, model in zip(axes, models, strict=True):
        for ax, what in zip(line, whats, strict=True):
            mine = rows[(rows.model == model) & (rows.what == what)].reset_index(drop=True)
            for kind, group in mine.groupby(mine.layer.str.rsplit(".", n=1).str[-1], sort=False):
                look: dict[str, Any] = {"color": LAYERS.get(str(kind), "#7F7F7F"), "marker": KINDS.get(str(kind), "o"), "s": 20}
                ax.scatter(group.index, group.gain, label=kind, **look)
            ax.set(title=f"{model}: {what}", xlabel="layer, in model order")
        line[0].set_ylabel("error / error")
    figure.tight_layout()
    legend(figure, max(axes.flat, key=lambda ax: len(ax.get_legend_handles_labels()[1])))
    return figure


def bytes_by_category(rows: pd.DataFrame, unit: float = 2**30, name: str = "GiB") -> Figure:
    """The peak of a step as stacked bars, one a method from the top, a panel each value of ``panel``; columns of SHADES are categories, in bytes."""
    style()
    panels, methods = list(dict.fromkeys(rows.panel)), list(dict.fromkeys(rows.label))
    size = (1.6 + 4.2 * len(panels), 0.27 * len(methods) + 1.0)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for ax, panel in zip(axes[0], panels, strict=True):
        mine = rows[rows.panel == panel].set_index("label").reindex(methods)
        left = np.zeros(len(methods))
        for category, (shade, hatch) in SHADES.items():
            width = np.nan_to_num(mine[category].to_numpy(dtype=float)) / unit if category in mine else np.zeros(len(methods))
            if not width.any():
                continue
            ax.barh(methods, width, left=left, color=shade, hatch=hatch, edgecolor="white", linewidth=0.4, label=category)
            left += width
        for place, total in enumerate(left):
            ax.text(total, place, f" {total:,.3g}" if total else " not run", va="center", fontsize=7)
        ax.set(title=panel, xlabel=f"{name} at the peak of a step", xlim=(0, 1.14 * left.max()))
        ax.grid(visible=False, axis="y")
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    legend(figure, axes[0][0])
    return figure
