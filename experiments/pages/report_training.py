"""Sections of the report on training runs, on their comparison, and on time and memory."""

from __future__ import annotations

import html
import math
from typing import Any

import pandas as pd

from experiments import runs
from experiments.pages import comparisons, figures_bench, figures_training, footprints, summary
from experiments.pages.page import details_block, factored, figure, records, table, verdict
from theory.memory import CATEGORIES

BYTES = (*CATEGORIES, "total", "payload", "wire", "predicted", "measured", "fake", "allocated")  # of the rows of memory


def pretrain(run: runs.Run, rows: list[dict[str, Any]]) -> str:
    """One training run: losses, costs, and the law in use as it was measured live."""
    kinds = _kinds(rows)
    live = kinds.get("live", pd.DataFrame())
    facts = run.read("facts.json")
    (end,) = records(kinds["end"])
    last = records(kinds["eval"])[-1]
    summary = {
        "held-out loss": last["loss"],
        "perplexity": last["perplexity"],
        "tokens/s": end["tokens_per_second"],
        "MFU": f"{100 * end['model_flops_utilisation']:.0f} %",
        "peak MiB": end["peak_bytes"] / 2**20,
        "optimizer state MiB": end["state_bytes"] / 2**20,
        "touched": f"{100 * facts['touched_share']:.1f} %",
        "skipped steps": end["skipped"],
        "epochs": end["epochs"],
        "measuring": f"{100 * end['measuring_share']:.2f} %",
    }
    law = run.config["law"] if run.config["method"] == "lowrank" else run.config["method"]
    text = table([summary]) + figure(
        lambda: figures_training.run(kinds["train"], kinds["eval"], law), "Losses on this corpus are not C4 perplexities."
    )
    if len(live):
        text += "<h3>The law in use</h3>" + figure(
            lambda: figures_training.live(pd.DataFrame(live[live.layer == "all"])),
            "Predicted: exact error of the law at the moments of this gradient. Realised: that of the V in use; the two have one mean while "
            "V is independent of the gradient, as it is just after a draw.",
        )
        shown = ["layer", "signal", "noise", "predicted", "realised", "captured", "noise_scale_tokens"]
        text += details_block(
            "Every layer at the last measurement", table(records(pd.DataFrame(live[live.step == live.step.max()][shown])))
        )
    return text


def compare(run: runs.Run, rows: list[dict[str, Any]]) -> str:
    """The comparison: final losses, paired differences, curves, and what was tuned."""
    kinds = _kinds(rows)
    trial = kinds["trial"]
    found = comparisons.merged(kinds)
    costed = "cost" in kinds
    losses = [
        {
            "contender": row["contender"],
            "held-out loss": row["loss"],
            "± SE": row["error"],
            "minus AdamW": row["difference"],
            "95 % interval": "" if math.isnan(row["low"]) else f"{row['low']:+.3f} … {row['high']:+.3f}",
            "seeds": row["seeds"],
            "learning rate": row["lr"],
            "c or scale": row["knob"],
            "at the edge of the grid": "yes" if row["at edge"] else "no",
            "state MiB": row["state MiB"],
        }
        | (
            {
                "peak MiB": row["peak MiB"],
                "step s": row["step"],
                "update s": row["update"],
                "refresh s": row["refresh"],
                "amortised s": row["seconds"],
                "/ AdamW": row["over adamw"],
            }
            if costed
            else {}
        )
        | {"touched": "" if math.isnan(row["touched"]) else f"{100 * row['touched']:.1f} %"}
        for row in found
    ]
    text = (
        f"<p>{run.config['model']}, {run.config['steps']} steps of {run.config['sequences']} × {run.config['length']} tokens. Learning rate and "
        f"c (or LoRA's scale) were chosen for each contender on {run.config['tune_steps']} steps with a seed of their own, with equally many "
        "trials. Losses on this corpus are not C4 perplexities.</p>" + table(losses)
    )
    if costed:
        text += figure(
            lambda: figures_training.pareto(found, {cost: comparisons.front(found, cost) for cost in comparisons.AXES}, comparisons.AXES),
            "Lower left is better; the line joins those that no other beats in loss at an equal or smaller cost, and these are named. Bars: ±1 "
            "standard error over seeds. Times are of steps made in turn, one contender after the other; peaks are the allocator's.",
        )
    if "curve" in kinds:
        text += figure(lambda: figures_training.curves(kinds["curve"]), "Bars: ±1 standard error over seeds.")
    if "paired" in kinds:
        for reference in dict.fromkeys(kinds["paired"].reference):
            caption = "Student intervals over seeds; one that contains 0 shows no difference at this number of seeds."
            text += figure(lambda reference=reference: figures_training.differences(kinds["paired"], str(reference)), caption)
        text += details_block("Paired differences", table(records(kinds["paired"].drop(columns="kind"))))
    return text + details_block("Tuning", table(records(trial.drop(columns="kind"))))


