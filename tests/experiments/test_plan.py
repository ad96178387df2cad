"""A plan's rows against theory, its measured points by two processes, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import cli, plan, runs
from experiments.pages import plan as page
from experiments.plan import Config
from theory import memory, step_time

ROOT = Path(__file__).parents[2]
SMALL = Config(model=("tiny",), devices=(2, 16), sequences=(1, 4), length=64, bandwidth_gb=(0.5, 5.0), rank=0.25)


def of(rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    found = [row for row in rows if all(row.get(name) == value for name, value in fields.items())]
    assert len(found) == 1, found
    return found[0]


def test_rows_are_what_theory_says() -> None:
    rows = plan.planned(SMALL)
    full, low = plan.settings(SMALL, "tiny", 16, 4, "fsdp")
    assert (full.method, low.method, full.world_size, full.sequences) == ("adamw", "lowrank", 16, 4)
    row = of(rows, kind="plan", shard="fsdp", devices=16, sequences=4, bandwidth_gb=5.0)
    link = step_time.Link(bandwidth=5e9, latency=5e-6)
    whole, thin = (step_time.step(one, 4e14, link) for one in (full, low))
    assert (row["full_sending"], row["low_compute"]) == (whole.sending, thin.compute)
    assert (row["ratio_hidden"], row["ratio_serial"]) == step_time.bounds(whole, thin)
    assert row["low_peak"] == memory.peak(low).total and row["tokens"] == 16 * 4 * 63
    inside = of(rows, kind="plan", shard="hybrid", devices=16, sequences=4, bandwidth_gb=5.0)
    assert inside["full_peak"] == memory.peak(step_time.inside(plan.settings(SMALL, "tiny", 16, 4, "hybrid")[0], 8)).total
    assert inside["full_peak"] > row["full_peak"] and inside["full_sending"] < row["full_sending"]


def test_inside_a_node_links_are_fast_and_hybrid_is_fsdp() -> None:
    rows = plan.planned(SMALL)
    near = [row for row in rows if row["devices"] == 2]
    assert {row["bandwidth_gb"] for row in near} == {SMALL.near_gb} and {row["shard"] for row in near} == {"ddp", "fsdp"}
    assert {row["bandwidth_gb"] for row in rows if row["devices"] == 16} == set(SMALL.bandwidth_gb)


def test_fewer_tokens_and_slower_links_pay_more() -> None:
    rows = [row for row in plan.planned(SMALL) if row["kind"] == "plan" and row["shard"] == "ddp" and row["devices"] == 16]
    ratio = {(row["bandwidth_gb"], row["sequences"]): row["ratio_serial"] for row in rows}
    assert ratio[0.5, 1] < ratio[5.0, 1] < ratio[5.0, 4] and ratio[0.5, 1] < ratio[0.5, 4]
    for row in rows:
        assert row["pays"] == (row["full_sending"] > row["low_compute"])


def test_a_run_its_page_and_its_table(tmp_path: Path) -> None:
    run = plan.main(replace(plan.PRESETS["smoke"], runs_dir=tmp_path, quiet=True))
    rows = run.rows()
    assert run.done and {row["kind"] for row in rows} == {"plan", "threshold"}
    html = page.section(run, rows)
    assert html.count("<svg") == 2 and "planned, hybrid" not in html and "on the most devices" in html
    assert page.main_table(rows)[0]["devices"] == "2"


def test_two_processes_lie_where_they_were_timed(tmp_path: Path) -> None:
    """What is checked is that the rows are whole and consistent, not how fast this machine is."""
    flags = ["--model", "tiny", "--sequences", "1", "--repeats", "2", "--device", "cpu", "--runs-dir", str(tmp_path), "--quiet"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "experiments.plan", "measured"]
    ended = subprocess.run(
        [*launch, *flags], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    (found,) = tmp_path.glob("plan-two-processes-*")
    (row,) = runs.load(found).rows()
    assert (row["kind"], row["processes"], row["sequences"], row["vocabulary"]) == ("point", 2, 1, 2560)
    assert row["bandwidth"] > 0 and row["full_sending"] > row["low_sending"] > 0 and row["low"] <= row["high"]
    both = step_time.bounds(
        step_time.Step(compute=row["full_compute"], sending=row["full_sending"]),
        step_time.Step(compute=row["low_compute"], sending=row["low_sending"]),
    )
    assert sorted(both) == pytest.approx([row["low"], row["high"]])
    assert "<svg" in page.section(runs.load(found), [row])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--model 8b", "unknown model '8b', known are 83k, 267k, 935k, tiny"),
        ("--shard zero", "unknown --shard 'zero', known are ddp, fsdp, hybrid"),
        ("--law cauchy", "unknown law 'cauchy'"),
        ("--model 7b tiny", "length must be between 2 and the model's 512, got 2048"),
        ("--precision bf16_weights --shard ddp hybrid", "which fully_shard does not take"),
        ("--devices 12", "devices=12 do not fill nodes of 8"),
        ("--bandwidth-gb 0", "bandwidth_gb must be positive, got (0.0,)"),
        ("--sequences 0", "sequences must be at least 1, got (0,)"),
        ("measured", "measure times what processes send; start them with torchrun"),
    ],
)
def test_wrong_input_is_one_line(arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *arguments.split(), "--runs-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
