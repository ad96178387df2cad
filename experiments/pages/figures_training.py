"""Figures of training runs, of their comparison, and of what optimizers in a frame do to a gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from experiments.pages.figures import colour, legend, marker, style


def curves(rows: pd.DataFrame) -> Figure:
    """Held-out loss against tokens and against seconds of training; bars are ±1 standard error over seeds."""
    style()
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.8), sharey=True)
    for ax, horizontal, label in ((axes[0], "trained_tokens", "tokens"), (axes[1], "seconds", "seconds")):
        for name, group in rows.groupby("label", sort=False):
            name = str(name)
            fmt = f"{marker(name)}-"
            ax.errorbar(
                group[horizontal], group.loss, group.standard_error, fmt=fmt, color=colour(name), markersize=3.5, capsize=2, label=name
            )
        ax.set(xlabel=label)
    axes[0].set(ylabel="held-out loss (nats/token)")
    figure.tight_layout()
    legend(figure, axes[0])
    return figure


def differences(rows: pd.DataFrame, reference: str) -> Figure:
    """Paired differences of held-out loss to ``reference`` with 95 % intervals."""
    style()
    mine = rows[rows.reference == reference]
    figure, ax = plt.subplots(figsize=(6.0, 0.36 * len(mine) + 1.1))
    place = np.arange(len(mine))[::-1]
    for y, (_, row) in zip(place, mine.iterrows(), strict=True):
        bar = [[row.difference - row.low], [row.high - row.difference]]
        ax.errorbar([row.difference], [y], xerr=bar, fmt=marker(row.label), color=colour(row.label), capsize=3, markersize=5)
    ax.axvline(0, color="#000000", linewidth=0.8)
    ax.set_yticks(place, list(mine.label))
    ax.set(xlabel=f"held-out loss minus that of {reference} (nats/token)", title="Paired by seed, 95 % intervals")
    return figure


def run(train: pd.DataFrame, held_out: pd.DataFrame, law: str) -> Figure:
    """Training and held-out loss of one run."""
    style()
    figure, ax = plt.subplots(figsize=(6.0, 3.4))
    ax.plot(train.step, train.loss, color=colour(law), linewidth=0.8, label="training")
    ax.plot(held_out.step, held_out.loss, "o-", color="#000000", markersize=4, linewidth=1.0, label="held out")
    ax.set(xlabel="step", ylabel="loss (nats/token)")
    ax.legend(frameon=False)
    return figure


def live(rows: pd.DataFrame) -> Figure:
    """Predicted and realised error of the law in use, and captured energy, summed over layers."""
    style()
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.2))
    for name, dashes in (("predicted", "-"), ("realised", "--")):
        axes[0].plot(rows.step, rows[name] / (rows.signal + rows.noise), dashes, marker="o", markersize=3.5, color="#0072B2", label=name)
    axes[0].set(xlabel="step", ylabel="E‖ĜVVᵀ − g‖² / tr S")
    axes[0].legend(frameon=False)
    axes[1].plot(rows.step, rows.captured, "o-", markersize=3.5, color="#D55E00", label="energy of Ĝ in span(V)")
    axes[1].plot(rows.step, rows.signal / (rows.signal + rows.noise), "s-", markersize=3.5, color="#009E73", label="signal share ‖g‖²/tr S")
    axes[1].axhline(0, color="#000000", linewidth=0.8)
    axes[1].set(xlabel="step")
    figure.tight_layout()
    legend(figure, axes[1])
    return figure


def frames(merged: dict[str, dict[str, Any]]) -> Figure:
    """Squared bias against variance of every method's gradient path, and the noise of its update against the state it keeps; one row a method."""
    style()
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.8))
    for name, row in merged.items():
        look: Any = {"fmt": marker(name), "color": colour(name), "markersize": 5.5, "capsize": 2, "label": name}
        axes[0].errorbar(row["variance"], max(0.0, row["bias2"]), row["bias2_error"], row["variance_error"], **look)
        axes[1].errorbar(row["over_adamw"], row["noise_over_mean"], **look)
    axes[0].set(xscale="log", xlabel="variance / ‖g‖²", ylabel="‖bias‖² / ‖g‖²", title="gradient path")
    axes[1].set(xscale="log", xlabel="state / AdamW's", ylabel="noise / mean", title="update")
    figure.tight_layout()
    legend(figure, axes[0], columns=1 if len(merged) <= 20 else 2)
    return figure


def pareto(rows: list[dict[str, Any]], fronts: dict[str, list[dict[str, Any]]], axes: dict[str, str]) -> Figure:
    """Held-out loss against each of several costs, with the front of each as a line; ``axes``: column of ``rows`` → its name."""
    style()
    figure, panels = plt.subplots(1, len(axes), figsize=(4.4 * len(axes), 4.4), sharey=True, squeeze=False)
    for ax, (cost, name) in zip(panels.flat, axes.items(), strict=True):
        best = fronts[cost]
        ax.step([row[cost] for row in best], [row["loss"] for row in best], where="post", color="#7F7F7F", linewidth=1.0, zorder=0)
        for row in rows:
            label = row["contender"]
            look: Any = {"fmt": marker(label), "color": colour(label), "markersize": 5.5, "capsize": 2, "label": label}
            ax.errorbar(row[cost], row["loss"], row["error"], **look)
        for row in best:
            ax.annotate(row["contender"], (row[cost], row["loss"]), xytext=(4, -9), textcoords="offset points", fontsize=7)
        ax.set(xlabel=name, xscale="log")
        for axis in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
            axis(lambda value, _: f"{value:g}")
        ax.tick_params(axis="x", which="both", labelsize=7, rotation=45)
    panels[0, 0].set(ylabel="held-out loss (nats/token)")
    figure.tight_layout()
    legend(figure, panels[0, 0], columns=1 if len(rows) <= 20 else 2)
    return figure
