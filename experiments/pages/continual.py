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
from experiments.pages.finetuning import half
from experiments.pages.page import figure, many, records, table, uncorrected
from experiments.publish import RESULTS, committed_kinds

COMMITTED = ("minilm",)  # what `lowrank continual` alone does
MEASURES = ("average", "learned", "forgetting", "transfer")
WORDS = {"average": "ACC", "forgetting": "F"}  # those of which differences are shown
KINDS = ("trial", "accuracy", "final", "paired")
LOOK = {
    "lowrank": "haar_stiefel",
    "gorp": "rademacher",
    "protected": "coordinate",
    "joint": "top_svd",
}  # whose colour and marker a method has
DASHES = ("-", "--", ":", "-.")
ASIDE = 0.05  # between the points of two methods after the same task


def merged(kinds: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """One row a method, the highest average accuracy first: means over seeds, half of Student's 95 % interval, differences, and sizes. A seed that
    diverged counts in average accuracy alone."""
    trial = kinds["trial"]
    edges = set(trial[trial.chosen.astype(bool) & trial.at_edge.astype(bool)].label)
    found = []
    for label, group in kinds["final"].groupby("label", sort=False):
        row: dict[str, Any] = {"method": str(label), "seeds": len(group), "lr": float(group.lr.iloc[0]), "at edge": label in edges}
        row["diverged"] = int(group.seconds.isna().sum()) if "seconds" in group else len(group)
        for name in MEASURES:
            values = pd.Series(group[name].dropna(), dtype=float)
            row |= {name: float(np.mean(values)), f"{name} ±": half(values)}
        for name in ("chance", "trained_parameters", "state_bytes", "basis_bytes", "protected_share", "seconds"):
            row[name] = float(np.median(group[name])) if name in group else math.nan
        rows = records(kinds["paired"]) if "paired" in kinds else []
        row["differences"] = {(pair["measure"], pair["reference"]): pair for pair in rows if pair["label"] == label}
        found.append(row)
    return sorted(found, key=lambda row: -row["average"])


def joint(label: str) -> bool:
    """Whether all tasks are learnt at once: nothing is just learnt, nor forgotten."""
    return label.partition(":")[0] == "joint"


def error(values: Any) -> float:
    """Standard error of the mean; NaN for one value."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan


def near(mean: float, half: float, sign: str = "") -> str:
    """Per cent with half of its interval; nothing where there is no number."""
    if math.isnan(mean):
        return ""
    return f"{100 * mean:{sign}.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")


def between(pair: dict[str, Any] | None) -> str:
    """A paired difference in per cent with its interval; nothing where there is none."""
    if pair is None or math.isnan(pair["difference"]):
        return ""
    interval = "" if math.isnan(pair["low"]) else f" [{100 * pair['low']:+.1f}, {100 * pair['high']:+.1f}]"
    return f"{100 * pair['difference']:+.1f}{interval}"


def lines(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """As text, one column a measure."""
    pairs = list(dict.fromkeys(pair for row in rows for pair in row["differences"] if pair[0] in WORDS))
    return [
        {
            "method": row["method"],
            "ACC %": near(row["average"], row["average ±"]),
            "just learnt %": near(row["learned"], row["learned ±"])
            and f"{near(row['learned'], row['learned ±'])} ({100 * row['chance']:.1f})",
            "F %": near(row["forgetting"], row["forgetting ±"]),
            "BWT %": near(row["transfer"], row["transfer ±"], "+"),
            **{f"{WORDS[of]} − {to} [95 %]": between(row["differences"].get((of, to))) for of, to in pairs},
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
        f"K = {config['refresh_every']}, ε = {config['energy']:g}; {many(config['seed'], 'seed')}, {config['trials']} learning rates tried for each "
        "(edge: the best was the smallest or largest). ACC: mean accuracy over the tasks after the last; just learnt: mean over the tasks, each "
        "when it had just been learnt, and in brackets what one answer for all examples gets, chance; F: how far a task lies below its best "
        "before; BWT: what it gained since a task was learnt. ± half of Student's 95 % interval over seeds; differences in pairs of equal seed. "
        "State: of the optimizer, the most beside P in a task, and P after the last (V of `gorp` is in it; V of "
        "`lowrank`, a buffer of its layers, is not); protected: share of the input dimensions of a layer that this P takes. Seconds of learning."
    )


def findings(kinds: dict[str, pd.DataFrame]) -> list[str]:
    """What the rows say, a sentence each, computed from them."""
    rows = merged(kinds)
    told = [_above_chance(kinds["accuracy"])]
    if diverged := [f"`{row['method']}` ({row['diverged']} of {row['seeds']} seeds)" for row in rows if row["diverged"]]:
        told.append(f"diverged, with an accuracy of 0 in ACC and left out elsewhere: {', '.join(diverged)}")
    pairs = [(row["method"], *of, pair) for row in rows for of, pair in row["differences"].items() if of[0] in WORDS]
    # each pair of methods once
    pairs = [(a, of, b, pair) for place, (a, of, b, pair) in enumerate(pairs) if not any((b, of, a) == one[:3] for one in pairs[:place])]
    for of, word in WORDS.items():
        mine = [(a, b, pair) for a, what, b, pair in pairs if what == of]
        sure = [f"`{a}` − `{b}` {between(pair)}" for a, b, pair in mine if pair["low"] > 0 or pair["high"] < 0]
        told.append(f"{word}: of {len(mine)} differences {len(sure) or 'none'} ha{'s' if len(sure) < 2 else 've'} an interval without zero")
        told[-1] += f": {', '.join(sure)}" if sure else ""
    told.append(uncorrected(len(pairs)))
    if edges := [f"`{row['method']}`" for row in rows if row["at edge"]]:
        told.append(f"the best learning rate was the smallest or largest tried, so that others may be better: {', '.join(edges)}")
    return told


def _above_chance(rows: pd.DataFrame) -> str:
    """Who was not above chance on which task just after learning it."""
    just = pd.DataFrame(
        rows[[after == task and not joint(label) for after, task, label in zip(rows.after, rows.task, rows.label, strict=True)]]
    )
    missed: dict[str, list[str]] = {}
    for (label, name), group in just.assign(above=just.accuracy - just.chance).groupby(["label", "name"], sort=False).above:
        above, bar = float(np.mean(group)), half(group)
        if not above - bar > 0:
            missed.setdefault(f"`{label}`", []).append(f"{Path(str(name)).stem} ({near(above, bar, '+')})")
    said = "; ".join(f"{label} on {', '.join(names)}" for label, names in missed.items())
    if not said:
        return "just after learning, every method is above chance on every task: no interval of accuracy minus chance contains zero"
    return f"not told apart from chance just after learning, by accuracy minus chance, so that its forgetting there says little: {said}"


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
        F, ACC = (100 * group[name].dropna() for name in ("forgetting", "average"))
        if joint(label):
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
    said = [html.escape(line) for line in findings(kinds)] if "accuracy" in kinds else []
    told = f"<ul>{''.join(f'<li>{line}</li>' for line in said)}</ul>"
    return f"<p>{html.escape(asked(run.config))}</p>" + table(lines(merged(kinds))) + told + drawing


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
    text += [f"| `{row['method']}` | {' | '.join(list(row.values())[1:])} |" for row in rows]
    return "\n".join([*text, "", "What this run says:", "", *(f"- {line[0].upper()}{line[1:]}." for line in findings(kinds))])


def figure_of(name: str, results: Path = RESULTS) -> Figure | None:
    """The figure of a committed comparison; None if it is not there."""
    found = committed(name, results)
    return None if found is None else drawn(found[0], found[1]["task"])