def bench(run: runs.Run, rows: list[dict[str, Any]]) -> str:
    """Ratios to the named peer, one table a group."""
    judged = [row for row in rows if "holds" in row]
    titles = {
        "machine": "What the machine does a second: operations, bytes, normal numbers",
        "sampling": "Drawing V; share: of what the machine's limits allow",
        "measure": "100 000 draws of the estimator's moments, over a loop",
        "layer": "One layer, forward and backward, over nn.Linear",
        "step": "One optimizer step, over full AdamW",
        "memory": "Bytes saved for the backward pass by the linear layers of the blocks, over nn.Linear",
        "refresh": "What a redraw costs",
        "growth": "How the cost grows; predicted: by operations",
        "start": "Until the command answers and the package is imported, over import torch",
        "optimizer": "Updates of the optimizers in a frame alone",
        "live": "A step that is measured live, over one that is not; share: of a run that measures one step in 100",
    }
    text = verdict(sum(row["holds"] for row in judged), len(judged), f"targets at r/n = {run.config['rank']:g}")
    for kind, title in titles.items():
        mine = [{key: value for key, value in row.items() if key != "kind"} for row in rows if row["kind"] == kind]
        if mine:
            text += f"<h3>{title}</h3>" + factored(mine)
    if any("ratio_q1" in row for row in rows):
        text += figure(lambda: figures_bench.ratios(rows), "Medians and quartiles over the named peer; a bar is what was to be reached.")
    if any(row["kind"] == "growth" for row in rows):
        text += figure(
            lambda: figures_bench.growth(rows), "Measured (points) and predicted by operations (lines), over the first point of each."
        )
    return text


def memory(rows: list[dict[str, Any]]) -> str:
    """Predicted bytes of a step, bytes sent, and measured peaks where there are some."""
    titles = {
        "memory": "Predicted peak of a step on one device",
        "communication": "Sent in a step",
        "measured": "Predicted and measured",
        **footprints.KINDS,
    }
    text = ""
    for kind, title in titles.items():
        mine = [row for row in rows if row["kind"] == kind]
        if not mine:
            continue
        text += f"<h3>{title}</h3>"
        if kind == "footprint":  # in MiB, as on the terminal
            first = mine[0]
            text += f"<p>{first['model']}, batch {first['sequences']} × {first['length']} tokens, {first['precision']}.</p>"
            text += table(footprints.lines(mine))
        else:
            text += factored([{key: _size(key, value) for key, value in row.items() if key != "kind"} for row in mine])
        if kind == "target":
            text += "".join(f"<p>{html.escape(footprints.verdict(row))}.</p>" for row in mine)
    return text


def _size(name: str, value: Any) -> Any:
    return summary.binary(value) if name in BYTES and value is not None else value


def _kinds(rows: list[dict[str, Any]]) -> dict[str, pd.DataFrame]:
    return {kind: pd.DataFrame([row for row in rows if row["kind"] == kind]) for kind in dict.fromkeys(row["kind"] for row in rows)}
