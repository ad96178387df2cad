"""The committed benches of primitives as Markdown: limits of the machine, targets, and how cost grows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.pages.page import records
from experiments.publish import RESULTS

GROUPS = {"sampling": "sampling", "measure": "measurement", "layer": "layer", "start": "start-up"}


def primitives(results: Path = RESULTS) -> str:
    """Rows over their peers and, where a limit of the machine is known for them, the share of it that they reach; then the curves of growth."""
    folder = results / "bench"
    if not (folder / "60m-primitives.json").exists():
        return "not yet run"
    told = json.loads((folder / "60m-primitives.json").read_text(encoding="utf-8"))
    text = [
        *(
            f"{told['environment']['device']}, {machine['groups']}: products {machine['gemm_per_second'] / 1e9:,.0f} GFLOP/s in float32, "
            f"{machine['gemm16_per_second'] / 1e9:,.0f} in bfloat16, copies {machine['copy_per_second'] / 1e9:,.1f} GB/s, normal numbers "
            f"{machine['normals_per_second'] / 1e6:,.0f} M/s."
            for machine in records(pd.read_csv(folder / "60m-primitives-machine.csv"))
        ),
        "",
        "| group | what | shape | over | ratio | quartiles | at most | seconds | of the limit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, name in GROUPS.items():
        text += [_line(name, row) for row in _rows(folder, kind) if row["name"] != "peer"]
    text += ["", *_said(_rows(folder, "sampling"), _rows(folder, "measure"))]
    curves = _rows(folder, "growth")
    text += ["", "| cost against | value: seconds over the first (operations over the first) |", "|---|---|"]
    for name in dict.fromkeys(row["name"] for row in curves):
        points = [row for row in curves if row["name"] == name]
        text.append(f"| {name} | " + ", ".join(f"{row['value']}: {row['ratio']:.2f} ({row['predicted']:.2f})" for row in points) + " |")
    return "\n".join(text)


def _said(drawn: list[dict[Any, Any]], measured: list[dict[Any, Any]]) -> list[str]:
    """What was missed, beside what the machine allows; and what one pass of Cholesky is worth."""
    own = [row["ratio"] for row in drawn if row["over"] == "its floor, measured"]
    qr = [row["ratio"] for row in drawn if row["over"] == "the floor of haar_stiefel"]
    single = {row["shape"]: row["ratio"] for row in drawn if (row["name"], row["over"]) == ("haar_stiefel", "torch.linalg.qr")}
    twice = [row["ratio"] / single[row["shape"]] for row in drawn if row["name"] == "haar_stiefel by two passes"]
    times, over, least = ([row[name] for row in measured] for name in ("seconds", "ratio", "floor_ratio"))
    beyond = sum(row["floor_ratio"] > row["target"] for row in measured)
    return [
        f"- Haar–Stiefel takes {_range(own)} times its floor (Z, its Gram matrix, a triangular solve), `torch.linalg.qr` with its Z {_range(qr)} "
        "times: nothing that does these three can be faster than it by more.",
        f"- A second pass of Cholesky makes a draw {_range(twice)} times as long.",
        f"- 100 000 draws take {_range(times)} s, {_range(over)} of a loop over single draws. At the machine's full rates they would take "
        f"{_range(least)} of it: a tenth is out of reach for {beyond} of {len(measured)} laws.",
    ]


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _rows(folder: Path, kind: str) -> list[dict[Any, Any]]:
    file = folder / f"60m-primitives-{kind}.csv"
    return [{key: value for key, value in row.items() if pd.notna(value)} for row in records(pd.read_csv(file))] if file.exists() else []


def asked(row: dict[Any, Any]) -> str:
    """The targets of a row, over its peer and in seconds, and which of them were missed."""
    told = []
    if "target" in row:
        told.append(f"{row['target']:g}×" + (" missed" if row.get("ratio_with_redraws", row["ratio"]) > row["target"] else ""))
    if "seconds_target" in row:
        told.append(f"{row['seconds_target']:g} s" + (" missed" if row["seconds"] > row["seconds_target"] else ""))
    return ", ".join(told)


def _line(group: str, row: dict[Any, Any]) -> str:
    spread = f"{row['ratio_q1']:.3g}–{row['ratio_q3']:.3g}" if "ratio_q1" in row else ""
    share = f"{100 * row['share']:.0f} %" if "share" in row else ""
    return (
        f"| {group} | `{row['name']}` | {row.get('shape', '')} | {row['over']} | {row['ratio']:.3g}× | {spread} | {asked(row)} | "
        f"{row['seconds']:.3g} | {share} |"
    )
