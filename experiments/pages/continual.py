"""Tasks in sequence as a table and a figure: average accuracy, forgetting, and every task after every task; for the report and the guides."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import runs
from experiments.pages.figures import colour, legend, marker, style
from experiments.pages.page import figure, records, table
from experiments.publish import RESULTS, committed_kinds

COMMITTED = ("minilm",)  # what `lowrank continual` alone does
KINDS = ("trial", "accuracy", "final", "paired")
LOOK = {
    "lowrank": "haar_stiefel",
    "gorp": "gaussian",
    "protected": "coordinate",
    "joint": "top_svd",
}  # whose colour and marker a method has
DASHES = ("-", "--", ":", "-.")
ASIDE = 0.05  # between the points of two methods after the same task


def merged(kinds: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """One row a method, the highest average accuracy first: means over seeds with standard errors, differences, and sizes."""
    trial = kinds["trial"]
    edges = set(trial[trial.chosen.astype(bool) & trial.at_edge.astype(bool)].label)
    found = []
    for label, group in kinds["final"].groupby("label", sort=False):
        row: dict[str, Any] = {"method": str(label), "seeds": len(group), "lr": float(group.lr.iloc[0]), "at edge": label in edges}
        for name in ("average", "forgetting", "transfer"):
            values = group[name].to_numpy(float)
            row |= {name: float(values.mean()), f"{name} ±": error(values)}
        for name in ("trained_parameters", "state_bytes", "basis_bytes", "protected_share", "seconds"):
            row[name] = float(np.median(group[name])) if name in group else math.nan
        row["differences"] = _differences(kinds, str(label))
        found.append(row)
    return sorted(found, key=lambda row: -row["average"])


def _differences(kinds: dict[str, pd.DataFrame], label: str) -> dict[tuple[str, str], tuple[float, float]]:
    """(measure, reference) → (paired difference, its standard error)."""
    rows = records(kinds["paired"]) if "paired" in kinds else []
    mine = [row for row in rows if row["label"] == label]
    return {(row["measure"], row["reference"]): (row["difference"], row["standard_error"]) for row in mine}


def error(values: Any) -> float:
    """Standard error of the mean; NaN for one value."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan


def near(mean: float, deviation: float, sign: str = "") -> str:
    """Per cent with the standard error; nothing where there is no number."""
    if math.isnan(mean):
        return ""
    return f"{100 * mean:{sign}.1f}" + ("" if math.isnan(deviation) else f" ± {100 * deviation:.1f}")


def _difference(row: dict[str, Any], measure: str, reference: str) -> str:
    mean, deviation = row["differences"].get((measure, reference), (math.nan, math.nan))
    return near(mean, deviation, "+")


