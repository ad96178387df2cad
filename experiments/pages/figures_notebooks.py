"""What the notebooks on laws draw more than once: exact lines under measured points, tails, matrices; and tables of measured beside exact.

Every function draws into axes it is given, in the look of ``figures``; a bar is ±2 standard errors wherever one is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from estimators import Estimate
from experiments.pages.figures import colour, marker
from experiments.validation.verdict import ROUNDING, student

DASHES = ("-", "--", ":", "-.")


def beside(what: str, seen: Estimate | None, exact: float, draws: float = np.inf) -> dict[str, float]:
    """Columns of a table: exact, measured, its standard error and z. ``draws``: independent values behind the error, when they are few."""
    if seen is None:
        raise ValueError(f"beside({what!r}): nothing was measured; measure(track_mean=True) also finds bias and variance")
    z = student((seen.value - exact) / np.hypot(seen.standard_error, ROUNDING * abs(exact)), draws)
    return {f"{what}, exact": exact, "measured": seen.value, "± SE": seen.standard_error, "z": z}


def exact_and_measured(ax: Axes, rows: pd.DataFrame, x: str, by: str = "law", colours: Mapping[Any, str] | None = None) -> None:
    """A line and points with bars for every value of ``by``, against column ``x``.

    ``rows``: columns x, by, theory, and estimate and standard_error, NaN where nothing was measured. ``colours``: where ``by`` is not a law;
    its values then also take turns in marker and dashes.
    """
    for place, (name, group) in enumerate(rows.groupby(by, sort=False)):
        group = pd.DataFrame(group).sort_values(by=[x])
        mine = colour(str(name)) if colours is None else colours[name]
        dashes = DASHES[place % len(DASHES)]
        ax.plot(group[x], group.theory, dashes, color=mine, linewidth=1.3)
        seen = group.dropna(subset=["estimate"])
        ax.errorbar(
            seen[x],
            seen.estimate,
            2 * seen.standard_error,
            fmt=marker(str(name)) if colours is None else "osD^vPX"[place % 7],
            color=mine,
            markersize=4.5,
            capsize=2,
            linestyle=dashes,
            linewidth=0,
            elinewidth=1,
            label=str(name),
        )


def tails(ax: Axes, errors: Mapping[str, np.ndarray], least: int = 5) -> None:
    """P(squared error > x) of each law, from its draws, down to where ``least`` draws are left; a marker at some probabilities."""
    for place, (name, values) in enumerate(errors.items()):
        y = np.geomspace(1, least / len(values), 300)  # as even on the axis as the curve is seen
        x = np.quantile(values, 1 - y, method="inverted_cdf")
        ax.plot(x, y, color=colour(name), linestyle=DASHES[place % len(DASHES)], linewidth=1.3)
        at = [int(np.argmin(np.abs(np.log(y) - np.log(level)))) for level in (0.5, 0.1, 0.01, 1e-3) if level >= y[-1]]
        ax.plot(x[at], y[at], linestyle="none", marker=marker(name), color=colour(name), markersize=4.5)
        ax.plot([], [], DASHES[place % len(DASHES)], marker=marker(name), color=colour(name), markersize=4.5, label=name)
    ax.set(yscale="log", ylim=(least / max(map(len, errors.values())), 1.3))


def quantiles(errors: Mapping[str, np.ndarray], levels: Sequence[float]) -> pd.DataFrame:
    """One line a law: quantiles of its draws, columns named by level."""
    table = {name: np.quantile(values, levels) for name, values in errors.items()}
    return pd.DataFrame.from_dict(table, orient="index", columns=[f"{100 * level:g} %" for level in levels]).rename_axis("law")


def matrices(rows: Mapping[str, Mapping[str, np.ndarray]], scales: Sequence[float]) -> Figure:
    """A grid of square matrices, name of row → title → values; colours run from −scale to scale of the row, white at 0."""
    titles = list(next(iter(rows.values())))
    figure, axes = plt.subplots(len(rows), len(titles), figsize=(1.55 * len(titles) + 1, 1.75 * len(rows)), squeeze=False)
    for line, (name, found), scale in zip(axes, rows.items(), scales, strict=True):
        images = [ax.imshow(found[title], cmap="PuOr", vmin=-scale, vmax=scale) for ax, title in zip(line, titles, strict=True)]
        for ax in line:
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=9)
        figure.colorbar(images[-1], ax=list(line), fraction=0.02, pad=0.01)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=9)
    return figure
