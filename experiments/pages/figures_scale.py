"""The figures of the committed comparisons: held-out loss against r/n, against K, for both c, and beside the baselines; and against what it costs.

``python -m experiments.pages.figures_scale`` draws experiments/results/compare/scale.svg, and NAME-pareto.svg of those that say what contenders
cost, second-moment.svg and coupling.svg, from the CSV files beside them; a test fails when they disagree. A panel whose comparison is not committed
says "not yet run".
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.pages import comparisons, continual, figures_ranking, figures_training, finetuning, lens, plan, ranking, redraws, stalling
from experiments.pages import scaling as scaling_law
from experiments.pages.figures import colour, marker, style, svg
from experiments.publish import RESULTS, committed_kinds

FIGURE = "scale.svg"


def scale(results: Path = RESULTS) -> Figure:
    """Bars are ±1 standard error over seeds; the dashed line is full AdamW."""
    style()
    figure, axes = plt.subplots(1, 4, figsize=(14.0, 3.9), sharey=True, width_ratios=(3, 3, 2.4, 2.4))
    _against(axes[0], _finals(results, "tiny-rank"), "rank", "r/n (K = 20)")
    _against(axes[1], _finals(results, "tiny-period"), "refresh_every", "K, steps between draws (r/n = 1/4)")
    _against(axes[2], _finals(results, "tiny-constant"), "c", "c (r/n = 1/4, K = 20)")
    _side_by_side(axes[3], _finals(results, "tiny"))
    axes[0].set_ylabel("held-out loss (nats/token)")
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.tight_layout()
    figure.legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def pareto(name: str, results: Path = RESULTS) -> Figure | None:
    """Loss against what was measured of its costs, for one comparison; None if it is not committed."""
    kinds = comparisons.committed(name, results)
    if not kinds:
        return None
    found = comparisons.merged(kinds)
    axes = {cost: said for cost, said in comparisons.AXES.items() if all(math.isfinite(row[cost]) for row in found)}
    return figures_training.pareto(found, {cost: comparisons.front(found, cost) for cost in axes}, axes)


def second_moment(results: Path = RESULTS) -> Figure | None:
    """Spikes and losses under each policy of the second moment, of the comparisons that are committed; None if none is."""
    found = {name: comparisons.committed(name, results) for name in redraws.SPIKES}
    panels = {name: redraws.merged(kinds) for name, kinds in found.items() if kinds}
    return figures_training.spikes(panels) if panels else None


def _finals(results: Path, name: str) -> pd.DataFrame | None:
    return committed_kinds(f"compare/{name}", ("final",), results).get("final")


def _against(ax: Axes, finals: pd.DataFrame | None, axis: str, label: str) -> None:
    ax.set_xlabel(label)
    if finals is None:
        ax.text(0.5, 0.5, "not yet run", transform=ax.transAxes, ha="center")
        return
    laws = finals.dropna(subset=["law"])
    for name, group in laws.groupby("law", sort=False):
        points = _summary(group, axis).sort_index()
        name, fmt = str(name), f"{marker(str(name))}-"
        ax.errorbar(points.index, points["mean"], points.error, fmt=fmt, color=colour(name), label=name, markersize=5, capsize=2)
    ax.set_xscale("log")
    ticks = sorted(laws[axis].unique())
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    _adamw(ax, finals)


def _side_by_side(ax: Axes, finals: pd.DataFrame | None) -> None:
    ax.set_xlabel("r/n = 1/4, K = 20")
    if finals is None:
        ax.text(0.5, 0.5, "not yet run", transform=ax.transAxes, ha="center")
        return
    _adamw(ax, finals)
    points = _summary(finals.query("method != 'adamw'"), "label")
    for place, (name, row) in enumerate(points.iterrows()):
        name = str(name)
        ax.errorbar([place], [row["mean"]], [row.error], fmt=marker(name), color=colour(name), markersize=6, capsize=3, label=name)
    ax.set_xticks(range(len(points)), list(points.index), rotation=60, ha="right")


def _summary(finals: pd.DataFrame, by: str) -> pd.DataFrame:
    """Mean and standard error of the loss, in the order of the rows."""
    seeds = finals.groupby(by, sort=False).agg(mean=("loss", "mean"), deviation=("loss", "std"), seeds=("loss", "count"))
    return seeds.assign(error=seeds.deviation / np.sqrt(seeds.seeds))


def _adamw(ax: Axes, finals: pd.DataFrame) -> None:
    full = finals.query("method == 'adamw'")
    if len(full):
        ax.axhline(full.loss.mean(), color=colour("adamw"), linestyle="--", linewidth=1.2, label="full AdamW")


if __name__ == "__main__":
    folder = RESULTS / "compare"
    drawn = {folder / FIGURE: scale()}
    drawn |= {folder / f"{name}-pareto.svg": figure for name in comparisons.COSTED if (figure := pareto(name)) is not None}
    drawn |= {
        RESULTS / "finetune" / f"{name}.svg": figure for name in finetuning.COMMITTED if (figure := finetuning.figure_of(name)) is not None
    }
    drawn |= {RESULTS / "lens" / f"{name}.svg": figure for name in lens.COMMITTED if (figure := lens.figure_of(name)) is not None}
    drawn |= {folder / "coupling.svg": stalling.figure()}
    if (figure := second_moment()) is not None:
        drawn[folder / redraws.FIGURE] = figure
    drawn |= {
        RESULTS / "scaling" / f"{name}.svg": figure for name in scaling_law.NAMES if (figure := scaling_law.figure_of(name)) is not None
    }
    if (figure := plan.drawn()) is not None:
        drawn[RESULTS / "plan" / plan.FIGURE] = figure
    drawn |= {
        RESULTS / "continual" / f"{name}.svg": figure for name in continual.COMMITTED if (figure := continual.figure_of(name)) is not None
    }
    if kinds := committed_kinds(f"ranks/{ranking.COMMITTED}", ranking.KINDS):
        drawn[RESULTS / "ranks" / figures_ranking.FIGURE] = figures_ranking.drawn(kinds)
    for file, figure in drawn.items():
        file.write_text(svg(figure) + "\n", encoding="utf-8")
