"""The table of the kernels: bytes, operations, the floor they give, and times beside plain and compiled versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from experiments.pages.page import records
from experiments.publish import RESULTS

NOT_YET = "not yet run"
SHAPE = ("T", "batch", "m", "n", "r")


def markdown(results: Path = RESULTS) -> str:
    """From ``results``/gpu/kernels.csv, or that it was not yet run."""
    file = results / "gpu" / "kernels.csv"
    if not file.exists():
        return NOT_YET
    rows = records(pd.read_csv(file))
    done = [row for row in rows if row["status"] == "done"]
    lines = []
    if done:
        first = done[0]
        lines += [
            f"Device: {', '.join(sorted({str(row['device']) for row in done}))}; a copy moves {first['bandwidth'] / 1e12:.2f} TB/s, "
            f"products do {first['fp32_flops'] / 1e12:.0f} (float32) and {first['bf16_flops'] / 1e12:.0f} (bfloat16) · 10¹² operations "
            "a second. "
            f"Times in µs, median of {first['repeats']:.0f} rounds in turn; ratios, with quartiles: the kernel over the compiled plain version and "
            "over what training does today; faster: than both.",
            "",
        ]
    lines += [
        "| kernel | shape | dtype | MB | G operations | floor | kernel | of the floor | plain | compiled | today | over compiled | over today | "
        "faster |",
        "|" + "---|" * 14,
    ]
    lines += [_line(row) for row in rows]
    return "\n".join(lines)


def _line(row: dict[Any, Any]) -> str:
    shape = " × ".join(f"{row[name]:.0f}" for name in SHAPE if name in row and not pd.isna(row[name]))
    cells = [f"`{row['kernel']}`", shape, str(row["dtype"])]
    if row["status"] != "done":
        return f"| {' | '.join([*cells, str(row['status']), *[''] * 10])} |"
    operations = (row["products"] + row["others"]) / 1e9
    cells += [
        f"{row['bytes'] / 1e6:.1f}",
        f"{operations:.2f}",
        _micro(row["floor"]),
        _micro(row["kernel_seconds"]),
        f"{row['of_floor']:.0%}",
    ]
    cells += [_micro(row["plain_seconds"]), _micro(row["compiled_seconds"]), _micro(row.get("today_seconds", float("nan")))]
    cells += [_over(row, "ratio"), _over(row, "today_ratio"), "yes" if row["holds"] in (True, "True") else "no"]
    return f"| {' | '.join(cells)} |"


def _over(row: dict[Any, Any], name: str) -> str:
    return "" if pd.isna(row.get(name, float("nan"))) else f"{row[name]:.2f} ({row[f'{name}_q1']:.2f}–{row[f'{name}_q3']:.2f})"


def _micro(seconds: float) -> str:
    return "" if pd.isna(seconds) else f"{1e6 * seconds:.1f}"
