"""``lowrank compare``: equal budgets, pairs by seed, runs that diverge, and a grid that is computed once."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from experiments import cli, compare, pretrain, runs
from experiments.comparison import grid, outcomes, plan
from experiments.training.trainer import Trainer
from tests.experiments.test_pretrain import few


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells run in this process."""

    def train(cells: Sequence[pretrain.Config], *_: object) -> None:
        for cell in dict.fromkeys(cells):
            if not pretrain.opened(cell).done:
                grid._cell(pretrain.main, cell)

    monkeypatch.setattr(grid, "train", train)


# who is compared, and on what budget


def test_contenders() -> None:
    labels = [one.label for one in compare.contenders(compare.Config())]
    assert labels == ["gaussian", "haar_stiefel", "coordinate", "dct", "spectral", "adamw", "lora", "relora"]
    config = compare.Config(
        law=("dct",), baselines=("adamw", "lora", "relora"), rank=(0.25, 16), refresh_every=(10, 20), merge_every=50, c=(1.0, 0.5)
    )
    found = compare.contenders(config)
    assert [one.label for one in found] == [
        *(f"dct r={r} K={k}" for r in ("0.25", "16") for k in (10, 20)),
        "adamw",  # once: it has neither
        *(f"lora r={r}" for r in ("0.25", "16")),
        *(f"relora r={r}" for r in ("0.25", "16")),
    ]
    assert [one.rank for one in found[:4]] == [0.25, 0.25, 16, 16] and isinstance(found[2].rank, int)
    assert [one.refresh_every for one in found[4:]] == [None, None, None, 50, 50]
    apart = compare.contenders(compare.Config(law=("dct",), baselines=(), rank=(0.25, 0.5), tune_c=False))
    assert [(one.label, one.c) for one in apart] == [
        ("dct r=0.25 c=1.0", 1.0),
        ("dct r=0.25 c=r/n", 0.25),
        ("dct r=0.5 c=1.0", 1.0),
        ("dct r=0.5 c=r/n", 0.5),
    ]
    assert [len(compare.trials(compare.Config(law=("dct",), baselines=(), tune_c=False), one)) for one in apart] == [4] * 4


def test_who_is_paired_with_whom() -> None:
    config = compare.Config(law=("haar_stiefel", "dct"), rank=(0.25, 0.5), baselines=("adamw", "lora"))
    assert outcomes.references(compare.contenders(config)) == {
        "haar_stiefel r=0.25": ["adamw"],
        "haar_stiefel r=0.5": ["adamw", "haar_stiefel r=0.25"],
        "dct r=0.25": ["adamw", "haar_stiefel r=0.25"],
        "dct r=0.5": ["adamw", "haar_stiefel r=0.5", "dct r=0.25"],
        "adamw": [],
        "lora r=0.25": ["adamw", "haar_stiefel r=0.25"],
        "lora r=0.5": ["adamw", "haar_stiefel r=0.25"],
    }
    config = compare.Config(law=("dct", "haar_stiefel"), baselines=(), tune_c=False)
    assert outcomes.references(compare.contenders(config)) == {
        "dct c=1.0": ["haar_stiefel c=1.0"],
        "dct c=r/n": ["dct c=1.0", "haar_stiefel c=r/n"],
        "haar_stiefel c=1.0": [],
        "haar_stiefel c=r/n": ["haar_stiefel c=1.0"],
    }
    assert outcomes.references(compare.contenders(compare.Config(law=(), baselines=("adamw", "lora")))) == {"adamw": [], "lora": ["adamw"]}


def test_what_the_presets_compare_overlaps_and_is_trained_once() -> None:
    """The contender that is the reference of three grids has the same runs in all; 38 contenders are 28 to train."""
    cells = {
        name: {t for one in compare.contenders(config) for t in compare.trials(config, one)} for name, config in compare.PRESETS.items()
    }
    assert {name: len(some) for name, some in cells.items()} == {
        "tiny": 72,
        "tiny-rank": 128,
        "tiny-period": 88,
        "tiny-constant": 40,
        "9m": 24,
        "optimizers": 99,  # the first three of five for each of 33
        "9m-optimizers": 99,
        "60m-optimizers": 36,
        "130m-optimizers": 36,
        "second-moment": 12,
        "second-moment-carried": 12,
        "initial-scale": 8,
        "coupling": 12,
        "smoke": 3,
    }
    tiny = set().union(*(some for name, some in cells.items() if name.startswith("tiny")))
    assert len(tiny) == 72 + 80 + 64 and cells["tiny-constant"] <= cells["tiny"]


