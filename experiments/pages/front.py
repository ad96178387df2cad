"""The picture of the front page: every law beside its exact error on real gradients, and in one training comparison; from committed results.

``python -m experiments.pages.front`` draws docs/estimators.svg; a test fails when it and the results disagree.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from estimators import LAWS
from experiments.pages.figures import colour, marker, style, svg
from experiments.publish import RESULTS, committed

FILE = Path(__file__).parents[2] / "docs" / "estimators.svg"
ASIDE = 1.06  # factor of r/n between the points of two laws that stand side by side
NEAR = 0.9  # exact errors that differ by less can hardly be told apart
RATIO = 0.25
DECADES = (2, 5, 10, 20, 50, 100, 200)
FULL = "adamw"


def drawn(results: Path = RESULTS) -> Figure:
    """Left: E‖ĜVVᵀ − g‖²/‖g‖² of every law against r/n, exact and measured, and below measured over exact; right: losses of ``compare/tiny``."""
    style()
    errors = committed("validate/tiny-model", results)
    figure = plt.figure(figsize=(11.4, 5.4))
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 1.25), width_ratios=(1.25, 1), wspace=0.86, hspace=0.12)
    above = figure.add_subplot(grid[0, 0])
    below = figure.add_subplot(grid[1, 0], sharex=above)
    _errors(above, below, errors)
    _losses(figure.add_subplot(grid[:, 1]), committed("compare/tiny-final", results))
    return figure


def _errors(above: Axes, below: Axes, errors: pd.DataFrame) -> None:
    """The largest error first. Points of laws whose exact errors are nearly one stand side by side around the r/n where all of them were measured,
    below the points of all laws; bars are two standard errors."""
    middle = errors[errors.ratio == RATIO].set_index("law").predicted.loc[list(LAWS)].sort_values(ascending=False)
    rows_of_equals = (middle / middle.shift() < NEAR).cumsum()
    below.axhline(0, color="#000000", linewidth=0.9)
    for place, law in enumerate(map(str, middle.index)):
        rows = pd.DataFrame(errors[errors.law == law]).sort_values(by="ratio")
        exact, measured, error = (rows[name] / rows.signal_norm2 for name in ("predicted", "measured", "standard_error"))
        equals = list(rows_of_equals.index[rows_of_equals == rows_of_equals[law]])
        look = {"fmt": marker(law), "color": colour(law), "markersize": 4.5, "capsize": 1.5, "linewidth": 0.9}
        above.plot(rows.ratio, exact, color=colour(law), linewidth=1.1)
        aside = rows.ratio * ASIDE ** (equals.index(law) - (len(equals) - 1) / 2)
        above.errorbar(aside, measured, 2 * error, **look, label=f"{law}{'' if LAWS[law].unbiased else ' (biased)'}")
        aside = rows.ratio * ASIDE ** (place - (len(LAWS) - 1) / 2)
        below.errorbar(aside, 100 * (measured / exact - 1), 200 * error / exact, **look)
    ticks = sorted(errors.ratio.unique())
    above.set(xscale="log", yscale="log", ylabel="E‖ĜVVᵀ − g‖² / ‖g‖²", title="Error of one estimate: exact (lines), measured (points)")
    above.set_yticks(DECADES, [f"{tick:g}" for tick in DECADES])
    above.tick_params(labelbottom=False)
    above.minorticks_off()
    above.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    below.set(xlabel="r/n", ylabel="deviation, %")
    below.set_xticks(ticks, [f"1/{1 / tick:g}" for tick in ticks])
    below.minorticks_off()


def _losses(ax: Axes, finals: pd.DataFrame) -> None:
    """One line a contender, the lowest loss on top: every seed, their mean and its standard error."""
    seeds = finals.groupby("label").loss
    mean, error = seeds.mean().sort_values(), seeds.std() / np.sqrt(seeds.count())
    for place, label in enumerate(mean.index):
        name = str(label)
        losses = finals[finals.label == label].loss
        ax.plot(losses, np.full(len(losses), place), "|", color=colour(name), markersize=9, alpha=0.6)
        ax.errorbar(mean[label], place, xerr=error[label], fmt=marker(name), color=colour(name), markersize=6.5, capsize=3)
    ax.axvline(mean[FULL], color=colour(FULL), linestyle="--", linewidth=1)
    ax.set_yticks(range(len(mean)), [f"{name} (full)" if name == FULL else str(name) for name in mean.index])
    ax.invert_yaxis()
    ax.set(xlabel="held-out loss (nats/token)", title="In training, r/n = 1/4, and baselines")
    ax.grid(axis="y", visible=False)


if __name__ == "__main__":
    FILE.write_text(svg(drawn()) + "\n", encoding="utf-8")
