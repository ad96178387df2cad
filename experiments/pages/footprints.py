"""Tables of ``lowrank memory measure``: bytes of a step by category for every method, for the terminal, the report and the READMEs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.pages.page import records
from experiments.publish import RESULTS
from experiments.training.faked import CATEGORIES

FULL = "adamw"  # whom peaks are compared with
HEADS = {"projector": "projector, residual"}
KINDS = {  # kinds of rows → what they are
    "footprint": "Peak of a plain step by category, MiB; at a change: peak of the steps in which V, a frame or a turn changes",
    "target": "Targets, over full AdamW with the same batch",
    "agreement": "Fake tensors beside the allocator",
    "not_run": "Not run",
}
CLASSIFIER, LLAMAS = "roberta-large", ("60m", "130m", "350m", "1b", "7b")


def lines(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One a method: MiB by category, the peak, and over that of full AdamW where it is there."""
    full = next((row["total"] for row in rows if row["name"] == FULL), None)
    told = []
    for row in rows:
        sizes = {HEADS.get(name, name): f"{row[name] / 2**20:,.0f}" for name in CATEGORIES}
        over = {} if full is None else {"/ AdamW": f"{row['total'] / full:.2f}×"}
        told.append(
            {
                "method": row["name"],
                **sizes,
                "peak MiB": f"{row['total'] / 2**20:,.0f}",
                **over,
                "at a change": "" if pd.isna(row["change"]) else f"{row['change'] / 2**20:,.0f}",
            }
        )
    return told


def verdict(row: dict[str, Any]) -> str:
    """Whether a target holds, and what the peak is made of."""
    says = "holds" if row["holds"] in (True, "True") else "missed"
    reference = row.get("reference", FULL)  # earlier results were all of full AdamW
    whom = "full AdamW" if reference == FULL else f"full {reference.replace('adamw', 'AdamW,')}"
    return f"{row['name']}: {row['ratio']:.2f}× of {whom}, at most {row['target']:.2f}×: {says}; {row['of']}"


def markdown(results: Path = RESULTS) -> str:
    """RoBERTa-large by category, the targets, and how far fake and real peaks differ where both were seen."""
    kinds = _committed(CLASSIFIER, results)
    if "footprint" not in kinds:
        return "not yet run"
    rows = records(kinds["footprint"])
    text = [f"{CLASSIFIER}, {_setting(rows[0], CLASSIFIER, results)}; MiB, on fake tensors.", ""]
    told = lines(rows)
    text += [f"| {' | '.join(told[0])} |", f"|{'---|' * len(told[0])}"]
    text += [f"| `{name}` | {' | '.join(cells)} |" for name, *cells in (line.values() for line in told)]
    text += _missing(kinds)
    if "target" in kinds:
        text += [
            "",
            "Targets, with the shares of the reference's peak that make up each:",
            "",
            *(f"- {verdict(row)}." for row in records(kinds["target"])),
        ]
    files = sorted((results / "memory").glob("measure-*-agreement.csv"))
    if files:
        seen = pd.concat([pd.read_csv(file) for file in files])
        text += [
            "",
            f"Where both were seen, the peak on fake tensors is {seen.ratio.min():.3f} to {seen.ratio.max():.3f} of the allocator's: "
            f"{len(seen)} peaks of {seen['name'].nunique()} methods, {' and '.join(dict.fromkeys(seen.model))}, "
            f"{' and '.join(dict.fromkeys(seen.device))}.",
        ]
    return "\n".join(text)


def llamas(results: Path = RESULTS) -> str:
    """Peaks of every method on the LLaMA sizes, GiB, and over full AdamW's."""
    found = {model: _committed(model, results) for model in LLAMAS}
    found = {model: kinds for model, kinds in found.items() if "footprint" in kinds}
    if not found:
        return "not yet run"
    text = [f"LLaMA-{model.upper()}: not yet run." for model in LLAMAS if model not in found]
    peaks: dict[str, dict[str, str]] = {}
    for model, kinds in found.items():
        rows = records(kinds["footprint"])
        text.append(f"LLaMA-{model.upper()}: {_setting(rows[0], model, results)}.")
        full = next(row["total"] for row in rows if row["name"] == FULL)
        for row in rows:
            peaks.setdefault(row["name"], {})[model] = f"{row['total'] / 2**30:,.2f} ({row['total'] / full:.2f}×)"
    text += ["", f"| method | {' | '.join(found)} |", f"|{'---|' * (len(found) + 1)}"]
    text += [f"| `{name}` | {' | '.join(mine.get(model, 'not run') for model in found)} |" for name, mine in peaks.items()]
    for kinds in found.values():
        text += _missing(kinds)
    return "\n".join(text)


def _committed(model: str, results: Path) -> dict[str, pd.DataFrame]:
    files = {kind: results / "memory" / f"measure-{model}-{kind}.csv" for kind in KINDS}
    return {kind: pd.read_csv(file) for kind, file in files.items() if file.exists()}


def _setting(row: dict[Any, Any], model: str, results: Path) -> str:
    config = json.loads((results / "memory" / f"measure-{model}.json").read_text(encoding="utf-8"))["config"]
    return f"batch {row['sequences']} × {row['length']} tokens, {row['precision']}, r/n = {config['rank']:g}"


def _missing(kinds: dict[str, pd.DataFrame]) -> list[str]:
    return (
        ["", *(f"- `{row['name']}` on {row['model']} was not run: {row['why']}" for row in records(kinds["not_run"]))]
        if "not_run" in kinds
        else []
    )
