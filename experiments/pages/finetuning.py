"""Fine-tunings as a table and a figure: accuracy with its interval over seeds, beside peak memory and seconds; for the report and the README."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from experiments import runs
from experiments.comparison.outcomes import student
from experiments.pages.figures import style
from experiments.pages.nature import nature
from experiments.pages.page import figure, many, records, table
from experiments.publish import RESULTS, committed_kinds
from optimizers import ZEROTH_ORDER

# the first is what `lowrank finetune` alone does
COMMITTED = ("minilm-rotten-tomatoes", "smollm2", "instructions", "backward", "backward-instructions")
KINDS = ("trial", "tested", "paired", "peak")


def merged(kinds: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """One row a contender, the most accurate first (of responses the lowest loss): means over seeds, half of Student's 95 % interval, and costs."""
    trial, peaks = kinds["trial"], {row["label"]: row["peak_bytes"] for row in records(kinds["peak"])}
    edges = set(trial[trial.chosen.astype(bool) & trial.at_edge.astype(bool)].label)
    against = {row["label"]: row for row in records(kinds["paired"])} if "paired" in kinds else {}
    found = []
    reference = next((str(row["reference"]) for row in against.values()), "")
    for label, group in kinds["tested"].groupby("label", sort=False):
        found.append(
            {
                "method": str(label),
                "accuracy": float(group.accuracy.mean()),
                "accuracy ±": half(group.accuracy),
                "loss": float(group.loss.mean()),
                "loss ±": half(group.loss),
                "seeds": len(group),
                "reference": reference,
                **{name: against.get(label, {}).get(name, math.nan) for name in ("difference", "low", "high")},
                "learning rate": float(group.lr.iloc[0]),
                "at edge": label in edges,
                "state MiB": float(group.state_bytes.median()) / 2**20 if "state_bytes" in group else math.nan,
                "peak MiB": peaks.get(label, math.nan) / 2**20,
                "seconds": float(group.seconds.median()) if "seconds" in group else math.nan,
                "skipped": int(group.skipped.sum()) if "skipped" in group else 0,
            }
        )
    return sorted(found, key=lambda row: (-row["accuracy"], row["loss"]))


def half(values: pd.Series) -> float:
    """Of Student's 95 % interval of the mean; NaN for one value."""
    return float(student(len(values)) * values.std(ddof=1) / len(values) ** 0.5)


def _near(mean: float, half: float, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def lines(rows: list[dict[str, Any]], responses: bool) -> list[dict[str, str]]:
    """As text, one column a measure; ``responses``: by loss, of which accuracy is only a part."""
    told = []
    for row in sorted(rows, key=lambda row: row["loss"]) if responses else rows:
        difference = "" if math.isnan(row["difference"]) else f"{100 * row['difference']:+.1f}"
        interval = "" if math.isnan(row["low"]) else f" [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        told.append(
            {
                "method": row["method"],
                "gradient": nature(row["method"]),
                **(
                    {}
                    if responses
                    else {
                        "accuracy %": _near(100 * row["accuracy"], 100 * row["accuracy ±"], 1),
                        f"minus {row['reference']} [95 %]": difference + interval,
                    }
                ),
                "loss": _near(row["loss"], row["loss ±"], 3),
                "learning rate": f"{row['learning rate']:g}" + (" (edge)" if row["at edge"] else ""),
                "peak MiB": f"{row['peak MiB']:.0f}",
                "state MiB": f"{row['state MiB']:.1f}",
                "seconds": f"{row['seconds']:.0f}",
                "skipped": str(row["skipped"]),
            }
        )
    return told


def asked(config: dict[str, Any]) -> str:
    """What was trained, in a sentence or two."""
    responses = config["head"] == "response"
    size = f"{config['k']} examples" if responses else f"{config['k']} examples a class"
    forward = any(name.split(":")[0] in ZEROTH_ORDER for name in config["method"])
    return (
        f"{config['model']} on {Path(config['task']).stem}, {config['head']}, {size}, r = {config['rank']:g}, K = {config['refresh_every']}, "
        f"{config['steps']} steps of at most {config['sequences']} with gradients"
        + (f", {config['forward_steps']} of at most {config['forward_sequences']} with forward passes alone" if forward else "")
        + f"; {many(config['seed'], 'seed')}, {config['trials']} learning rates tried for each (edge: the "
        f"best was the smallest or largest); trained beside the matrices: {'all other weights' if config['others'] == 'all' else 'the head'}. "
        "± half of Student's 95 % interval over seeds; seconds of trainings that shared the cores."
    )


