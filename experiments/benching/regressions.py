"""Rows of a bench that are slower than in an earlier one by more than the spread of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments import runs

LEAST = 0.05  # relative; below it nothing is called a regression, however narrow the quartiles


def load(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``bench.json``, or of the run directory that it lies in. Raises ``WrongInput`` for anything else."""
    file = path / "bench.json" if path.is_dir() else path
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise runs.WrongInput(f"--compare {path}: not the bench.json of a finished bench ({type(error).__name__})") from None
    return [dict(row) for row in rows]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two rows the same measurement."""
    return tuple(row.get(name) for name in ("kind", "name", "over", "shape", "value"))


def found(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row of kind ``regression`` for each ratio to its peer that got worse: its lower quartile is above the upper quartile of before, and its
    median by LEAST above that median. Ratios, because seconds of another day are of another machine."""
    before = {key(row): row for row in old if "ratio_q3" in row}
    worse = []
    for row in (row for row in new if "ratio_q1" in row):
        was = before.get(key(row))
        if was and row["ratio_q1"] > was["ratio_q3"] and row["ratio"] > (1 + LEAST) * was["ratio"]:
            same = {name: row.get(name) for name in ("name", "over", "shape", "value") if row.get(name) is not None}
            sizes = {"ratio": row["ratio"], "before": was["ratio"], "slower": row["ratio"] / was["ratio"]}
            worse.append({"kind": "regression", "group": row["kind"], **same, **sizes, "holds": False})
    return worse
