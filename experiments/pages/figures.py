"""Every figure of the report, from the rows of a run. One look and one colour-blind-safe palette for all."""

from __future__ import annotations

import io

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.validation.travelling import HOOKS
from optimizers import OPTIMIZERS

PALETTE = {  # Okabe–Ito and darker relatives; laws that coincide in theory are told apart by marker
    "gaussian": "#D55E00",
    "rademacher": "#E69F00",
    "sparse_sign": "#8C510A",
    "haar_stiefel": "#0072B2",
    "coordinate": "#56B4E9",
    "coordinate_replacement": "#999999",
    "dct": "#009E73",
    "hadamard": "#66C2A5",
    "spectral": "#CC79A7",
    "top_svd": "#000000",
    "fixed_basis": "#7F7F7F",
    "adamw": "#882255",
    "lora": "#332288",
    "relora": "#B15928",
}
MARKERS = dict(zip(PALETTE, "osD^v<>pPXd*hH", strict=True))
TAKE_TURNS = (*OPTIMIZERS, *HOOKS)  # at the colours and markers of the laws
FEEDBACK = {  # two of them often coincide
    "none": {"color": "#7F7F7F", "linestyle": ":", "linewidth": 1.6},
    "ef14": {"color": "#0072B2", "linestyle": "-", "linewidth": 3.2},
    "ef21": {"color": "#E69F00", "linestyle": "--", "linewidth": 1.6},
    "literal": {"color": "#D55E00", "linestyle": "-.", "linewidth": 1.6},
}
LAYERS = {
    "q_proj": "#0072B2",
    "k_proj": "#56B4E9",
    "v_proj": "#009E73",
    "o_proj": "#CC79A7",
    "gate_proj": "#E69F00",
    "up_proj": "#D55E00",
    "down_proj": "#8C510A",
    "lm_head": "#000000",
}


def style() -> None:
    """The project's look; call before plotting."""
    sns.set_theme(context="paper", style="whitegrid", font_scale=1.05)
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lowrank", "font.family": "sans-serif", "axes.titlesize": 10})


def colour(law: str) -> str:
    """Of a law or of a variant whose label starts with its name; the optimizers in a frame and the hooks take turns."""
    name = law.split(" ")[0]
    if name in PALETTE:
        return PALETTE[name]
    return list(PALETTE.values())[TAKE_TURNS.index(name) % len(PALETTE)] if name in TAKE_TURNS else "#000000"


def marker(law: str) -> str:
    """Of a law; variants share an open square; others take turns. No two, nor one and a law, have colour and marker in common."""
    if law in TAKE_TURNS and law not in MARKERS:
        rounds, place = divmod(TAKE_TURNS.index(law), len(PALETTE))
        return list(MARKERS.values())[(place + rounds + 1) % len(MARKERS)]  # a law has the marker of its own place
    return MARKERS.get(law, "s")