def drawn(rows: list[dict[str, Any]], responses: bool) -> Figure:
    """Accuracy (of responses: loss) with its interval, peak memory and seconds, one line a method, the best on top."""
    style()
    what = "loss" if responses else "accuracy"
    rows = sorted(rows, key=lambda row: row["loss"]) if responses else rows
    figure, panels = plt.subplots(1, 3, figsize=(9.6, 0.26 * len(rows) + 1.1), sharey=True)
    place = np.arange(len(rows))[::-1]
    colours = ["#D55E00" if row["method"].split(":")[0] in ZEROTH_ORDER else "#0072B2" for row in rows]
    for y, row, colour in zip(place, rows, colours, strict=True):
        panels[0].errorbar(row[what], y, xerr=[[row[f"{what} ±"]], [row[f"{what} ±"]]], fmt="o", color=colour, markersize=4, capsize=2)
        for ax, cost in ((panels[1], "peak MiB"), (panels[2], "seconds")):
            ax.plot(row[cost], y, "o", color=colour, markersize=4)
    panels[0].set_yticks(place, [row["method"] for row in rows])
    panels[0].set_xlabel("test loss (nats/token)" if responses else "test accuracy")
    panels[1].set_xlabel("peak of a step (MiB)")
    panels[2].set_xlabel("seconds of training")
    for ax in panels[1:]:
        ax.set_xlim(left=0)
    figure.tight_layout()
    return figure


def section(run: runs.Run, rows: list[dict[str, Any]]) -> str:
    """For the report."""
    kinds = {kind: pd.DataFrame([row for row in rows if row["kind"] == kind]) for kind in KINDS if any(row["kind"] == kind for row in rows)}
    found, responses = merged(kinds), run.config["head"] == "response"
    caption = (
        "Bars: Student's 95 % interval over seeds. Orange: forward passes alone. The peak is of a step with a new subspace, the model "
        "included; seconds are of trainings that shared the cores."
    )
    return f"<p>{html.escape(asked(run.config))}</p>" + table(lines(found, responses)) + figure(lambda: drawn(found, responses), caption)


def one(rows: list[dict[str, Any]]) -> str:
    """For the report: a single training."""
    (end,) = (row for row in rows if row["kind"] == "end")
    scores = [
        {"part": row["part"], "examples": row["examples"], "accuracy": row["accuracy"], "loss": row["loss"]}
        for row in rows
        if row["kind"] == "eval"
    ]
    return table(scores) + table([{name: end[name] for name in ("step", "seconds", "skipped", "trained_parameters")}])


def committed(name: str, results: Path = RESULTS) -> dict[str, pd.DataFrame]:
    """The rows of a committed comparison by kind; nothing if it was not run."""
    return committed_kinds(f"finetune/{name}", KINDS, results)


def markdown(name: str, results: Path = RESULTS) -> str:
    """For the READMEs."""
    kinds = committed(name, results)
    if not kinds:
        return "not yet run"
    told = json.loads((results / "finetune" / f"{name}.json").read_text(encoding="utf-8"))
    rows = lines(merged(kinds), told["config"]["head"] == "response")
    head = list(rows[0])
    text = [asked(told["config"]), "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*text, *(f"| `{row['method']}` | {' | '.join(list(row.values())[1:])} |" for row in rows)])


def figure_of(name: str, results: Path = RESULTS) -> Figure | None:
    """The figure of a committed comparison; None if it is not there."""
    kinds = committed(name, results)
    if not kinds:
        return None
    told = json.loads((results / "finetune" / f"{name}.json").read_text(encoding="utf-8"))
    return drawn(merged(kinds), told["config"]["head"] == "response")