def test_everyone_has_as_many_trials_over_the_same_learning_rates() -> None:
    config = compare.Config(
        baselines=("adamw", "lora", "relora"), lr=(2e-3, 5e-3, 1.25e-2), c=(1.0, 0.25), lora_scale=(1.0, 4.0), tune_steps=100
    )
    budgets = {one.label: compare.trials(config, one) for one in compare.contenders(config)}
    assert {len(some) for some in budgets.values()} == {6}
    for label, some in budgets.items():
        rates = sorted({trial.lr for trial in some})
        assert (rates[0], rates[-1]) == (2e-3, 1.25e-2) and len(set(some)) == 6
        assert {(trial.seed, trial.steps, trial.sequences, trial.length, trial.accumulate) for trial in some} == {(1000, 100, 16, 128, 1)}
        if label == "adamw":
            ratios = [b / a for a, b in pairwise(rates)]
            assert len(rates) == 6 and ratios == pytest.approx([6.25**0.2] * 5, rel=1e-2)
        else:
            knob = "lora_scale" if "lora" in label else "c"
            assert {(trial.lr, getattr(trial, knob)) for trial in some} == {(lr, k) for lr in config.lr for k in getattr(config, knob)}


def test_a_compared_run_differs_from_its_trial_in_seed_and_length_only(tmp_path: Path) -> None:
    config = compare.Config(steps=400, runs_dir=tmp_path)
    trial = compare.trials(config, compare.contenders(config)[0])[1]
    cell = plan.compared(config, trial, 2)
    changed = {name for name, value in runs.identity(cell).items() if value != runs.identity(trial)[name]}
    assert changed == {"seed", "steps", "eval_every", "eval_tokens", "measure_every"} and cell.runs_dir == tmp_path / "cells"
    assert (cell.seed, cell.steps, cell.eval_every, cell.eval_tokens, cell.measure_every) == (2, 400, 40, 32768, 100)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model gpt", "unknown model 'gpt'"),
        ("--law haar", "unknown law 'haar'"),
        ("--baselines lowrank", "unknown baseline 'lowrank', known are adamw, lora, relora"),
        ("--seed 0 1000", "seed 1000 is the tuning seed"),
        ("--workers 0", "workers must be at least 1, got 0"),
        ("--steps 0", "steps must be at least 1, got 0"),
        ("--lr -1", "lr must be positive and finite"),
        ("--rank 400 --c 1", "rank=400 must be below the width 352 of tiny"),
        ("--rank 40", "c=r/n needs ranks that are fractions of n"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "tiny", *flags.split()]) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1
    with pytest.raises(ValueError, match="nothing to compare"):
        compare.Config(law=(), baselines=())


# outcomes


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_paired_differences_by_hand() -> None:
    table = {"adamw": (3.0, 3.5, 4.0), "haar_stiefel": (3.2, 3.6, 4.6), "dct K=5": (3.1, math.inf, 4.2)}
    finals = [{"label": label, "seed": seed, "loss": loss} for label, some in table.items() for seed, loss in enumerate(some)]
    references = {"adamw": ["haar_stiefel"], "haar_stiefel": ["adamw"], "dct K=5": ["adamw", "haar_stiefel"]}
    found = {(row["label"], row["reference"]): row for row in outcomes.paired(finals, references)}
    assert set(found) == {("haar_stiefel", "adamw"), ("dct K=5", "adamw"), ("adamw", "haar_stiefel"), ("dct K=5", "haar_stiefel")}
    row = found["haar_stiefel", "adamw"]
    # differences 0.2, 0.1, 0.6: mean 0.3, deviations -0.1, -0.2, 0.3, variance 0.14/2, standard error sqrt(0.07/3); t(0.975, 2) = 4.30265
    error = math.sqrt(0.07 / 3)
    assert (row["difference"], row["standard_error"], row["seeds"]) == (pytest.approx(0.3), pytest.approx(error), 3)
    assert (row["low"], row["high"]) == (pytest.approx(0.3 - 4.30265 * error, rel=1e-5), pytest.approx(0.3 + 4.30265 * error, rel=1e-5))
    interval = stats.ttest_rel(table["haar_stiefel"], table["adamw"]).confidence_interval()
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    assert found["adamw", "haar_stiefel"]["difference"] == pytest.approx(-0.3)
    assert found["dct K=5", "adamw"]["difference"] == math.inf
    (single,) = [row for row in outcomes.paired(finals[:1] + finals[3:4], references | {"adamw": []}) if row["reference"] == "adamw"]
    assert single["difference"] == pytest.approx(0.2) and math.isnan(single["standard_error"]) and math.isnan(single["low"])


