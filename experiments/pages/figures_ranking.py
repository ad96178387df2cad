"""The figure of ``lowrank ranks``: spectra and gradient subspaces along a training, truncated and exported models, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.comparison.outcomes import student
from experiments.pages import figures, page

FIGURE = "ranks.svg"
LOOKS = {  # choice of ranks → colour, marker, dashes; from the palette of the laws
    "uniform": ("#0072B2", "s", "-"),
    "weights": ("#D55E00", "o", "--"),
    "gradients": ("#009E73", "^", ":"),
    "least_error": ("#CC79A7", "v", "-."),
}
LINEAR = 0.01  # nats up to which the scale of exports is linear, logarithmic beyond
INKS = (("#000000", "D"), ("#56B4E9", "P"), ("#8C510A", "X"))  # of numbers of directions
Frames = Mapping[str, pd.DataFrame]
CAPTION = (
    "Above, left: every layer thin, the median thick. Middle: how much of the leading subspace of a mini-batch gradient is shared with that of "
    "another mini-batch at another moment, over what two mini-batches of one moment share, chance taken from both: 0 unrelated, 1 not turned; bars "
    "±2 standard errors (jackknife over mini-batches). Right: Student intervals over seeds; one that contains 0 shows no difference. Below: every "
    "matrix truncated, at equal numbers Σ r(m+n), and right the exported models, where matrices whose factors would be larger stay whole (open "
    "markers: the pretrained model; logarithmic above 0.01); bars: Student intervals over held-out sequences."
)


def all_layers(kinds: Frames) -> pd.DataFrame:
    """The rows ``angle`` that are means over layers."""
    return pd.DataFrame(kinds["angle"][kinds["angle"].layer == "all"])


def half(export: pd.DataFrame, of: str) -> pd.Series:
    """Of Student's 95 % interval of a difference, over held-out sequences; NaN for one sequence."""
    return pd.Series(student(export.sequences) * export[f"{of}_se"], export.index)


def drawn(kinds: Frames) -> Figure:
    """Effective ranks and subspaces along the training, perplexity against numbers kept, and paired differences."""
    figures.style()
    figure, axes = plt.subplots(2, 3, figsize=(13.2, 7.4))
    _ranks_over_steps(axes[0, 0], kinds)
    _angles_over_steps(axes[0, 1], kinds)
    _differences(axes[0, 2], kinds)
    for ax, (model, export) in zip(axes[1], kinds["export"].groupby("model", sort=False), strict=False):
        _exported(ax, str(model), pd.DataFrame(export))
    for ax in axes[1, kinds["export"].model.nunique() : 2]:
        ax.set_axis_off()
    _bytes(axes[1, 2], kinds)
    figure.tight_layout()
    return figure


def _ranks_over_steps(ax: Axes, kinds: Frames) -> None:
    """Every layer a thin line, their median thick; dashed and with triangles: gradients."""
    spectrum = kinds["spectrum"].assign(relative=kinds["spectrum"].effective_rank / kinds["spectrum"][["m", "n"]].min(axis=1))
    for of, look in (("weights", LOOKS["weights"]), ("gradient", LOOKS["gradients"])):
        mine = spectrum[spectrum["of"] == of]
        for _, group in mine.groupby("layer"):
            ax.plot(group.step, group.relative, look[2], color=look[0], linewidth=0.5, alpha=0.35)
        middle = mine.groupby("step").relative.median()
        ax.plot(middle.index, middle, color=look[0], marker=look[1], linestyle=look[2], linewidth=1.8, label=of)
    ax.set(xlabel="step", ylabel="effective rank / min(m, n)", title="Spectra", ylim=(0, None))
    ax.legend(frameon=False)


