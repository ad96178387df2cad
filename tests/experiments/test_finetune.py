"""The comparison of fine-tunings, and the command."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments import cli, finetune, runs
from experiments.comparison import grid
from experiments.finetuning import contenders
from experiments.finetuning.config import KNOWN, Tuning
from experiments.pages import finetuning
from tests.experiments.test_labelled import own


@pytest.fixture
def small(bert: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> finetune.Config:
    """Cells are trained in this process."""

    def train(cells: Sequence[Tuning], *rest: Any) -> None:
        job: grid.Job = rest[-1]
        for cell in dict.fromkeys(cells):
            grid._cell(job.main, cell)

    monkeypatch.setattr(grid, "train", train)
    return finetune.Config(
        name="small", model=str(bert), task=str(folder), method=("adamw", "lowrank:gaussian", "lowrank_lr:coordinate"), k=8, tests=40, length=16,
        rank=4, trials=4, seed=(0, 1, 2), steps=3, sequences=4, forward_steps=2, forward_sequences=8, runs_dir=tmp_path, quiet=True,
    )  # fmt: skip


def test_a_comparison_in_small(small: finetune.Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finetune.main(small)
    rows = run.rows()
    of = lambda kind: [row for row in rows if row["kind"] == kind]  # noqa: E731
    for label in small.method:
        trials = [row for row in of("trial") if row["label"] == label]
        assert len({row["lr"] for row in trials}) == 4 and sum(row["chosen"] for row in trials) == 1
        best = min(trials, key=lambda row: row["loss"])
        tested = [row for row in of("tested") if row["label"] == label]
        assert best["chosen"] and {row["lr"] for row in tested} == {best["lr"]} and [row["seed"] for row in tested] == [0, 1, 2]
        assert {row["examples"] for row in tested} == {40}
    configs = [cell.read("config.json") for cell in map(runs.load, (tmp_path / "cells").iterdir())]
    assert {(c["steps"], c["sequences"]) for c in configs if c["method"] == "lowrank_lr"} == {(2, 8)}
    assert {(c["steps"], c["sequences"]) for c in configs if c["method"] != "lowrank_lr"} == {(3, 4)}
    assert {c["law"] for c in configs if c["method"] == "lowrank"} == {"gaussian"}
    peaks = {row["label"]: row["peak_bytes"] for row in of("peak")}
    assert peaks["lowrank_lr:coordinate"] < peaks["lowrank:gaussian"] < peaks["adamw"]
    assert finetune.main(small).path == run.path and run.rows() == rows
    kinds = {kind: pd.DataFrame(of(kind)) for kind in finetuning.KINDS}
    merged = finetuning.merged(kinds)
    (adam,) = (row for row in merged if row["method"] == "adamw")
    by_hand = kinds["tested"].query("label == 'adamw'").accuracy
    assert adam["accuracy"] == pytest.approx(by_hand.mean())
    assert adam["accuracy ±"] == pytest.approx(4.302653 * by_hand.std() / 3**0.5, rel=1e-5, abs=1e-12), (
        "Student's t of 2 degrees of freedom"
    )
    assert [row["accuracy"] for row in merged] == sorted((row["accuracy"] for row in merged), reverse=True)
    page = finetuning.section(run, rows)
    assert all(label in page for label in small.method) and "<svg" in page
    assert cli.main(["publish", str(run.path), "--out", str(tmp_path / "results")]) == 0
    assert cli.main(["report", str(run.path), *map(str, (tmp_path / "cells").iterdir()), "--out", str(tmp_path / "report.html")]) == 0
    assert "parity" in (tmp_path / "report.html").read_text(encoding="utf-8")
    written = {file.name for file in (tmp_path / "results" / "finetune").iterdir()}
    assert written == {"small.json", *(f"small-{kind}.csv" for kind in finetuning.KINDS)}
    capsys.readouterr()


def test_other_data_at_the_same_place_are_another_run(small: finetune.Config, tmp_path: Path) -> None:
    few = [(f"w{i} w{i + 2}", "great" if i % 2 else "terrible") for i in range(30)]
    place = own(tmp_path / "mine", few, few[:10])
    one = replace(small, task=str(place), method=("mezo",), k=2, trials=3, seed=(0,))
    first = finetune.main(one)
    own(tmp_path / "mine", few, [(text, "great" if y == "terrible" else "terrible") for text, y in few[:10]])
    second = finetune.main(one)
    assert first.path != second.path
    scores = [row["accuracy"] for run in (first, second) for row in run.rows() if row["kind"] == "tested"]
    assert scores[0] + scores[1] == pytest.approx(1), "the labels were exchanged"


def test_what_is_refused_leaves_no_run(small: finetune.Config, tmp_path: Path) -> None:
    with pytest.raises(runs.WrongInput, match="there is no task"):
        finetune.main(replace(small, task="nowhere"))
    assert not list(tmp_path.glob("finetune-*")) and not (tmp_path / "cells").exists()


def test_publishing_leaves_nothing_of_another_run_with_this_label(small: finetune.Config, tmp_path: Path) -> None:
    both = [finetune.main(replace(small, method=some, trials=3, seed=(0,))) for some in (("adamw", "mezo"), ("mezo",))]
    for run in both:
        assert cli.main(["publish", str(run.path), "--out", str(tmp_path / "results")]) == 0
    written = {file.name for file in (tmp_path / "results" / "finetune").iterdir()}
    assert "small-trial.csv" in written and "small-paired.csv" not in written
    (tmp_path / "file").touch()
    assert cli.main(["publish", str(both[0].path), "--out", str(tmp_path / "file")]) == 2


def test_a_training_that_diverges_is_an_outcome(small: finetune.Config) -> None:
    run = finetune.main(replace(small, method=("adamw",), lr=1e30, trials=3, seed=(0, 1), steps=30, other_lr=None))
    tested = [row for row in run.rows() if row["kind"] == "tested"]
    assert all(row["accuracy"] == 0 and row["loss"] == math.inf for row in tested)


def test_every_preset_names_contenders_that_exist() -> None:
    method = lambda label: label.split("+")[0].partition(":")[0]  # noqa: E731
    assert {method(label) for label in contenders.EVERY} == set(KNOWN)
    for config in finetune.PRESETS.values():
        for label in config.method:
            rates = contenders.first(config, label)
            assert len(set(rates)) == 3 and contenders.trial(config, label, rates[0]).method == method(label)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": ("adamw:gaussian",)}, "only lowrank, lowrank_lr and tokens have laws"),
        ({"method": ("adamw+quick",)}, "'adamw\\+quick': unknown quick, known are recomputed, fused"),
        ({"method": ("mezo+recomputed",)}, "without a backward pass nothing is recomputed or fused"),
        ({"method": ("lowrank_lr:spectral",)}, "forward passes show no gradient"),
        ({"method": ("lowrank:normal",)}, "unknown law 'normal'"),
        ({"method": ()}, "nothing to compare"),
        ({"trials": 2}, "trials must be at least 3"),
        ({"seed": (1000,)}, "seed 1000 is the tuning seed"),
        ({"seed": (13, 13)}, "a seed is named twice"),
        ({"tests": 0}, "tests"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"other_lr": -1.0}, "other_lr must be positive"),
        ({"method": ("adamw", "galore"), "optimizer": "muon"}, "method=galore has its own update"),
    ],
)
def test_comparisons_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        finetune.Config(**fields)


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["finetune", "smoke", "--runs-dir", str(tmp_path), "--quiet"]
    assert cli.main([*few, "--task", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("lowrank: finetune: there is no task 'nowhere'")
    assert cli.main([*few, "--k", "100000"]) == 2
    assert "k=100000 needs 200000" in capsys.readouterr().err
    assert cli.main([*few, "--length", "5000"]) == 2
    assert "length=5000 is above the 512 positions of minilm" in capsys.readouterr().err