def smoke(tmp_path: Path, **fields: Any) -> compare.Config:
    return replace(compare.PRESETS["smoke"], runs_dir=tmp_path, workers=1, quiet=True, **fields)


@pytest.mark.usefixtures("reviews", "here")
def test_the_whole_comparison_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = smoke(tmp_path, lr=(5e-3, 1e-2), eval_tokens=128)
    run = compare.main(config)
    rows = run.rows()
    by = lambda kind: [row for row in rows if row["kind"] == kind]  # noqa: E731
    assert run.done and [row["kind"] for row in rows] == sorted(
        (row["kind"] for row in rows), key=["trial", "final", "paired", "curve"].index
    )
    for label in ("haar_stiefel", "adamw", "lora"):
        tried = [row for row in by("trial") if row["label"] == label]
        assert len(tried) == 2 and [row["chosen"] for row in tried] == [row["loss"] == min(t["loss"] for t in tried) for row in tried]
        chosen = next(row for row in tried if row["chosen"])
        assert chosen["at_edge"]
        finals = [row for row in by("final") if row["label"] == label]
        assert [row["seed"] for row in finals] == [0, 1] and {row["lr"] for row in finals} == {chosen["lr"]}
        assert all(math.isfinite(row["loss"]) and row["peak_bytes"] > 0 and row["parameters"] == 1_459_328 for row in finals)
        curve = [row for row in by("curve") if row["label"] == label]
        assert [row["step"] for row in curve] == [1, 2, 3, 4] and all(row["seeds"] == 2 for row in curve)
        losses = [row["loss"] for row in finals]
        assert curve[-1]["loss"] == pytest.approx(np.mean(losses))
        assert curve[-1]["standard_error"] == pytest.approx(abs(losses[0] - losses[1]) / 2)
    assert (by("final")[0]["c"], by("final")[0]["lora_scale"], by("final")[-1]["lora_scale"]) == (1.0, None, 1.0)
    assert [(row["label"], row["reference"]) for row in by("paired")] == [
        ("haar_stiefel", "adamw"),
        ("lora", "adamw"),
        ("lora", "haar_stiefel"),
    ]
    # the same initialisation and data for everyone: the first loss of a seed is one number
    first = {seed: set() for seed in (0, 1)}
    for cell in (p for p in (tmp_path / "cells").iterdir() if runs.load(p).config["seed"] != compare.TUNING_SEED):
        opened = runs.load(cell)
        first[opened.config["seed"]].add(round(opened.rows()[0]["loss"], 4))
    assert all(len(some) == 1 for some in first.values())
    monkeypatch.setattr(grid, "train", lambda *_: pytest.fail("computed again"))
    assert compare.main(config).path == run.path and capsys.readouterr().err == ""


@pytest.mark.usefixtures("reviews", "here")
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_divergence_is_an_infinite_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA has no finite loss beyond step 1: 12 steps are stopped, and so is nothing else."""
    original = Trainer._loss

    def loss(self: Trainer, ids: Any) -> Any:
        return original(self, ids) * (float("nan") if self.config.method == "lora" and self.step >= 1 else 1.0)

    monkeypatch.setattr(Trainer, "_loss", loss)
    run = compare.main(smoke(tmp_path, tune_steps=12, steps=13, eval_tokens=128, law=()))
    found = {(row["kind"], row["label"]): row for row in run.rows() if row["kind"] in ("trial", "final")}
    assert {label for (_, label), row in found.items() if math.isinf(row["loss"])} == {"lora"}
    pair = next(row for row in run.rows() if row["kind"] == "paired" and row["label"] == "lora")
    assert run.done and pair["difference"] == math.inf


@pytest.mark.usefixtures("reviews", "here")
def test_a_trial_with_every_step_skipped_is_never_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps are too few to be stopped: the run is done and has no loss at all."""
    original = Trainer._loss
    monkeypatch.setattr(Trainer, "_loss", lambda self, ids: original(self, ids) * (float("nan") if self.config.lr == 5e-3 else 1.0))
    run = compare.main(smoke(tmp_path, lr=(5e-3, 1e-2), law=(), baselines=("adamw",), eval_tokens=128))
    trials = [row for row in run.rows() if row["kind"] == "trial"]
    assert [(row["lr"], math.isinf(row["loss"]), row["chosen"]) for row in trials] == [(5e-3, True, False), (1e-2, False, True)]


