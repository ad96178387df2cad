"""The table of whole steps, small and on a CPU: every contender, the search for the largest batch, going on, and what decides a target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from experiments.gpu import steps
from experiments.gpu.steps import Settings

SMALL = Settings(
    models=("tiny",), contenders=("adamw", "haar_stiefel", "galore", "lora"), sequences=2, length=16, largest=3, repeats=5,
    precision="fp32", compile=False, device="cpu",
)  # fmt: skip


@pytest.mark.parametrize(
    ("room", "found"), [(0, 0), (1, 1), (2, 2), (3, 3), (5, 5), (7, 7), (9, 8), (11, 10), (15, 14), (100, 32), (31, 28)]
)
def test_the_largest_batch_is_found_to_a_quarter_of_a_power_of_two(room: int, found: int) -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= room

    assert steps.largest(fits, 32) == found and found <= room
    assert max(asked) <= 32 and len(asked) <= 10


def test_cells_are_measured_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "steps.jsonl"
    assert steps.work(SMALL, out, minutes=-1) == []
    rows = steps.work(SMALL, out, minutes=9)
    assert [(row["model"], row["batch"], row["contender"]) for row in rows] == steps.plan(SMALL)
    assert all(row["status"] == "done" and row["seconds"] > 0 and row["utilisation"] > 0 for row in rows), rows
    assert {row["sequences"] for row in rows if row["batch"] == "equal"} == {2} and {
        row["sequences"] for row in rows if row["batch"] == "largest"
    } == {3}
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    monkeypatch.setattr(steps, "at_equal_batch", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(steps, "at_largest_batch", lambda *_: pytest.fail("measured again"))
    assert steps.work(SMALL, out, minutes=9) == rows


def test_what_does_not_fit_or_is_not_installed_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(steps, "prepared", full)
    rows = steps.work(SMALL, tmp_path / "steps.jsonl", minutes=9)
    assert {row["error"] for row in rows} == {"OutOfMemoryError: CUDA out of memory.", "OutOfMemoryError: not one sequence fits"}
    pd.DataFrame(rows).to_csv(tmp_path / "steps.csv", index=False)
    assert "not one sequence fits" in steps.table(tmp_path / "steps.csv")


def row(model: str, batch: str, contender: str, **values: Any) -> dict[str, Any]:
    same = {"status": "done", "ratio": 1.0, "tokens_per_second": 1e5, "utilisation": 0.5, "sequences": 16, "error": ""}
    return {"model": model, "batch": batch, "contender": contender} | same | values


def test_targets_are_decided_by_their_rows(tmp_path: Path) -> None:
    assert steps.table(tmp_path / "none.csv") == "not yet run"
    rows = [
        row("350m", "equal", "adamw", utilisation=0.40),
        row("350m", "largest", "adamw", utilisation=0.46),
        row("100m", "equal", "haar_stiefel", ratio=0.85),
        row("350m", "equal", "haar_stiefel", ratio=0.95),
        row("1b", "largest", "adamw", sequences=10),
        row("1b", "largest", "haar_stiefel", sequences=14),
    ]
    assert steps.verdicts(pd.DataFrame(rows)) == [
        "- full AdamW at 350m, utilisation: 0.46, at least 0.45: holds.",
        "- Haar–Stiefel at 100m, step over full AdamW: 0.85, at most 0.9: holds.",
        "- Haar–Stiefel at 350m, step over full AdamW: 0.95, at most 0.9: missed.",
        "- Haar–Stiefel at 1b, largest batch over full AdamW's: 1.40, at least 1.5: missed.",
    ]
    assert steps.verdicts(pd.DataFrame(rows[:1]))[0].endswith("missed.")


def test_a_device_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steps.main(["--out", str(tmp_path / "a"), "--device", "nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
