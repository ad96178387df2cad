"""``lowrank scaling``: a schedule for every token count, equal budgets, a law that is found again from points, and what is extrapolated says so."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments import arguments, cli, pretrain, publish, report, runs, scaling
from experiments.comparison import grid
from experiments.comparison import outcomes as compared
from experiments.pages import figures_scaling, summary
from experiments.pages import scaling as pages
from experiments.pages.page import records
from experiments.scales import fitting, outcomes, plan
from experiments.training import models
from theory.scaling import ScalingLaw

TRUE = ScalingLaw(1.7, 30.0, 200.0, 0.3, 0.35, {"haar_stiefel": 1.2, "galore": 0.9}, {"haar_stiefel": 0.7, "galore": 1.6})
CPU = replace(scaling.PRESETS["cpu"], resamples=40)
GRID = replace(CPU, tokens=tuple(2**i for i in range(17, 21)), compute=None)  # of the known law


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells run in this process."""

    def train(cells: Sequence[pretrain.Config], *_: object) -> None:
        for cell in dict.fromkeys(cells):
            if not pretrain.opened(cell).done:
                grid._cell(pretrain.main, cell)

    monkeypatch.setattr(grid, "train", train)


def smoke(tmp_path: Path, **fields: Any) -> scaling.Config:
    return replace(scaling.PRESETS["smoke"], runs_dir=tmp_path, workers=1, quiet=True, **fields)


def points(noise: float = 0.0, seeds: int = 2, law: ScalingLaw = TRUE, config: scaling.Config = GRID) -> list[dict[str, Any]]:
    """Losses of a known law, with normal noise in ln L, as the question's own rows."""
    generator = np.random.default_rng(0)
    return [
        {"kind": "point", "label": label, "model": model, "weights": models.parameters(model), "tokens": D, "seed": seed, "lr": 1e-3}
        | {"loss": float(law.loss(models.parameters(model), D, label)) * math.exp(noise * generator.standard_normal())}
        for seed in range(seeds)
        for model in config.model
        for label in ("haar_stiefel", "adamw", "galore")
        for D in plan.lengths(config, model)
    ]


# the runs


def test_every_run_has_a_schedule_that_ends_at_its_tokens(tmp_path: Path) -> None:
    config = replace(CPU, lr={"adamw": 1e-3, "haar_stiefel": 3e-3, "spectral": 4e-3}, runs_dir=tmp_path)
    chosen, trials = plan.chosen(config, lambda *_: pytest.fail("nothing to tune"))
    found = plan.points(config, chosen)
    assert trials == [] and len(found) == len(set(found)) == 3 * (4 + 4 + 3) * 2
    assert {(point.model, point.tokens) for point in found} == {
        (model, tokens) for model in config.model for tokens in config.tokens if (model, tokens) != ("935k", 2**22)
    }
    for point in found:
        assert point.cell.steps * point.cell.sequences * point.cell.length == point.tokens and point.cell.eval_every == point.cell.steps
        assert point.cell.lr == config.lr[point.one.label] and (point.cell.model, point.cell.measure_every) == (point.model, 0)
    for seed, model, tokens in ((0, "83k", 2**22), (1, "935k", 2**20)):  # everyone the same but for the method and its learning rate
        mine = [point.cell for point in found if (point.cell.seed, point.model, point.tokens) == (seed, model, tokens)]
        differing = {name for cell in mine for name, value in runs.identity(cell).items() if value != runs.identity(mine[0])[name]}
        assert len(mine) == 3 and differing <= {"method", "law", "lr", "refresh_every"}  # AdamW has no K


