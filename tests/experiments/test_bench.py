"""Ratios are of pairs, saved bytes are counted by storage, and what was measured reaches terminal, report and CSV."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from experiments import bench, compare, pretrain, publish, report, runs
from experiments.benching import training
from experiments.comparison import grid
from experiments.pages import summary
from experiments.training.timing import pairs
from tests.experiments.test_pretrain import few

CPU = torch.device("cpu")


def small(tmp_path: Path, *group: str) -> bench.Config:
    return bench.Config(model="tiny", sequences=2, length=32, repeats=5, group=group, runs_dir=tmp_path, quiet=True)


def test_a_ratio_is_the_median_of_the_ratios_within_a_round() -> None:
    peer, twice = pairs(lambda: time.sleep(0.01), {"twice": lambda: time.sleep(0.02)}, CPU, 5)
    assert peer["ratio"] == peer["ratio_q1"] == 1 and peer["repeats"] == 5
    assert 1.5 < twice["ratio"] < 2.5 and twice["ratio_q1"] <= twice["ratio"] <= twice["ratio_q3"]


def test_saved_bytes_are_those_of_XV_and_of_X_counted_once(tmp_path: Path) -> None:
    """Of a block, nn.Linear saves the inputs of q/k/v, o, gate/up (T×h each) and down (T×i); LowRankLinear T×r for each of its seven."""
    config = small(tmp_path, "memory")
    tokens, h, i, blocks = 2 * 31, 128, 352, 4
    rows = {row["name"]: row for row in training.memory(config, CPU)}
    assert rows["peer"]["saved_bytes"] == 4 * blocks * tokens * (3 * h + i)
    assert rows["peer"]["saved_bytes_layer_by_layer"] == 4 * blocks * tokens * (6 * h + i)
    for law in config.law:
        assert rows[law]["saved_bytes"] == 4 * blocks * tokens * (6 * h // 8 + i // 8)
        assert rows[law]["holds"] and rows[law]["ratio"] < training.MEMORY_TARGET
    assert rows["lora"]["saved_bytes"] > rows["peer"]["saved_bytes"], "LoRA keeps X and XAᵀ"


def test_a_bench_is_measured_judged_shown_and_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = bench.main(small(tmp_path, "step", "memory", "refresh", "live"))
    rows = run.rows()
    step = {row["name"]: row for row in rows if row["kind"] == "step"}
    assert list(step) == ["peer", "haar_stiefel", "spectral", "spectral online", "lora"]
    assert all(row["seconds"] > 0 for row in step.values())
    for law in ("haar_stiefel", "spectral"):
        assert step[law]["holds"] == (step[law]["ratio_with_redraws"] <= training.STEP_TARGET)
        assert step[law]["ratio_with_redraws"] >= step[law]["ratio"] and step[law]["state_bytes"] < step["peer"]["state_bytes"]
    refresh = {row["name"]: row for row in rows if row["kind"] == "refresh"}
    assert refresh["haar_stiefel"]["known_bytes"] == 0 < refresh["spectral"]["known_bytes"] < refresh["spectral online"]["known_bytes"]
    code = summary.show(run)
    assert code == int(any(not row["holds"] for row in rows if "holds" in row))
    assert "spectral online" in capsys.readouterr().out
    page = report.main(report.Config(run=(run.path,), out=tmp_path / "report.html")).read_text(encoding="utf-8")
    assert "One optimizer step, over full AdamW" in page
    publish.main(publish.Config(run=(run.path,), out=tmp_path / "results"))
    assert list(pd.read_csv(tmp_path / "results" / "bench" / "tiny-step.csv").name) == list(step)


def test_training_and_comparison_reach_report_and_results(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = pretrain.main(few(text, tmp_path, measure_every=1))
    monkeypatch.setattr(grid, "train", lambda cells, *_: [pretrain.main(cell) for cell in cells])
    settings = compare.Config(
        **{
            **vars(compare.PRESETS["smoke"]),
            "data": str(text),
            "runs_dir": tmp_path,
            "quiet": True,
            "eval_tokens": 32,
            "lora_scale": (2.0,),
        }
    )
    compared = compare.main(settings)
    page = report.main(report.Config(run=(trained.path, compared.path), out=tmp_path / "report.html")).read_text(encoding="utf-8")
    assert "The law in use" in page and "Comparison in training" in page and page.count("<svg") >= 5
    assert "<svg" in (compared.path / "curves.svg").read_text(encoding="utf-8")
    publish.main(publish.Config(run=(trained.path, compared.path), out=tmp_path / "results"))
    final = pd.read_csv(tmp_path / "results" / "compare" / "tiny-final.csv")
    shown = {row["label"]: row["loss"] for row in compared.rows() if row["kind"] == "final" and row["seed"] == 0}
    assert final[final.seed == 0].set_index("label").loss.to_dict() == pytest.approx(shown)
    losses = pd.read_csv(next((tmp_path / "results" / "pretrain").glob("*-train.csv"))).loss
    assert list(losses) == pytest.approx([row["loss"] for row in trained.rows() if row["kind"] == "train"])


def test_a_measured_step_costs_more_and_its_share_is_judged(tmp_path: Path) -> None:
    rows = training.live(small(tmp_path, "live"), CPU)
    assert [row["name"] for row in rows] == ["haar_stiefel", "spectral"]
    for row in rows:
        assert row["share"] == pytest.approx((row["ratio"] - 1) / 100) and row["holds"] == (row["share"] <= 0.03)


def test_wrong_groups_and_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown group"):
        small(tmp_path, "nothing")
    with pytest.raises(ValueError, match="repeats"):
        bench.Config(repeats=3)
    with pytest.raises(runs.WrongInput, match=re.escape("device 'nowhere'")):
        runs.device("nowhere")
