"""The file of ``experiments.gpu.steps``: one JSON line a cell or size that was tried, the later one counts; and the search for a size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import runs

CLOSE = 0.03  # of the largest batch: how far apart what fits and what does not may stay


def measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of cells, without those of sizes that were tried."""
    return [row for row in rows if row["batch"] != "probe"]


def read(out: Path) -> list[dict[str, Any]]:
    """The rows of ``out``, the last of each cell; a last line that was cut short is dropped. Raises ``WrongInput`` for anything else."""
    lines = out.read_text(encoding="utf-8", errors="replace").splitlines() if out.exists() else []
    rows: list[dict[str, Any]] = []
    for place, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if place == len(lines) and line.startswith("{"):
                break
            row = None
        if not isinstance(row, dict) or not {"model", "batch", "contender", "status", "took"} <= set(row):
            raise runs.WrongInput(f"{out}: line {place} is no row of this command")
        rows.append(row)
    return latest(rows)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Model, batch, contender, and of a size that was tried the size."""
    return row["model"], row["batch"], row["contender"], row["sequences"] if row["batch"] == "probe" else None


def latest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last row of each cell."""
    return list({key(row): row for row in rows}.values())


def keep(out: Path, rows: list[dict[str, Any]]) -> None:
    """Rewrite ``out`` with these rows if it holds anything else."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if out.exists() and out.read_text(encoding="utf-8", errors="replace") != text:
        part = out.with_suffix(f"{out.suffix}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(out)


def largest(fits: Callable[[int], bool], limit: int, start: int = 1) -> tuple[int, int | None]:
    """(the largest size up to ``limit`` seen to fit, 0 if none; the smallest seen not to, None if ``limit`` fits), one apart or ``CLOSE``.

    ``start``: tried first. Fitting is taken to be monotone.
    """
    low, high, size = 0, None, min(start, limit)
    while low < limit and (high is None or high - low > max(1, CLOSE * low)):
        if fits(size):
            low = size
        else:
            high = size
        size = min(2 * low, limit) if high is None else (high // 2 if low == 0 else (low + high) // 2)
    return low, high
