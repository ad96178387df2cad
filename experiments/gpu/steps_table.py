"""The table of ``experiments.gpu.steps`` and what it decides."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.pages.page import records
from experiments.publish import RESULTS

FILE = RESULTS / "gpu" / "steps.csv"
AT_LEAST = {
    "utilisation": 0.45,
    "step": 0.9,
    "batch": 1.5,
}  # full AdamW at 350M; LowRank-IPA over it at 100M and above; its largest batch at 1B


def table(file: Path = FILE) -> str:
    """As Markdown, with the targets; "not yet run" without results."""
    if not file.exists():
        return "not yet run"
    rows = pd.read_csv(file)
    lines = ["| model | batch | contender | step over full AdamW | tokens/s | utilisation | sequences |", "|---|---|---|---|---|---|---|"]
    for row in records(rows):
        if row["status"] != "done":
            lines.append(f"| {row['model']} | {row['batch']} | `{row['contender']}` | {row['error']} | | | |")
            continue
        over = float(row.get("ratio", math.nan))
        ratio = "" if math.isnan(over) else f"{over:.2f}×"
        lines.append(
            f"| {row['model']} | {row['batch']} | `{row['contender']}` | {ratio} | {row['tokens_per_second']:,.0f} | "
            f"{100 * row['utilisation']:.0f} % | {_sequences(row)} |"
        )
    return "\n".join([*lines, "", *verdicts(rows)])


def verdicts(rows: pd.DataFrame) -> list[str]:
    """Each target that the rows can decide, and whether it holds."""
    done = rows[rows.status == "done"].set_index(["model", "batch", "contender"])
    told = []
    if ("350m", "equal", "adamw") in done.index:
        best = max(float(done.utilisation[key]) for key in [("350m", "equal", "adamw"), ("350m", "largest", "adamw")] if key in done.index)
        told.append(_told("full AdamW at 350m, utilisation", best, AT_LEAST["utilisation"], best >= AT_LEAST["utilisation"], "at least"))
    for model in ("100m", "350m", "1b"):
        if (model, "equal", "haar_stiefel") in done.index:
            ratio = float(done.ratio[model, "equal", "haar_stiefel"])
            told.append(
                _told(f"Haar–Stiefel at {model}, step over full AdamW", ratio, AT_LEAST["step"], ratio <= AT_LEAST["step"], "at most")
            )
    keys = [("1b", "largest", "haar_stiefel"), ("1b", "largest", "adamw")]
    if all(key in done.index for key in keys):
        (least, most), (peer_least, peer_most) = (_between(done.loc[key].to_dict()) for key in keys)
        low, high = least / peer_most, most / peer_least
        what = "Haar–Stiefel at 1b, largest batch over full AdamW's"
        if low >= AT_LEAST["batch"] or high < AT_LEAST["batch"]:
            told.append(_told(what, low, AT_LEAST["batch"], low >= AT_LEAST["batch"], "at least", high))
        else:
            told.append(f"- {what}: between {low:.2f} and {high:.2f}, at least {AT_LEAST['batch']:g}: not decided.")
    return told


def _between(row: dict[Any, Any]) -> tuple[float, float]:
    """The least and the most that the largest batch can be: what was measured, and one less than what did not fit."""
    bound = row.get("bound")
    return float(row["sequences"]), math.inf if bound is None or math.isnan(bound) else float(bound) - 1


def _sequences(row: dict[Any, Any]) -> str:
    least, most = _between(row)
    if row["batch"] == "equal" or least == most:
        return f"{least:.0f}"
    return f"at least {least:.0f}" if math.isinf(most) else f"{least:.0f}–{most:.0f}"


def _told(what: str, value: float, limit: float, holds: bool, side: str, most: float | None = None) -> str:
    shown = f"{value:.2f}" if most is None or most == value else f"between {value:.2f} and {most:.2f}"
    return f"- {what}: {shown}, {side} {limit:g}: {'holds' if holds else 'missed'}."
