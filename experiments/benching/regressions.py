"""Rows of a bench that are slower, or larger, than in an earlier one by more than the spread of both."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from experiments import runs

LEAST = 0.05  # relative; below it nothing is called a regression, however narrow the quartiles
ANYHOW = ("runs_dir", "quiet", "compare", "repeats", "group", "question")  # fields that may differ between what is compared
SAME = ("kind", "name", "over", "shape", "value")  # what makes two rows the same measurement
COUNTS = ("memory",)  # kinds whose ratios are of bytes and have no spread; a time without one cannot be judged


def load(path: Path, config: Any) -> list[dict[str, Any]]:
    """Rows of a ``bench.json``, or of the run directory that it lies in. Raises ``WrongInput`` for anything else, and for a bench of another
    configuration than ``config``, or of another device or number of threads than these."""
    file = path / "bench.json" if path.is_dir() else path
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        rows, theirs = [dict(row) for row in told["rows"]], dict(told["config"]) | {"device": told["environment"]["device"]}
        for row in rows:
            hash(key(row))
            [float(row[name]) for name in ("ratio", "ratio_q1", "ratio_q3") if row.get(name) is not None]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise runs.WrongInput(f"--compare {path}: not the bench.json of a finished bench ({type(error).__name__})") from None
    mine = runs.plain(config) | {"device": runs.environment()["device"]}
    for name in (name for name in mine if name not in ANYHOW):
        if theirs.get(name) != mine[name]:
            raise runs.WrongInput(f"--compare {path}: that bench had {name}={theirs.get(name)!r}, this one has {mine[name]!r}")
    return rows


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Of two rows that may be compared."""
    return tuple(row.get(name) for name in SAME)


def found(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row of kind ``regression`` for each ratio to its peer that got worse: its lower quartile is above the upper quartile of before, and its
    median by LEAST above that median. Ratios, because seconds of another day are of another machine."""
    before = {key(row): row for row in old if _ratio(row, "ratio") is not None}
    worse = []
    for row in new:
        was, ratio = before.get(key(row)), _ratio(row, "ratio")
        if was is None or ratio is None:
            continue
        then, count = (_ratio(was, "ratio") or 0.0), row["kind"] in COUNTS
        low, high = (ratio, then) if count else (_ratio(row, "ratio_q1"), _ratio(was, "ratio_q3"))
        if low is not None and high is not None and low > high and ratio > (1 + LEAST) * then:
            same = {name: row[name] for name in SAME[1:] if row.get(name) is not None}
            worse.append(
                {"kind": "regression", "group": row["kind"], **same, "ratio": ratio, "before": then, "slower": ratio / then, "holds": False}
            )
    return worse


def _ratio(row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    return None if value is None or math.isnan(float(value)) else float(value)