def test_everyone_is_tuned_at_every_size_on_as_many_trials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The best rate falls by a factor √10 from size to size, from a place of its own for every method: all are found, on equal budgets."""
    best = {"adamw": 1e-3, "galore": 1e-1, "haar_stiefel": 1e-2, "spectral": 3e-4}
    name = lambda cell: cell.law if cell.method == "lowrank" else cell.method  # noqa: E731
    size = {"83k": 0, "267k": 1, "935k": 2}
    distance = lambda cell: abs(math.log10(cell.lr / best[name(cell)]) + 0.5 * size[cell.model])  # noqa: E731
    monkeypatch.setattr(compared, "tail", distance)
    trained: list[pretrain.Config] = []
    chosen, rows = plan.chosen(replace(CPU, runs_dir=tmp_path), lambda cells, _: trained.extend(cells))
    assert len(trained) == len(set(trained)) == len(rows) == 3 * (CPU.trials + 2 * plan.CARRIED)
    assert {(row["tokens"], row["steps"]) for row in rows} == {(CPU.tune_tokens, 1024)}
    for one in plan.contenders(CPU):
        for model in CPU.model:
            mine = [row for row in rows if (row["label"], row["model"]) == (one.label, model)]
            assert len(mine) == (CPU.trials if model == "83k" else plan.CARRIED) and sum(row["chosen"] for row in mine) == 1
            assert distance(chosen[one, model]) < 0.26 and not next(row for row in mine if row["chosen"])["at_edge"]


def test_committed_searches_may_say_the_learning_rates(tmp_path: Path) -> None:
    config = replace(CPU, searched="tiny", baselines=("adamw",), runs_dir=tmp_path)
    chosen, _ = plan.chosen(config, lambda *_: pytest.fail("nothing to tune"))
    table = publish.committed("compare/tiny-trial")
    for (one, _), cell in chosen.items():
        (row,) = records(pd.DataFrame(table[(table.label == one.label) & table.chosen]))
        assert cell.lr == row["lr"] and (one.label == "adamw" or cell.c == row["c"])
    with pytest.raises(runs.WrongInput, match=r"compare/tiny has no galore; it has gaussian, .* or give --lr, or neither to tune"):
        plan.chosen(replace(config, baselines=("adamw", "galore")), lambda *_: None)


@pytest.mark.usefixtures("reviews", "here")
def test_the_whole_question_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = smoke(tmp_path, tokens=(64, 128, 256))
    run = scaling.main(config)
    rows = run.rows()
    kinds = {kind: pd.DataFrame([row for row in rows if row["kind"] == kind]) for kind in {row["kind"] for row in rows}}
    assert run.done and set(kinds) >= {"trial", "point", "parameter", "quality", "tokens"} <= set(publish.KEPT["scaling"])
    assert len(kinds["trial"]) == 2 * (3 + 4) and len(kinds["point"]) == 2 * 2 * 3 * 2
    for row in kinds["point"].to_dict("records"):
        (cell,) = (
            runs.load(path)
            for path in (tmp_path / "cells").iterdir()
            if (c := json.loads((path / "config.json").read_text()))["seed"] == row["seed"]
            and (c["model"], c["steps"], c["method"]) == (row["model"], row["steps"], "adamw" if row["label"] == "adamw" else "lowrank")
        )
        evaluated = [line for line in cell.rows() if line["kind"] == "eval"]
        assert [line["step"] for line in evaluated] == [row["steps"]] and evaluated[0]["loss"] == row["loss"]
        assert cell.rows()[row["steps"] - 1]["lr"] < 0.5 * row["lr"] or row["steps"] < 4  # cooled down at its own end
    assert set(kinds["tokens"].model[kinds["tokens"].extrapolated]) == {"1b", "7b"}
    assert (run.path / "scaling.svg").read_text(encoding="utf-8").count(">extrapolated<") == 1
    assert summary.show(run) == 0 and "extrapolated" in capsys.readouterr().out
    page = report.main(report.Config(run=(run.path,), out=tmp_path / "page.html")).read_text(encoding="utf-8")
    assert "Scaling law: smoke" in page and page.count("<svg") == 1 and "(extrapolated)" in page
    publish.main(publish.Config(run=(run.path,), out=tmp_path / "results"))
    assert "(extrapolated)" in pages.markdown("smoke", tmp_path / "results") and pages.figure_of("smoke", tmp_path / "results") is not None
    monkeypatch.setattr(grid, "train", lambda *_: pytest.fail("computed again"))
    assert scaling.main(config).path == run.path
    (run.path / "DONE").unlink()  # cut off while it wrote its rows: cells stay
    (run.path / "metrics.jsonl").write_bytes((run.path / "metrics.jsonl").read_bytes()[:5000])
    monkeypatch.setattr(
        grid, "train", lambda cells, *_: [pytest.fail("computed again") for cell in cells if not pretrain.opened(cell).done]
    )
    assert [row for row in scaling.main(config).rows() if row["kind"] != "check"] == [row for row in rows if row["kind"] != "check"]


# the fit


def of(rows: list[dict[str, Any]], kind: str, **fields: Any) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == kind and all(row[name] == value for name, value in fields.items())]


def test_a_known_law_is_found_again() -> None:
    rows = fitting.rows(points(), GRID)
    found = {(row["name"], row["label"]): row["value"] for row in of(rows, "parameter")}
    wanted = {(name, ""): getattr(TRUE, name) for name in fitting.SHARED}
    wanted |= {(name, label): rho for name in ("rho_N", "rho_D") for label, rho in getattr(TRUE, name).items()}
    assert found == pytest.approx(wanted, rel=1e-5)
    (quality,) = of(rows, "quality")
    assert (quality["points"], quality["parameters"], quality["doubts"], quality["left_out"]) == (72, 9, "", 0)
    for row in of(rows, "tokens"):
        name = "" if row["label"] == "adamw" else row["label"]
        assert row["loss"] == pytest.approx(float(TRUE.loss(row["weights"], row["tokens"], name)), rel=1e-6)
        if name:
            assert row["saved"] == pytest.approx(float(TRUE.saved(row["weights"], row["tokens"], name)), rel=1e-4)
        if not math.isnan(row["interpolated"]):  # AdamW's own runs, a factor 2 apart, agree with the law to their curvature
            assert row["interpolated"] == pytest.approx(row["saved"], rel=0.1)
    assert sum(math.isfinite(row["interpolated"]) for row in of(rows, "tokens", label="galore")) >= 6
    assert {row["held_back"] for row in of(rows, "check")} == {"largest D"}  # two sizes that are left tell no law in N
    assert all(row["measured"] == pytest.approx(row["predicted"], rel=1e-4) for row in of(rows, "check"))


def test_noise_widens_intervals_and_a_law_that_does_not_hold_is_seen() -> None:
    narrow, wide = (fitting.rows(points(noise), GRID) for noise in (1e-4, 3e-3))
    for name in ("rho_D", "beta"):
        few, many = ([row["high"] / row["low"] for row in of(rows, "parameter", name=name, variant="N and D")] for rows in (narrow, wide))
        assert all(a < b for a, b in zip(few, many, strict=True))
    assert of(wide, "quality")[0]["lack_of_fit_p"] > 0.05 and 2e-3 < of(wide, "quality")[0]["seed_spread"] < 4e-3
    bent = [point | {"loss": point["loss"] + 0.3 * (point["tokens"] == GRID.tokens[0])} for point in points(1e-3)]
    quality = of(fitting.rows(bent, GRID), "quality")[0]
    assert quality["lack_of_fit_p"] < 1e-6 and quality["spread"] > 3 * quality["seed_spread"]


def test_one_factor_stands_beside_two_that_cannot_be_told_apart_and_is_what_tokens_are_of() -> None:
    flat = replace(TRUE, A=0.01)  # sizes that hardly matter tell nothing of ρ_N
    rows = fitting.rows(points(2e-3, law=flat), GRID)
    assert [(row["variant"], row["chosen"]) for row in of(rows, "quality")] == [("N and D", False), ("D", True)]
    saved = {(row["model"], row["tokens"]): row["saved"] for row in of(rows, "tokens", label="galore")}
    (rho,) = (row["value"] for row in of(rows, "parameter", variant="D", name="rho_D", label="galore"))
    assert list(saved.values()) == pytest.approx([rho] * len(saved)) and not of(rows, "parameter", variant="D", name="rho_N")


def test_one_size_has_one_factor_and_no_extrapolation_in_size() -> None:
    rows = fitting.rows([point for point in points(1e-3) if point["model"] == "935k"], GRID)
    assert "all runs have one N" in of(rows, "quality")[0]["doubts"] and {row["variant"] for row in of(rows, "parameter")} == {"D"}
    assert not any(row["extrapolated"] for row in of(rows, "tokens"))


def test_runs_that_diverged_are_left_out_and_counted() -> None:
    some = points(1e-3)
    rows = fitting.rows([point | ({"loss": math.inf} if i in (3, 40) else {}) for i, point in enumerate(some)], GRID)
    assert (of(rows, "quality")[0]["left_out"], of(rows, "quality")[0]["points"]) == (2, 70)


def test_too_few_points_are_refused() -> None:
    with pytest.raises(runs.WrongInput, match="4 points for 5 parameters; train more sizes, token counts or seeds"):
        fitting.rows([p for p in points(seeds=1) if p["label"] == "adamw" and p["model"] != "935k" and p["tokens"] < 2**19], GRID)


# committed comparisons


def test_last_losses_of_committed_comparisons_are_points() -> None:
    found = outcomes.committed(("tiny", "optimizers"))
    table = publish.committed("compare/tiny-final")
    assert [point["loss"] for point in found[: len(table)]] == table.loss.tolist()
    assert {point["tokens"] for point in found} == {300 * 16 * 128, 150 * 8 * 128} and {point["model"] for point in found} == {"tiny"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("scaling --results tiny", "have N = 1.45933e+06 and D = 614400; a law needs other sizes or token counts"),
        ("scaling --results tiny 9m", "losses per token of different vocabularies cannot share a law: tiny 2,560, 9m 32,000"),
        ("scaling --results nothing", "no committed rows 'compare/nothing-final'"),
        ("scaling cpu --model 83k tiny", "models of 2 vocabularies have losses that cannot be compared"),
        ("scaling cpu --model 935k 83k", "model must go from small to large"),
        ("scaling cpu --model 90k", "unknown model '90k'"),
        ("scaling cpu --baselines galore", "baselines must contain adamw, whose factors are 1"),
        ("scaling cpu --tokens 1000", "tokens=1000 and tune_tokens=1048576 must be multiples of sequences × length = 8 × 128"),
        ("scaling cpu --compute 1e12", "compute=1e+12 leaves nothing of 267k, whose 6ND is at least 1.7e+12"),
        ("scaling cpu --lr adamw 1e-3", "lr lacks haar_stiefel, spectral"),
        ("scaling cpu --trials 2", "trials must be at least 3"),
        ("scaling cpu --resamples 10", "resamples must be at least 40"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*flags.split(), "--runs-dir", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1


def test_learning_rates_are_given_by_name() -> None:
    config = arguments.configuration(
        "scaling", scaling, ["cpu", "--law", "--baselines", "adamw", "galore", "--lr", "adamw", "3e-3", "galore", "0.03"]
    )
    assert config.lr == {"adamw": 3e-3, "galore": 0.03} and config.law == ()


# pages


def test_the_gpu_preset_is_ready_and_not_yet_run() -> None:
    config = scaling.PRESETS["gpu"]
    cells = [plan.comparison(config, model, tokens) for model in config.model for tokens in config.tokens]
    assert config.model == ("20m", "60m", "100m") and all(cell.steps * cell.sequences * cell.length in config.tokens for cell in cells)
    assert all(b == 2 * a for a, b in pairwise(config.tokens))
    for one in plan.contenders(config):
        assert all(plan.plan.trials(cell, one)[0].precision == "bf16" for cell in cells)
    assert pages.markdown("gpu") == pages.short("gpu") == "not yet run"


def test_the_figure_draws_the_law_of_its_rows() -> None:
    some = points(1e-3)
    rows = fitting.rows(some, GRID)
    kinds = {kind: pd.DataFrame(of([*some, *rows], kind)) for kind in ("point", "parameter", "quality", "tokens")}
    figure = figures_scaling.scaling(kinds)
    law = figures_scaling.law_of(kinds["parameter"], "N and D")
    assert len(figure.axes) == 4
    for ax, model in zip(figure.axes, GRID.model, strict=False):
        lines = [line for line in ax.get_lines() if np.size(line.get_xdata()) == 60]
        assert len(lines) == 3
        for line, label in zip(lines, ("haar_stiefel", "adamw", "galore"), strict=True):
            drawn = law.loss(models.parameters(model), np.asarray(line.get_xdata()), label)
            assert np.asarray(line.get_ydata()) == pytest.approx(drawn)
    assert [text.get_text() for text in figure.axes[-1].texts] == ["extrapolated"]
