"""What redraws do to the training loss, under each policy of Adam's second moment; and what GradInit found: rows of a comparison as tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.pages import comparisons
from experiments.pages.page import many, records
from experiments.publish import RESULTS

SPIKES = ("second-moment", "second-moment-carried")  # comparisons that measure them
FIGURE = "second-moment.svg"


def merged(kinds: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """One row a contender: its spike, the same midway, and its loss, each a mean over the seeds with its standard error (of spikes: over all redraws
    of all seeds); spike and loss minus those of the first contender, paired by seed, with Student's 95 % interval."""
    losses = {row["contender"]: row for row in comparisons.merged(kinds)}
    paired = {name: {row["label"]: row for row in records(kinds[name])} for name in ("paired", "spike_paired")}
    rows = []
    for label, group in kinds["spike"].groupby("label", sort=False):
        means = {name: float(group[name].to_numpy().mean()) for name in ("spike", "midway")}
        errors = {f"{name} error": _together(group[f"{name}_error"].to_numpy()) for name in means}
        one = {"label": label, **means, **errors, "redraws": int(group.spikes.sum()), "lr": losses[label]["lr"]}
        one |= {"loss": losses[label]["loss"], "loss error": losses[label]["error"]}
        for name, pair in (("loss", paired["paired"].get(label)), ("spike", paired["spike_paired"].get(label))):
            one |= {f"{name} {key}": math.nan if pair is None else pair[key] for key in ("difference", "low", "high")}
        rows.append(one)
    return rows


def _together(errors: np.ndarray) -> float:
    """Of the mean of independent means, from their standard errors."""
    return float(np.sqrt((errors**2).sum()) / len(errors))


def spikes(name: str, results: Path = RESULTS) -> str:
    """For the results, as Markdown."""
    kinds = comparisons.committed(name, results)
    if not kinds:
        return "not yet run"
    config = json.loads((results / "compare" / f"{name}.json").read_text(encoding="utf-8"))["config"]
    rows = merged(kinds)
    first = rows[0]["label"].split(" ")[-1]
    window = config["spike_steps"]
    lines = [
        f"LLaMA `{config['model']}`, LowRank-IPA ({config['law'][0]}), {config['steps']} steps of {config['sequences']} × {config['length']} tokens, "
        f"r/n = {config['rank'][0]:g}, K = {config['refresh_every'][0]}, `state={config['state']}`, {many(config['seed'], 'seed')}, "
        f"{rows[0]['redraws']} redraws in all; learning rate from {len(config['lr'])} on {config['tune_steps']} steps. Spike: largest training loss "
        f"of the {window} steps after a redraw minus the mean of the {window} before, ± standard error over redraws; midway: half a period later.",
        "",
        f"| second moment | lr | spike | midway | spike minus `{first}` [95 %] | held-out loss | loss minus `{first}` [95 %] |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        against = [
            ""
            if math.isnan(row[f"{of} difference"])
            else f"{row[f'{of} difference']:+.3f} [{row[f'{of} low']:+.3f}, {row[f'{of} high']:+.3f}]"
            for of in ("spike", "loss")
        ]
        lines.append(
            f"| `{row['label'].split(' ')[-1]}` | {row['lr']:g} | {row['spike']:.3f} ± {row['spike error']:.3f} | "
            f"{row['midway']:.3f} ± {row['midway error']:.3f} | {against[0]} | {row['loss']:.3f} ± {row['loss error']:.3f} | {against[1]} |"
        )
    return "\n".join(lines)


def initial(name: str, results: Path = RESULTS) -> str:
    """For the results: held-out losses as of any comparison, and the virtual step that the scales were chosen by."""
    kinds = comparisons.committed(name, results)
    if not kinds:
        return "not yet run"
    lines = [
        comparisons.differences(name, results),
        "",
        "| contender | scales | loss after a virtual step, plain | scaled | difference |",
        "|---|---|---|---|---|",
    ]
    for label, group in kinds["init"].groupby("label", sort=False):
        error = _together(group.standard_error.to_numpy())
        lines.append(
            f"| {label} | {group.smallest.min():.2f} … {group.largest.max():.2f} | {group.before.mean():.4f} | {group.after.mean():.4f} | "
            f"{(group.after - group.before).mean():+.4f} ± {error:.4f} |"
        )
    return "\n".join(lines)