def lines(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """As text, one column a measure."""
    pairs = list(dict.fromkeys(pair for row in rows for pair in row["differences"] if pair[0] != "transfer"))
    words = {"average": "ACC", "forgetting": "F"}
    return [
        {
            "method": row["method"],
            "ACC %": near(row["average"], row["average ±"]),
            "F %": near(row["forgetting"], row["forgetting ±"]),
            "BWT %": near(row["transfer"], row["transfer ±"], "+"),
            **{f"{words[of]} − {to}": _difference(row, of, to) for of, to in pairs},
            "learning rate": f"{row['lr']:g}" + (" (edge)" if row["at edge"] else ""),
            "trained": f"{row['trained_parameters'] / 1e6:.2f} M",
            "state MiB": f"{row['state_bytes'] / 2**20:.1f}",
            "of it P MiB": f"{row['basis_bytes'] / 2**20:.1f}",
            "protected": f"{100 * row['protected_share']:.0f} %",
            "seconds": f"{row['seconds']:.0f}",
        }
        for row in rows
    ]


def asked(config: dict[str, Any]) -> str:
    """What was learnt, in some sentences."""
    return (
        f"{config['model']} on {', '.join(Path(name).stem for name in config['task'])}, in this order: {config['examples']} examples a task, "
        f"{config['steps']} steps of {config['sequences']} texts of at most {config['length']} tokens each, r = {config['rank']}, "
        f"K = {config['refresh_every']}, ε = {config['energy']:g}; {len(config['seed'])} seeds, {config['trials']} learning rates tried for each "
        "(edge: the best was the smallest or largest). ACC: mean accuracy over the tasks after the last; F: how far it lies below the best before; "
        "BWT: what it gained since a task was learnt. ± one standard error over seeds, of differences in pairs of equal seed. State: of the "
        "optimizer, P included; protected: share of the input dimensions of a layer that P takes in the end. Seconds of learning."
    )


def drawn(kinds: dict[str, pd.DataFrame], tasks: Sequence[str]) -> Figure:
    """Accuracy on each task after each task, one panel a task, and average accuracy against forgetting; bars are one standard error."""
    style()
    figure, panels = plt.subplots(1, len(tasks) + 1, figsize=(2.7 * len(tasks) + 3.2, 3.1), width_ratios=[1] * len(tasks) + [1.15])
    labels = list(dict.fromkeys(kinds["final"].label))
    for place, (ax, name) in enumerate(zip(panels, tasks, strict=False)):
        _after(ax, kinds["accuracy"], place, labels, len(tasks))
        ax.set(title=Path(name).stem, xlabel="after task")
    limits = [limit for ax in panels[:-1] for limit in ax.get_ylim()]
    for ax in panels[:-1]:
        ax.set_ylim(min(limits), max(limits))
        ax.tick_params(labelleft=ax is panels[0])
    panels[0].set_ylabel("test accuracy, %")
    for label, look in _looks(labels):
        group = pd.DataFrame(kinds["final"][kinds["final"].label == label])
        F, ACC = (100 * np.asarray(group[name], float) for name in ("forgetting", "average"))
        if np.isnan(F).any():  # learnt at once: nothing to forget
            panels[-1].axhline(ACC.mean(), color=look["color"], linestyle="--", linewidth=1, label=label)
        else:
            panels[-1].errorbar(F.mean(), ACC.mean(), xerr=error(F), yerr=error(ACC), **look, capsize=2, markersize=6, linestyle="")
    panels[-1].axvline(0, color="#000000", linewidth=0.8)
    panels[-1].set(xlabel="forgetting F, %", ylabel="average accuracy ACC, %", title="upper left is better")
    figure.tight_layout()
    legend(figure, panels[-1])
    return figure


def _looks(labels: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Of each method; those with another ε share its colour and marker and differ in how they are filled."""
    found = []
    for label in labels:
        method, _, energy = label.partition(":")
        name = LOOK.get(method, method)
        fill = {} if not energy or float(energy) >= 0.9 else {"markerfacecolor": "white"}
        found.append((label, {"fmt": marker(name), "color": colour(name), "label": label, **fill}))
    return found


def _after(ax: Axes, rows: pd.DataFrame, task: int, labels: Sequence[str], count: int) -> None:
    for place, (label, look) in enumerate(_looks(labels)):
        mine = pd.DataFrame(rows[(rows.label == label) & (rows.task == task)])
        found = {after: np.asarray(mine.accuracy[mine.after == after], float) for after in range(task, count)}
        points = [(after + 1, 100 * some.mean(), 100 * error(some)) for after, some in found.items() if len(some)]
        if points:
            x, y, bars = np.array(points).T
            aside = ASIDE * (place - (len(labels) - 1) / 2)
            ax.errorbar(x + aside, y, bars, **look, linestyle=DASHES[place % len(DASHES)], capsize=2, markersize=4.5, linewidth=1.1)
    ax.set_xlim(0.6, count + 0.4)
    ax.set_xticks(range(1, count + 1))


def section(run: runs.Run, rows: list[dict[str, Any]]) -> str:
    """For the report."""
    kinds = {kind: pd.DataFrame([row for row in rows if row["kind"] == kind]) for kind in KINDS if any(row["kind"] == kind for row in rows)}
    caption = "Bars: ±1 standard error over seeds. Test examples are the same for all; each task has a head of its own, which it keeps."
    drawing = figure(lambda: drawn(kinds, run.config["task"]), caption) if "accuracy" in kinds else ""
    return f"<p>{html.escape(asked(run.config))}</p>" + table(lines(merged(kinds))) + drawing


def one(rows: list[dict[str, Any]]) -> str:
    """For the report: a single sequence."""
    (end,) = (row for row in rows if row["kind"] == "end")
    names = ("after", "name", "part", "examples", "accuracy", "loss")
    scores = [{name: row[name] for name in names} for row in rows if row["kind"] == "accuracy"]
    return table(scores) + table([{name: value for name, value in end.items() if name != "kind"}])


def committed(name: str, results: Path = RESULTS) -> tuple[dict[str, pd.DataFrame], dict[str, Any]] | None:
    """Rows by kind and configuration of a committed comparison; None if it was not run."""
    kinds = committed_kinds(f"continual/{name}", KINDS, results)
    return (kinds, json.loads((results / "continual" / f"{name}.json").read_text(encoding="utf-8"))["config"]) if kinds else None


def markdown(name: str, results: Path = RESULTS) -> str:
    """For the guides."""
    if (found := committed(name, results)) is None:
        return "not yet run"
    kinds, config = found
    rows = lines(merged(kinds))
    head = list(rows[0])
    text = [asked(config), "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*text, *(f"| `{row['method']}` | {' | '.join(list(row.values())[1:])} |" for row in rows)])


def figure_of(name: str, results: Path = RESULTS) -> Figure | None:
    """The figure of a committed comparison; None if it is not there."""
    found = committed(name, results)
    return None if found is None else drawn(found[0], found[1]["task"])
