"""Comparisons in training as tables: losses with their paired differences, and what each contender costs; for the report and the READMEs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.pages.nature import nature
from experiments.pages.page import many, records
from experiments.publish import RESULTS, committed_kinds

FULL = "adamw"  # whom costs and losses are compared with
COSTED = ("optimizers", "9m-optimizers", "60m-optimizers", "130m-optimizers")  # comparisons that say what contenders cost
KINDS = ("final", "paired", "trial", "cost", "init", "spike", "spike_paired")
AXES = {  # of the Pareto figure: column of a merged row → what it is called
    "state MiB": "optimizer state (MiB)",
    "peak MiB": "peak of a step (MiB)",
    "seconds": "seconds of a step, refreshes shared out",
}


def committed(name: str, results: Path = RESULTS) -> dict[str, pd.DataFrame]:
    """The rows of a committed comparison by kind; nothing if it was not run. Peaks of whole runs stay only where an allocator counted them: on a CPU
    they are those of a process that trained others before."""
    found = committed_kinds(f"compare/{name}", KINDS, results)
    if found and json.loads((results / "compare" / f"{name}.json").read_text(encoding="utf-8"))["environment"]["device"].startswith("cpu"):
        found["final"] = found["final"].drop(columns="peak_bytes", errors="ignore")
    return found


def merged(kinds: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """One row a contender: loss over its seeds, and what it costs where that was measured; numbers."""
    final, trial = kinds["final"], kinds["trial"]
    edges = set(trial[trial.chosen.astype(bool) & trial.at_edge.astype(bool)].label)
    costs = {row["label"]: row for row in records(kinds["cost"])} if "cost" in kinds else {}
    against = {row["label"]: row for row in records(kinds["paired"]) if row["reference"] == FULL} if "paired" in kinds else {}
    rows = []
    for label, group in final.groupby("label", sort=False):
        n, first = len(group), group.iloc[0]
        paired, spent = against.get(label, {}), costs.get(label, {})
        state, peak = (spent.get(name, group[name].median() if name in group else math.nan) for name in ("state_bytes", "peak_bytes"))
        rows.append(
            {
                "contender": label,
                "loss": float(group.loss.mean()),
                "error": float(group.loss.std(ddof=1) / n**0.5) if n > 1 else math.nan,
                "seeds": n,
                "lr": float(first.lr),
                "knob": first.c if pd.notna(first.c) else first.lora_scale,
                "at edge": label in edges,
                "difference": paired.get("difference", math.nan),
                "low": paired.get("low", math.nan),
                "high": paired.get("high", math.nan),
                "state MiB": float(state) / 2**20,
                "peak MiB": float(peak) / 2**20,
                "step": spent.get("step", math.nan),
                "update": spent.get("update", math.nan),
                "refresh": spent.get("refresh", math.nan),
                "seconds": spent.get("amortised", math.nan),
                "over adamw": spent.get("over_adamw", math.nan),
                "touched": group.touched_share.iloc[0] if "touched_share" in group else math.nan,
            }
        )
    return rows


def front(rows: list[dict[str, Any]], cost: str) -> list[dict[str, Any]]:
    """The rows that no other beats in loss at an equal or smaller ``cost``, from the cheapest to the lowest loss."""
    kept: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row[cost], row["loss"])):
        if math.isfinite(row["loss"]) and (not kept or row["loss"] < kept[-1]["loss"]):
            kept.append(row)
    return kept


def trained(results: Path = RESULTS) -> str:
    """For the README: held-out loss of the committed comparison on tiny, and the paired difference to full AdamW."""
    kinds = committed("tiny", results)
    final = kinds["final"].groupby("label").first()
    against = kinds["paired"][kinds["paired"].reference == FULL].set_index("label")
    config = json.loads((results / "compare" / "tiny.json").read_text(encoding="utf-8"))["config"]
    lines = [
        f"Held-out loss (nats/token) of a LLaMA of {int(final.parameters.iloc[0]):,} weights after {config['steps']} steps of "
        f"{config['sequences']} × {config['length']} tokens of the default corpus, r/n = {config['rank'][0]:g}, "
        f"K = {config['refresh_every'][0]}: mean ± standard error over {many(config['seed'], 'seed')}. "
        f"Learning rate and c (LoRA: its scale) were chosen for each row by equally many runs of {config['tune_steps']} "
        f"steps. The methods differ in {100 * final.touched_share.max():.0f} % of the weights; embeddings, head and norms train in full everywhere. "
        "These are not C4 perplexities.",
        "",
        "| method | held-out loss | minus full AdamW | trained numbers | optimizer state | learning rate | c or scale |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in merged(kinds):
        label = row["contender"]
        difference = "" if label == FULL else f"{row['difference']:+.3f} ± {against.standard_error[label]:.3f}"
        lines.append(
            f"| `{label}` | {row['loss']:.3f} ± {row['error']:.3f} | {difference} | {int(final.trained_parameters[label]):,} | "
            f"{row['state MiB']:.1f} MiB | {row['lr']:g} | {_number(row['knob'])} |"
        )
    return "\n".join(lines)


def differences(name: str, results: Path = RESULTS) -> str:
    """For the results: chosen learning rate and knob, loss, and all paired differences with Student's 95 % interval."""
    kinds = committed(name, results)
    if not kinds:
        return "not yet run"
    lines = ["| contender | lr | c or scale | held-out loss | paired with: difference [95 % interval] |", "|---|---|---|---|---|"]
    for row in merged(kinds):
        pairs = records(pd.DataFrame(kinds["paired"][kinds["paired"].label == row["contender"]]))
        told = "; ".join("{reference}: {difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**pair) for pair in pairs)
        lines.append(f"| {row['contender']} | {_rate(row)} | {_number(row['knob'])} | {row['loss']:.3f} ± {row['error']:.3f} | {told} |")
    return "\n".join(lines)


def costs(name: str, results: Path = RESULTS) -> str:
    """For the READMEs: loss beside what it costs, lowest loss first; a star is on the front of loss against state, peak or time."""
    kinds = committed(name, results)
    if not kinds:
        return "not yet run"
    told = json.loads((results / "compare" / f"{name}.json").read_text(encoding="utf-8"))
    config, rows = told["config"], merged(kinds)
    costed = "times side by side" if "cost" in kinds else "peaks of whole runs" if "peak_bytes" in kinds["final"] else "costs not measured"
    fronts = {cost: {row["contender"] for row in front(rows, cost)} for cost in AXES}
    star = lambda row, cost: "*" if row["contender"] in fronts[cost] else ""  # noqa: E731
    lines = [
        f"LLaMA `{config['model']}`, {config['steps']} steps of {config['sequences']} × {config['length']} tokens, r/n = {config['rank'][0]:g}, "
        f"K = {config['refresh_every'][0]}, {many(config['seed'], 'seed')}, {config['trials']} learning rates tried for each on "
        f"{config['tune_steps']} steps; {costed}, {told['environment']['device']}.",
        "",
        "| method | gradient | lr | held-out loss | minus AdamW [95 % interval] | state MiB | peak MiB | step s | refresh s | amortised / AdamW |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["loss"]):
        versus = "" if row["contender"] == FULL else f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        step, refresh = ("" if pd.isna(row[name]) else f"{row[name]:.3f}" for name in ("step", "refresh"))
        peak = "" if pd.isna(row["peak MiB"]) else f"{row['peak MiB']:.1f}{star(row, 'peak MiB')}"
        over = "" if pd.isna(row["over adamw"]) else f"{row['over adamw']:.2f}{star(row, 'seconds')}"
        lines.append(
            f"| `{row['contender']}` | {nature(row['contender'])} | {_rate(row)} | {row['loss']:.3f} ± {row['error']:.3f} | {versus} | "
            f"{row['state MiB']:.2f}{star(row, 'state MiB')} | {peak} | {step} | {refresh} | {over} |"
        )
    return "\n".join(lines)


def _rate(row: dict[str, Any]) -> str:
    return f"{row['lr']:g}{' (edge)' if row['at edge'] else ''}"


def _number(value: float) -> str:
    return "" if pd.isna(value) else f"{value:g}"
