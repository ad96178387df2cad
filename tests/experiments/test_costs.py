"""What contenders of a comparison cost: steps, refreshes shared out, peaks; and who is on the front of loss against cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from experiments import compare, pretrain, publish, report
from experiments.comparison import costs, grid
from experiments.comparison.outcomes import Contender
from experiments.memory import setting
from experiments.pages import comparisons, summary
from experiments.training import models
from theory import memory

CPU = torch.device("cpu")


def one(method: str) -> Contender:
    return Contender(method, method, None, None, None, None)


def test_refreshes_are_shared_out() -> None:
    """Three plain steps of which one was held up, and two with a refresh of 2 and of 4 seconds."""
    times = [(1.0, 0.25, False), (3.0, 1.0, True), (1.0, 0.25, False), (7.0, 5.0, False), (5.0, 3.0, True)]
    row = costs._row(one("galore"), times, 10)
    assert (row["step"], row["update"], row["refresh"], row["period"]) == (1.0, 0.25, 3.0, 10)
    assert row["amortised"] == pytest.approx(1.0 + 3.0 / 10)
    every = costs._row(one("ldadam"), [(2.0, 1.0, True), (4.0, 1.0, True), (3.0, 1.0, True)], 10)
    assert (every["step"], every["refresh"], every["amortised"]) == (3.0, None, 3.0)
    never = costs._row(one("adamw"), [(2.0, 1.0, False)], 10)
    assert (never["step"], never["refresh"], never["amortised"], never["period"]) == (2.0, None, 2.0, None)


def test_the_front_is_who_is_not_beaten_at_an_equal_or_smaller_cost() -> None:
    points = {"a": (1.0, 5.0), "b": (1.0, 4.0), "c": (2.0, 4.5), "d": (3.0, 3.0), "e": (2.5, math.inf), "f": (4.0, 3.0)}
    rows: list[dict[str, Any]] = [{"contender": name, "cost": cost, "loss": loss} for name, (cost, loss) in points.items()]
    assert [row["contender"] for row in comparisons.front(rows, "cost")] == ["b", "d"]
    assert [row["contender"] for row in comparisons.front([rows[4]], "cost")] == []


def test_costs_are_measured(tmp_path: Path) -> None:
    """Refreshes where there are some; the peak of full AdamW is the predicted one, and states are as large as their tensors."""
    common: dict[str, Any] = {"sequences": 2, "accumulate": 1, "length": 16, "runs_dir": tmp_path}
    fields = {
        "haar_stiefel": {"method": "lowrank", "law": "haar_stiefel", "rank": 0.25, "refresh_every": 20},
        "adamw": {"method": "adamw"},
        "galore": {"method": "galore", "rank": 16, "refresh_every": 20},
        "ldadam": {"method": "ldadam", "rank": 16},
        "lisa": {"method": "lisa", "refresh_every": 20},
        "dct_adamw": {"method": "dct_adamw", "rank": 16},
        "q_galore": {"method": "q_galore", "rank": 16, "refresh_every": 20},
    }
    chosen = {one(name): pretrain.Config(**common, **some) for name, some in fields.items()}
    rows = {row["label"]: row for row in costs.measured(chosen, CPU, 8, quiet=True)}
    assert [rows[name]["period"] for name in fields] == [20, None, 20, None, 20, None, 20]
    assert all(row["steps"] == 8 and 0 < row["update"] < row["step"] for row in rows.values())
    assert rows["adamw"]["over_adamw"] == 1.0
    training = chosen[one("adamw")]
    predicted = memory.peak(setting(training, 1, "ddp", "cpu"), False)
    assert rows["adamw"]["peak_bytes"] == pytest.approx(predicted.total, rel=0.1)
    assert rows["adamw"]["state_bytes"] == pytest.approx(8 * models.parameters("tiny"), rel=0.001)
    assert rows["q_galore"]["state_bytes"] < rows["galore"]["state_bytes"] < rows["adamw"]["state_bytes"]
    assert rows["lisa"]["peak_bytes"] < rows["adamw"]["peak_bytes"] and rows["q_galore"]["peak_bytes"] < rows["adamw"]["peak_bytes"]


def test_costs_reach_terminal_report_and_tables(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "train", lambda cells, *_: [pretrain.main(cell) for cell in cells])
    config = compare.Config(
        law=("haar_stiefel",), baselines=("adamw", "galore", "lisa"), rank=(0.25,), refresh_every=(2,), lr=(1e-3,), c=(1.0,), seed=(0, 1),
        steps=2, tune_steps=1, cost_steps=20, sequences=2, length=16, eval_tokens=32, data=str(text), runs_dir=tmp_path, quiet=True,
    )  # fmt: skip
    run = compare.main(config)
    spent = {row["label"]: row for row in run.rows() if row["kind"] == "cost"}
    assert list(spent) == ["haar_stiefel", "adamw", "galore", "lisa"]
    page = report.main(report.Config(run=(run.path,), out=tmp_path / "report.html")).read_text(encoding="utf-8")
    assert "optimizer state (MiB)" in page and "seconds of a step, refreshes shared out" in page and "<th>peak MiB</th>" in page
    assert any(getattr(table, "title", "") == "costs" and table.row_count == 4 for table in summary.found(run))
    publish.main(publish.Config(run=(run.path,), out=tmp_path / "results"))
    assert set(pd.read_csv(tmp_path / "results" / "compare" / "tiny-cost.csv").label) == set(spent)
    told = comparisons.costs("tiny", tmp_path / "results").splitlines()
    rows = [line for line in told if line.startswith("| `")]
    losses = [float(line.split("|")[4].split("±")[0]) for line in rows]
    assert len(rows) == 4 and losses == sorted(losses) and comparisons.costs("9m", tmp_path / "results") == "not yet run"
    assert f"| {spent['galore']['peak_bytes'] / 2**20:.1f}" in next(line for line in rows if "`galore`" in line)
    assert "1.00" in next(line for line in rows if "`adamw`" in line).split("|")[-2]


def test_costs_need_all_kinds_of_refresh() -> None:
    with pytest.raises(ValueError, match="cost_steps=10 must be at least 20"):
        compare.Config(cost_steps=10)