def _angles_over_steps(ax: Axes, kinds: Frames) -> None:
    """Overlap with the last moment over the noise floor, and with the next; bars are ±2 standard errors."""
    rows = all_layers(kinds)
    last = rows.other.max()
    for place, (r, mine) in enumerate(rows[rows.step < rows.other].groupby("directions")):
        colour, marker = INKS[place % len(INKS)]
        for to, group, dashes in (
            ("last", mine[mine.other == last], "-"),
            ("next", pd.DataFrame(mine).sort_values(by="other").groupby("step").head(1), "--"),
        ):
            group = pd.DataFrame(group).sort_values(by="step")
            look = {"color": colour, "marker": marker, "linestyle": dashes, "capsize": 2, "markersize": 4.5}
            ax.errorbar(group.step, group.relative, 2 * group.relative_se, **look, label=f"r = {r}, {to} moment")
    ax.set(xlabel="step", ylabel="overlap / noise floor, above chance", title="Gradient subspaces", ylim=(-0.05, 1.08))
    ax.axhline(0, color="#7F7F7F", linewidth=0.8, linestyle=":")
    ax.axhline(1, color="#000000", linewidth=0.8)
    ax.legend(frameon=False, fontsize=8, loc="lower right")


def _exported(ax: Axes, model: str, export: pd.DataFrame) -> None:
    """Loss that truncation adds against numbers of the factors over those of the matrices; bars are Student intervals over sequences."""
    for by, group in export.groupby("by", sort=False):
        colour, marker, dashes = LOOKS[str(by)]
        group = pd.DataFrame(group).sort_values(by="numbers_share")
        look = {"color": colour, "marker": marker, "linestyle": dashes, "capsize": 2, "markersize": 5}
        bars = half(group, "loss_minus_whole")
        ax.errorbar(group.numbers_share, group.loss_minus_whole, bars, **look, label=str(by).replace("_", " "))
    ax.axhline(0, color="#000000", linewidth=0.8)
    ax.axvline(1, color="#7F7F7F", linewidth=0.8, linestyle=":")
    ax.set(xlabel="Σ r(m+n) / Σ mn", ylabel="loss minus that of the whole model (nats)", title=f"Truncated matrices: {model}")
    ax.legend(frameon=False)


def _bytes(ax: Axes, kinds: Frames) -> None:
    """Loss that an export adds against its bytes over those of the whole model."""
    for place, (model, export) in enumerate(kinds["export"].groupby("model", sort=False)):
        for by, group in export.groupby("by", sort=False):
            colour, marker, dashes = LOOKS[str(by)]
            group = group.assign(share=group.bytes / group.bytes_dense).sort_values(by="share")
            look = {"color": colour, "marker": marker, "linestyle": dashes, "capsize": 2, "markersize": 5}
            look |= {"markerfacecolor": "white" if place else colour, "label": f"{model}, {str(by).replace('_', ' ')}"}
            ax.errorbar(group.share, group.exported_minus_whole, half(group, "exported_minus_whole"), **look)
    ax.axhline(0, color="#000000", linewidth=0.8)
    ax.margins(y=0.08)
    ax.set_yscale("symlog", linthresh=LINEAR)
    ax.set(xlabel="bytes / those of the whole model", ylabel="loss minus that of the whole model (nats)", title="Exported")
    ax.legend(frameon=False, fontsize=8)


def _differences(ax: Axes, kinds: Frames) -> None:
    """Loss minus that of uniform ranks, paired by seed, with 95 % intervals."""
    ax.set(title="Loss minus uniform, paired, 95 %", xlabel="nats")
    if "paired" not in kinds:
        ax.text(0.5, 0.5, "not compared", transform=ax.transAxes, ha="center")
        return
    rows = page.records(pd.DataFrame(kinds["paired"][kinds["paired"]["of"] == "loss"]))
    for place, row in enumerate(rows):
        colour, marker, _ = LOOKS[row["label"]]
        bar = [[row["difference"] - row["low"]], [row["high"] - row["difference"]]]
        ax.errorbar([row["difference"]], [place], xerr=bar, fmt=marker, color=colour, capsize=3, markersize=6)
    ax.axvline(0, color="#000000", linewidth=0.8)
    ax.set_yticks(range(len(rows)), [f"{row['task']}:\n{row['label']}" for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
