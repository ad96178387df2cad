"""Spikes of the training loss after redraws, by hand; who is compared with what is given beside a method, and the rows that come of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from estimators.transport import SECONDS
from experiments import cli, compare, pretrain, runs
from experiments.comparison import outcomes, plan, spikes
from experiments.training import gradinit
from experiments.training.methods import METHODS
from tests.experiments.test_compare import here as here
from tests.experiments.test_compare import smoke


def test_a_spike_by_hand() -> None:
    losses = [5.0, 4.0, 3.0, 3.0, 7.0, 2.0, 1.0, 1.0]
    assert spikes.spike(losses, 4, 2) == 4.0  # max(7, 2) − mean(3, 3)
    assert spikes.spike(losses, 2, 2) == pytest.approx(3.0 - 4.5)
    assert spikes.spike(losses, 6, 2) == pytest.approx(1.0 - 4.5)
    with pytest.raises(ValueError, match=r"spike\(8 losses, t=7, window=2\): needs 2 steps before and after"):
        spikes.spike(losses, 7, 2)


def test_means_over_the_redraws_and_midway() -> None:
    """A loss that falls by 1 a step, with a jump of 10 in the first step after each redraw at 8, 16, 24; of 30 steps the last redraw with 2 after."""
    losses = [100.0 - t + 10.0 * (t % 8 == 0 and t > 0) for t in range(30)]
    told = spikes.measured(losses, 8, 2)
    # after: 100 − t + 10; before: mean of 100 − t + 2 and 100 − t + 1; midway nothing happens: −1.5
    assert told == {
        "window": 2, "spikes": 3, "spike": pytest.approx(8.5), "spike_error": pytest.approx(0, abs=1e-12),
        "midways": 3, "midway": pytest.approx(-1.5), "midway_error": pytest.approx(0, abs=1e-12),
    }  # fmt: skip
    noisy = np.random.default_rng(0).normal(size=60).tolist()
    told = spikes.measured(noisy, 20, 5)
    found = [spikes.spike(noisy, t, 5) for t in (20, 40)]
    assert (told["spikes"], told["midways"]) == (2, 2)  # none after the last step
    assert told["spike"] == pytest.approx(np.mean(found)) and told["spike_error"] == pytest.approx(abs(found[0] - found[1]) / 2)
    assert math.isnan(spikes.measured([1.0] * 10, 20, 5)["spike"])


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by the standard error
def test_a_run_that_diverged_has_no_finite_spike() -> None:
    assert spikes.measured([1.0] * 20 + [math.inf] * 20, 10, 2)["spike"] == math.inf


def test_what_is_given_beside_a_method() -> None:
    config = compare.Config(
        law=("haar_stiefel",),
        baselines=("adamw", "lora", "galore"),
        second_moment=("zero", "keep"),
        init=("plain", "gradinit"),
        coupled=(0.0, 0.5),
    )
    found = plan.contenders(config)
    assert [one.label for one in found] == [
        *(f"haar_stiefel {N} {init} α={alpha}" for N in ("zero", "keep") for init in ("plain", "gradinit") for alpha in ("0", "0.5")),
        *(f"adamw {init}" for init in ("plain", "gradinit")),
        *(f"lora α={alpha}" for alpha in ("0", "0.5")),
        "galore",
    ]
    told = outcomes.references(found)
    assert told["haar_stiefel keep plain α=0"] == ["adamw plain", "haar_stiefel zero plain α=0"]
    assert told["haar_stiefel keep plain α=0.5"] == ["adamw plain", "haar_stiefel zero plain α=0.5", "haar_stiefel keep plain α=0"]
    assert told["adamw gradinit"] == ["adamw plain"] and told["adamw plain"] == []
    assert told["lora α=0.5"] == ["adamw plain", "haar_stiefel zero plain α=0", "lora α=0"]
    cells = {one.label: plan.trials(config, one)[0] for one in found}
    cell = cells["haar_stiefel keep gradinit α=0.5"]
    assert (cell.second_moment, cell.init, cell.coupled) == ("keep", "gradinit", 0.5)
    assert (cells["galore"].second_moment, cells["galore"].init, cells["galore"].coupled) == (None, "plain", 0.0)


def test_the_presets() -> None:
    labels: dict[str, Sequence[str]] = {
        "second-moment": [f"haar_stiefel {N}" for N in SECONDS],
        "second-moment-carried": [f"haar_stiefel {N}" for N in SECONDS],
        "initial-scale": ["haar_stiefel plain", "haar_stiefel gradinit", "adamw plain", "adamw gradinit"],
        "coupling": ["haar_stiefel α=0", "haar_stiefel α=0.5", "lora α=0", "lora α=0.5"],
    }
    for name, expected in labels.items():
        config = compare.PRESETS[name]
        found = plan.contenders(config)
        assert [one.label for one in found] == expected and len(config.seed) >= 3
        for one in found:
            cells = plan.trials(config, one)
            assert {(cell.state, cell.refresh_every, cell.lift_every) for cell in cells if cell.method == "lowrank"} <= {
                (config.state, 20, config.lift_every or 1)
            }


def test_who_has_pairs_and_whose_first_step_is_known() -> None:
    assert {name for name in METHODS if plan._takes(name, "coupled")} == {"lowrank", "compact", "lora", "relora"}
    assert {name for name in METHODS if gradinit.knows(METHODS[name])} == {"lowrank", "compact", "adamw"}


@pytest.mark.usefixtures("reviews", "here")
def test_the_rows_of_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gradinit, "ROUNDS", 1)
    monkeypatch.setattr(gradinit, "FRESH", 2)
    config = smoke(
        tmp_path,
        baselines=("adamw",),
        second_moment=("zero", "first_batch"),
        init=("gradinit",),
        spike_steps=2,
        refresh_every=(8,),
        steps=17,
        eval_tokens=128,
    )
    run = compare.main(config)
    kinds = {kind: [row for row in run.rows() if row["kind"] == kind] for kind in ("final", "init", "spike", "spike_paired")}
    assert [(row["label"], row["seed"]) for row in kinds["spike"]] == [
        (f"haar_stiefel {N}", s) for N in ("zero", "first_batch") for s in (0, 1)
    ]
    for row in kinds["spike"]:
        one = next(one for one in compare.contenders(config) if one.label == row["label"])
        trial = next(trial for trial in compare.trials(config, one) if trial.lr == row["lr"])
        rows = pretrain.opened(plan.compared(config, trial, row["seed"])).rows()
        losses = [line["loss"] for line in rows if line["kind"] == "train"]
        assert (
            row["spikes"] == 1
            and row["spike"] == max(losses[8:10]) - np.mean(losses[6:8])
            and row["midway"] == max(losses[12:14]) - np.mean(losses[10:12])
        )
    ((pair),) = kinds["spike_paired"]
    spike = {(row["label"], row["seed"]): row["spike"] for row in kinds["spike"]}
    assert (pair["label"], pair["reference"]) == ("haar_stiefel first_batch", "haar_stiefel zero")
    assert pair["difference"] == pytest.approx(
        np.mean([spike["haar_stiefel first_batch", s] - spike["haar_stiefel zero", s] for s in (0, 1)])
    )
    assert {(row["label"], row["seed"]) for row in kinds["init"]} == {(row["label"], row["seed"]) for row in kinds["final"]}
    assert all(row["smallest"] < 1 < row["largest"] and row["init"] == "gradinit" for row in kinds["init"])
    capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--spike-steps 6", "spike_steps=6 must be between 0 and a quarter of refresh_every=20"),
        ("--coupled -1", "coupled must be at least 0, got -1.0"),
        ("--second-moment forget", "second-moment"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "tiny", *flags.split()]) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1


def test_runs_that_are_asked_nothing_new_keep_their_names() -> None:
    """Directories are found by a hash of these fields: of the runs that there were before, none has a field more."""
    new = {"second_moment", "init", "coupled", "lift_every", "spike_steps"}
    assert not new & runs.identity(compare.PRESETS["tiny"]).keys()
    assert new & runs.identity(pretrain.Config()).keys() == {"lift_every"}  # which it had
    assert runs.identity(replace(compare.PRESETS["tiny"], coupled=(0.0, 0.5)))["coupled"] == [0.0, 0.5]
