"""The figure of a scaling law: the losses it was fitted to, and tokens saved or lost against full AdamW, inside the runs and extrapolated."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.pages.figures import colour, marker, style
from theory.scaling import ScalingLaw

REFERENCE = "adamw"
MOST = 100.0  # tokens saved or lost beyond which a value is an arrow
APART = 0.11  # places of a size from one method to the next, so that bars do not hide one another
SIDE = 1.05  # the same of losses: a factor of the tokens they are drawn at
CAPTION = (
    "Left: mean held-out loss over seeds, bars ±1 standard error, lines the fitted law; methods stand side by side around their tokens. "
    "Right: tokens that full AdamW needs for a method's loss "
    "over the method's own, above 1 saved, below 1 lost; bars are 95 % bootstrap intervals (an arrow: beyond the axis), crosses the same ratio "
    "between AdamW's own runs, without a law. Filled markers: at the largest number of tokens of a size. Open markers on grey: extrapolated."
)


def scaling(kinds: Mapping[str, pd.DataFrame]) -> Figure:
    """``kinds``: the rows ``point``, ``parameter``, ``quality`` and ``tokens`` of one run."""
    style()
    points, saved = kinds["point"], kinds.get("tokens", pd.DataFrame())
    law = law_of(kinds["parameter"], chosen(kinds["quality"]))
    sizes = list(dict.fromkeys(points.sort_values("weights").model))
    wide = [1.0] * len(sizes) + ([0.45 * saved.model.nunique()] if len(saved) else [])
    figure, axes = plt.subplots(1, len(wide), figsize=(3.0 * sum(wide), 3.9), width_ratios=wide, squeeze=False)
    for ax, model in zip(axes[0], sizes, strict=False):
        _losses(ax, pd.DataFrame(points[points.model == model]), law, str(model))
    finite = points.loss[np.isfinite(points.loss)]
    margin = 0.05 * (finite.max() - finite.min())
    for ax in axes[0][: len(sizes)]:
        ax.set_ylim(finite.min() - margin, finite.max() + margin)
    axes[0][0].set_ylabel("held-out loss (nats/token)")
    for ax in axes[0][1 : len(sizes)]:
        ax.tick_params(labelleft=False)
    if len(saved):
        _saved(axes[0][-1], saved)
    figure.tight_layout()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.02), frameon=False, ncols=len(labels))
    return figure


def chosen(quality: pd.DataFrame) -> str:
    """The variant of the law that tokens are reported of."""
    return str(quality.loc[quality.chosen.astype(bool), "variant"].iloc[0])


def law_of(parameters: pd.DataFrame, variant: str) -> ScalingLaw:
    """The law in the rows ``parameter`` of one variant."""
    mine = pd.DataFrame(parameters[parameters.variant == variant]).fillna({"label": ""})
    values: dict[str, dict[str, float]] = {"": {}, "rho_N": {}, "rho_D": {}}
    for name, label, value in zip(mine["name"], mine["label"], mine["value"], strict=True):
        values[name if label else ""][label or name] = float(value)
    return ScalingLaw(
        **{**dict.fromkeys(("E", "A", "B", "alpha", "beta"), 0.0), **values[""]}, rho_N=values["rho_N"], rho_D=values["rho_D"]
    )


def _losses(ax: Axes, points: pd.DataFrame, law: ScalingLaw, model: str) -> None:
    D = np.geomspace(points.tokens.min(), points.tokens.max(), 60)
    N = float(points.weights.iloc[0])
    everyone = list(dict.fromkeys(points.label))
    for k, (label, group) in enumerate(points.groupby("label", sort=False)):
        name = str(label)
        seeds = group[np.isfinite(group.loss)].groupby("tokens").loss.agg(["mean", "std", "count"])
        ax.errorbar(
            seeds.index * SIDE ** (k - (len(everyone) - 1) / 2),
            seeds["mean"],
            seeds["std"] / np.sqrt(seeds["count"]),
            fmt=marker(name),
            color=colour(name),
            markersize=4.5,
            capsize=2,
            label=name,
        )
        if law.B:
            ax.plot(D, law.loss(N, D, name), color=colour(name), linewidth=1.0)
    ax.set(xscale="log", xlabel="training tokens D", title=f"{model}: {N / 1e6:.2g} M weights")
    ticks = sorted(points.tokens.unique())
    ax.set_xticks(ticks, [amount(tick) for tick in ticks])
    ax.minorticks_off()


def _saved(ax: Axes, rows: pd.DataFrame) -> None:
    """The largest D of every size, then the extrapolated sizes on grey."""
    last = rows.loc[rows.groupby(["model", "label"], sort=False).tokens.idxmax()]
    places = last.drop_duplicates("model").sort_values(["extrapolated", "weights"])
    at = {str(model): i for i, model in enumerate(places.model)}
    names = [str(label) for label in dict.fromkeys(rows.label) if label != REFERENCE]
    others = last[last.label != REFERENCE]
    values = np.concatenate([others[name].to_numpy(dtype=float) for name in ("saved", "interpolated")])
    values = values[(values >= 1 / MOST) & (values <= MOST)]  # an extrapolation can be beyond all measure; not so what was seen
    low, high = min([0.1, *values / 2]), max([10.0, *values * 2])
    ax.set(yscale="log", ylim=(low, high), ylabel="tokens of full AdamW / own tokens")
    for k, name in enumerate(names):
        for row in last[last.label == name].to_dict("records"):
            x = at[str(row["model"])] + APART * (k - (len(names) - 1) / 2)
            bar = [min(max(row[bound], low), high) for bound in ("saved_low", "saved_high")]
            ax.plot([x, x], bar, color=colour(name), linewidth=1.1)
            for bound, end, arrow in (("saved_low", low, "v"), ("saved_high", high, "^")):
                if not low <= row[bound] <= high:
                    ax.plot([x], [end], marker=arrow, color=colour(name), markersize=4, clip_on=False)
            if low <= row["saved"] <= high:
                ax.plot(
                    [x],
                    [row["saved"]],
                    marker(name),
                    color=colour(name),
                    markersize=5.5,
                    markerfacecolor="white" if row["extrapolated"] else colour(name),
                )
            if math.isfinite(row["interpolated"]):
                ax.plot([x], [row["interpolated"]], "x", color="#000000", markersize=4)
    ax.axhline(1, color=colour(REFERENCE), linestyle="--", linewidth=1.1)
    beyond = [at[str(model)] for model in places.model[places.extrapolated.astype(bool)]]
    if beyond:
        ax.axvspan(min(beyond) - 0.5, max(beyond) + 0.5, color="#DDDDDD", zorder=0)
        ax.text(sum(beyond) / len(beyond), high / 1.12, "extrapolated", ha="center", va="top", style="italic")
    ax.set_xticks(range(len(at)), [f"{model}\nD = {amount(D)}" for model, D in zip(places.model, places.tokens, strict=True)])
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set(title="tokens saved (above 1) or lost", xlim=(-0.5, len(at) - 0.5))


def amount(tokens: float) -> str:
    """Tokens in k, M, B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{letter}"
    return f"{tokens:g}"