def svg(figure: Figure) -> str:
    """The figure as an inline SVG element; closes it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def legend(figure: Figure, ax: Axes, columns: int = 1) -> None:
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, ncols=columns)


def error_against_rank(rows: pd.DataFrame, title: str) -> Figure:
    """E‖estimate − g‖²/‖g‖² against r/n: exact values as lines, measured ones as points with error bars (±2 standard errors).

    ``rows``: columns law, ratio, panel, theory, estimate, standard_error, all relative to ‖g‖².
    """
    style()
    panels = list(dict.fromkeys(rows.panel))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.4 * columns, 3.6 * lines), sharey=True, squeeze=False)
    for ax, panel in zip(axes.flat, panels, strict=False):
        for law, group in rows[rows.panel == panel].groupby("law", sort=False):
            group, law = pd.DataFrame(group).sort_values(by=["ratio"]), str(law)
            dashes = "-" if law in PALETTE else "--"
            ax.plot(group.ratio, group.theory, dashes, color=colour(law), linewidth=1.2)
            ax.errorbar(
                group.ratio,
                group.estimate,
                2 * group.standard_error,
                fmt=marker(law),
                color=colour(law),
                markerfacecolor=colour(law) if law in PALETTE else "white",
                markersize=4.5,
                capsize=2,
                label=law,
            )
        ticks = sorted(rows[rows.panel == panel].ratio.unique())
        ax.set(xscale="log", yscale="log", xlabel="r/n", title=panel)
        ax.set_xticks(ticks, [f"{t:.3g}" for t in ticks])
        ax.minorticks_off()
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel("E‖estimate − g‖² / ‖g‖²")
    figure.suptitle(title, y=1.0)
    figure.tight_layout()
    legend(figure, axes[0][0])
    return figure


def z_scores(z: np.ndarray, title: str) -> Figure:
    """Histogram of z against the standard normal density: what honest error bars look like."""
    style()
    figure, ax = plt.subplots(figsize=(4.2, 3.0))
    bins = np.linspace(-5, 5, 41).tolist()
    ax.hist(np.clip(z, -5, 5), bins=bins, density=True, color="#56B4E9", edgecolor="white", label=f"{len(z)} verdicts")
    grid = np.linspace(-5, 5, 201)
    ax.plot(grid, np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi), color="#000000", linewidth=1.2, label="N(0, 1)")
    ax.set(xlabel="z = (measured − exact) / standard error", ylabel="density", title=title)
    ax.legend(frameon=False)
    return figure


def spectra(layers: pd.DataFrame) -> Figure:
    """Eigenvalues of S = E[ĜᵀĜ], as shares of its trace, one line a layer, coloured by its kind."""
    style()
    figure, ax = plt.subplots(figsize=(6.0, 3.8))
    for name, index, values in zip(layers.layer, layers.spectrum_index, layers.spectrum, strict=True):
        kind = str(name).rsplit(".", 1)[-1]
        share = np.maximum(np.array(values), 1e-9)
        ax.plot(index, share, color=LAYERS.get(kind, "#7F7F7F"), linewidth=0.9, alpha=0.8, label=kind)
    ax.set(xscale="log", yscale="log", xlabel="index of eigenvalue", ylabel="share of tr S", title="Spectrum of S by layer", ylim=(1e-7, 1))
    figure.tight_layout()
    legend(figure, ax)
    return figure


def layer_facts(layers: pd.DataFrame) -> Figure:
    """Effective rank, stable rank (as fractions of n) and signal share of every layer, in order."""
    style()
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.4))
    position = np.arange(len(layers))
    colours = [LAYERS.get(str(name).rsplit(".", 1)[-1], "#7F7F7F") for name in layers.layer]
    axes[0].scatter(position, layers.effective_rank / layers.n, c=colours, s=22, marker="o")
    axes[0].scatter(position, layers.stable_rank / layers.n, c=colours, s=22, marker="^")
    axes[0].scatter([], [], c="#555555", marker="o", s=22, label="effective rank / n")
    axes[0].scatter([], [], c="#555555", marker="^", s=22, label="stable rank / n")
    axes[0].set(xlabel="layer", yscale="log", title="How low-rank is S?")
    axes[0].legend(framealpha=0.8, edgecolor="none")
    axes[1].scatter(position, 100 * layers.signal_share, c=colours, s=22)
    for kind in dict.fromkeys(str(name).rsplit(".", 1)[-1] for name in layers.layer):
        axes[1].scatter([], [], c=LAYERS.get(kind, "#7F7F7F"), label=kind, s=22)
    axes[1].set(xlabel="layer", ylabel="‖g‖² / tr S, %", title="How much of S is signal?", ylim=(0, None))
    legend(figure, axes[1])
    figure.tight_layout()
    return figure


def layer_ratios(rows: pd.DataFrame, laws: list[str], ratio: float) -> Figure:
    """Measured over predicted error, layer by layer, with ±2 standard errors."""
    style()
    figure, axes = plt.subplots(len(laws), 1, figsize=(8.0, 1.5 * len(laws) + 0.6), sharex=True, sharey=True, squeeze=False)
    for ax, law in zip(axes[:, 0], laws, strict=True):
        group = rows[(rows.law == law) & (rows.ratio == ratio)]
        value = group.measured / group.predicted
        bar = 2 * group.standard_error / group.predicted
        ax.axhline(1, color="#000000", linewidth=0.8)
        ax.errorbar(np.arange(len(group)), value, bar, fmt=marker(law), color=colour(law), markersize=3.5, capsize=1.5, linewidth=0.9)
        ax.set_ylabel(law.replace("_", "\n"))
    axes[0][0].set_title(f"Measured / predicted error by layer, r/n = {ratio:g}")
    axes[-1][0].set_xlabel("layer")
    return figure


def loss_curves(rows: pd.DataFrame) -> Figure:
    """Exact expected loss (lines) and ensemble means (points, ±2 standard errors) of SGD under each law, with the stationary levels."""
    style()
    figure, ax = plt.subplots(figsize=(6.4, 4.0))
    for law, group in rows.groupby("law", sort=False):
        law = str(law)
        ax.plot(group.step, group.theory, color=colour(law), linewidth=1.2)
        ax.errorbar(
            group.step, group.estimate, 2 * group.standard_error, fmt=marker(law), color=colour(law), markersize=3.5, capsize=2, label=law
        )
        ax.axhline(float(group.stationary.iloc[0]), color=colour(law), linewidth=0.7, linestyle=":")
    ax.set(yscale="log", xlabel="step", ylabel="E[F]", title="Expected loss: exact (lines), simulated (points), level (dotted)")
    figure.tight_layout()
    legend(figure, ax)
    return figure


def stability(rows: pd.DataFrame) -> Figure:
    """Exact growth a step (lines) and simulated against exact E‖Θ‖² after five steps (points), around the boundary."""
    style()
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.4))
    for law, group in rows.groupby("law", sort=False):
        law = str(law)
        axes[0].plot(group.multiple, group.growth, marker=marker(law), color=colour(law), label=law, markersize=4)
        ratio, bar = group.estimate / group.theory, 2 * group.standard_error / group.theory
        axes[1].errorbar(group.multiple, ratio, bar, fmt=marker(law), color=colour(law), markersize=4, capsize=2)
    axes[0].axhline(1, color="#000000", linewidth=0.8)
    axes[1].axhline(1, color="#000000", linewidth=0.8)
    axes[0].set(xlabel="η / largest stable η", ylabel="growth of E‖Θ‖² a step", title="Exact growth factor")
    axes[1].set(xlabel="η / largest stable η", ylabel="simulated / exact", title="E‖Θ‖² after five steps")
    figure.tight_layout()
    legend(figure, axes[0])
    return figure


def feedback(rows: list[dict]) -> Figure:
    """Median loss of the literal GradLite recursion, EF14, EF21 and no feedback under one sequence of compressors."""
    style()
    figure, ax = plt.subplots(figsize=(6.0, 3.4))
    for row in rows:
        ax.plot(row["step"], row["loss"], **FEEDBACK[row["law"]], label=row["law"])
    ax.set(yscale="log", xlabel="step", ylabel="median F", title="Error feedback, fresh rank-r compressor")
    figure.tight_layout()
    legend(figure, ax)
    return figure


def training(losses: list[float]) -> Figure:
    """Training loss of the model whose gradients were taken."""
    style()
    figure, ax = plt.subplots(figsize=(4.2, 3.0))
    ax.plot(np.arange(1, len(losses) + 1), losses, color="#0072B2", linewidth=1.0)
    ax.set(xlabel="step", ylabel="loss (nats/token)", title="Training before measurement")
    return figure