# the grid


def test_two_processes_train_what_is_open(text: Path, tmp_path: Path) -> None:
    """Also with the same cell listed twice: no directory is written by two processes."""
    cells = [few(text, tmp_path, steps=2, seed=seed) for seed in (0, 1)]
    broken = few(text, tmp_path, steps=2, lr=1e30, max_skipped=0, clip=0.0)
    done = pretrain.main(cells[0])
    before = (done.path / "metrics.jsonl").stat().st_mtime_ns
    grid.train([*cells, cells[1], broken], 2, "cells", True)
    assert [pretrain.opened(cell).done for cell in (*cells, broken)] == [True, True, False]
    assert (done.path / "metrics.jsonl").stat().st_mtime_ns == before
    rows = pretrain.opened(cells[1]).rows()
    assert [row["kind"] for row in rows] == ["train", "train", "eval", "end"]
    again = pretrain.main(replace(cells[1], runs_dir=tmp_path / "here"))
    assert [row["loss"] for row in again.rows()[:3]] == pytest.approx([row["loss"] for row in rows[:3]], abs=1e-5)


def _gone(*_: object) -> None:
    os._exit(1)


def test_a_killed_worker_stops_the_grid_with_advice(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is gone as soon as it would take its first cell, as when memory runs out."""
    cells = [few(text, tmp_path, steps=2, seed=seed) for seed in (0, 1)]
    monkeypatch.setattr(grid, "_begin", _gone)
    with pytest.raises(runs.Stopped, match="a training process was killed, perhaps for memory; with fewer --workers the same") as stop:
        grid.train(cells, 1, "cells", True)
    assert stop.value.code == 1 and not any(pretrain.opened(cell).done for cell in cells)


def test_workers_end_with_a_parent_that_was_killed(text: Path, tmp_path: Path) -> None:
    """Else the same command, given again, would train the same runs beside them."""
    code = f"""
from tests.experiments.test_pretrain import few
from experiments.comparison import grid
from pathlib import Path
if __name__ == "__main__":
    grid.train([few(Path({str(text)!r}), Path({str(tmp_path)!r}), steps=100_000, seed=seed) for seed in (0, 1)], 2, "cells", True)
"""
    (tmp_path / "begin.py").write_text(code, encoding="utf-8")
    parent = subprocess.Popen([sys.executable, str(tmp_path / "begin.py")], env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})
    deadline = time.monotonic() + 120
    while sum(path.stat().st_size > 0 for path in tmp_path.glob("*/metrics.jsonl")) < 2:
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    children = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text(encoding="ascii").split()]
    assert len(children) >= 2
    parent.kill()
    parent.wait()
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    written = [path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")]
    time.sleep(1)
    assert written == [path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")]


def test_threads_are_for_the_cores_that_a_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system tells; otherwise for all that there are."""
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 5}, raising=False)
    assert grid.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert grid.cores() == 7


def test_an_interrupted_cell_interrupts_the_grid(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Now:
        """Runs what is submitted at once."""

        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> Now:
            return self

        def __exit__(self, *_: object) -> None: ...
        def shutdown(self, **_: object) -> None: ...
        def submit(self, work: Callable[..., int], *arguments: Any) -> Any:
            from concurrent.futures import Future

            future: Any = Future()
            future.set_result(work(*arguments))
            return future

    def stopped(_: pretrain.Config) -> runs.Run:
        raise runs.Stopped("interrupted after step 1", code=130)

    monkeypatch.setattr(grid, "ProcessPoolExecutor", Now)
    with pytest.raises(runs.Stopped, match="the same command continues") as stop:
        grid.train([few(text, tmp_path)], 1, "cells", True, replace(grid.PRETRAINING, main=stopped))
    assert stop.value.code == 130
