"""Tasks in sequence: the measures by hand, what is trained and what stays, the comparison in small, and its page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from experiments import cli, continual, runs
from experiments.comparison import grid
from experiments.continuing import learner, measures
from experiments.continuing.config import Sequence as Cell
from experiments.continuing.methods import METHODS
from experiments.finetuning import tuner
from experiments.pages import continual as page
from optimizers.gorp import GORP
from tests.experiments.test_labelled import own

TRIANGLE = [[0.9], [0.8, 0.7], [0.6, 0.75, 0.5]]


def test_the_measures_by_hand() -> None:
    assert measures.average(TRIANGLE) == pytest.approx((0.6 + 0.75 + 0.5) / 3)
    assert measures.forgetting(TRIANGLE) == pytest.approx(((0.9 - 0.6) + (0.7 - 0.75)) / 2)
    assert measures.transfer(TRIANGLE) == pytest.approx(((0.6 - 0.9) + (0.75 - 0.7)) / 2)
    later = [[0.5], [0.9, 0.7], [0.6, 0.75, 0.5]]
    assert measures.forgetting(later) == pytest.approx(((0.9 - 0.6) - 0.05) / 2), "the best before, not the first"
    assert measures.forgetting(later) >= -measures.transfer(later)
    assert measures.forgetting([[0.4]]) == measures.transfer([[0.4]]) == 0


@pytest.mark.parametrize("rows", [[], [[0.5, 0.5]], [[0.5], [0.5]]])
def test_what_is_no_triangle_is_refused(rows: list[list[float]]) -> None:
    for measure in (measures.average, measures.forgetting, measures.transfer):
        with pytest.raises(ValueError, match=r"row i needs those of tasks 1 … i"):
            measure(rows)


@pytest.fixture
def small(bert: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> continual.Config:
    """Cells are trained in this process."""

    def train(cells: Sequence[Cell], *rest: Any) -> None:
        job: grid.Job = rest[-1]
        for cell in dict.fromkeys(cells):
            grid._cell(job.main, cell)

    monkeypatch.setattr(grid, "train", train)
    labels = ("low", "middle", "high")
    texts = [(f"w{i} w{i + 2} w{i + 5}", labels[i % 3]) for i in range(60)]
    other = own(tmp_path / "three", texts[:48], texts[48:])
    return continual.Config(
        name="small", model=str(bert), task=(str(folder), str(other)), examples=12, tests=8, length=16, rank=2, refresh_every=2, trials=3,
        seed=(0, 1, 2), steps=3, sequences=4, method=tuple(METHODS), runs_dir=tmp_path, quiet=True,
    )  # fmt: skip


def test_a_comparison_in_small(small: continual.Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = continual.main(small)
    rows = run.rows()
    of = lambda kind: [row for row in rows if row["kind"] == kind]  # noqa: E731
    for label in small.method:
        trials = [row for row in of("trial") if row["label"] == label]
        assert len({row["lr"] for row in trials}) == 3 and sum(row["chosen"] for row in trials) == 1
        (best,) = (row for row in trials if row["chosen"])
        assert best["loss"] == min(row["loss"] for row in trials)
        finals = [row for row in of("final") if row["label"] == label]
        assert [row["seed"] for row in finals] == [0, 1, 2] and {row["lr"] for row in finals} == {best["lr"]}
        for one in finals:
            a = {
                (row["after"], row["task"]): row["accuracy"]
                for row in of("accuracy")
                if (row["label"], row["seed"]) == (label, one["seed"])
            }
            assert one["average"] == pytest.approx((a[1, 0] + a[1, 1]) / 2)
            assert set(a) == ({(1, 0), (1, 1)} if label == "joint" else {(0, 0), (1, 0), (1, 1)})
            assert math.isnan(one["forgetting"]) if label == "joint" else one["forgetting"] == pytest.approx(a[0, 0] - a[1, 0])
            assert (one["directions"] > 0) == (one["basis_bytes"] > 0) == (label in ("gorp", "protected"))
    difference = {(row["measure"], row["label"], row["reference"]): row["difference"] for row in of("paired")}
    mean = lambda label: sum(row["average"] for row in of("final") if row["label"] == label) / 3  # noqa: E731
    assert difference["average", "gorp", "lora"] == pytest.approx(mean("gorp") - mean("lora"))
    assert ("forgetting", "joint", "adamw") not in difference and ("average", "adamw", "adamw") not in difference
    assert continual.main(small).path == run.path and run.rows() == rows

    told = page.lines(page.merged({kind: pd.DataFrame(of(kind)) for kind in page.KINDS}))
    assert {line["method"] for line in told} == set(small.method) and {"ACC − lora", "F − adamw"} <= set(told[0])
    assert "<svg" in page.section(run, rows)
    assert cli.main(["publish", str(run.path), "--out", str(tmp_path / "results")]) == 0
    assert {file.name for file in (tmp_path / "results" / "continual").iterdir()} == {
        "small.json",
        *(f"small-{kind}.csv" for kind in page.KINDS),
    }
    assert page.markdown("small", tmp_path / "results").count("\n| `") == len(METHODS)
    assert page.figure_of("small", tmp_path / "results") is not None and page.markdown("other", tmp_path / "results") == "not yet run"
    cells = sorted(map(str, (tmp_path / "cells").iterdir()))
    assert cli.main(["report", str(run.path), *cells[:2], "--out", str(tmp_path / "report.html")]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("method", [name for name in METHODS if name != "joint"])
def test_matrices_and_the_head_whose_turn_it_is_are_trained_and_nothing_else(small: continual.Config, method: str) -> None:
    cell = continual.trial(small, method, 1e-2)
    one = learner.Learner(cell, learner.opened(cell))
    before = {name: value.detach().clone() for name, value in one.objective.model.named_parameters()}
    for step in range(2):
        one._one(0, step, 1.0)
    moved = {name for name, value in one.objective.model.named_parameters() if name in before and not torch.equal(value, before[name])}
    assert any("heads.0" in name for name in moved) and not any("heads.1" in name for name in moved)
    kept = ("embeddings", "LayerNorm", "bias")
    assert not [name for name in moved if "heads" not in name and any(word in name for word in kept)]
    (layers := [name for name in moved if "encoder" in name]).sort()
    assert layers or method == "lowrank"  # whose B is zero again, and whose weights are moved by it
    assert one.way.trained == sum(p.numel() for p in one.objective.model.parameters() if p.requires_grad)


def test_gorp_keeps_a_layer_at_protected_inputs_through_the_next_task(small: continual.Config) -> None:
    """In the model, in float32: outputs of every adapted layer at the directions of P, relative to those of the layer."""
    cell = replace(continual.trial(small, "gorp", 1e-2), energy=1.0)
    one = learner.Learner(cell, learner.opened(cell))
    optimizer = one.optimizer
    assert isinstance(optimizer, GORP)
    one._one(0, 0, 1.0)
    one._one(0, 1, 1.0)
    one._end(0)
    layers: Any = one.way.method.layers  # pyright: ignore[reportAttributeAccessIssue]
    one.objective.eval()
    say = lambda layer, X: (layer(X) - layer.base_layer.bias).detach()  # noqa: E731
    bases = [optimizer.basis_of(layer.base_layer.weight) for layer in layers]
    before = [say(layer, P.mT) for layer, P in zip(layers, bases, strict=True) if P is not None]
    weights = [layer.base_layer.weight.detach().clone() for layer in layers]
    for step in range(3):
        one._one(1, step, 1.0)
    one.objective.eval()
    after = [say(layer, P.mT) for layer, P in zip(layers, bases, strict=True) if P is not None]
    assert len(before) == len(layers) and all(P is not None and P.shape[1] >= 2 for P in bases)
    rounding = 100 * torch.finfo(torch.float32).eps
    for layer, W, then, now in zip(layers, weights, before, after, strict=True):
        scale = torch.linalg.matrix_norm(W)
        assert torch.linalg.matrix_norm(now - then) < rounding * scale
        assert torch.linalg.matrix_norm(layer.base_layer.weight - W) > 10 * rounding * scale, "the weight has moved"


def test_batches_are_those_of_fine_tuning() -> None:
    seen = [tuner.drawn(10, 4, 3, step) for step in range(5)]
    flat = [place for places in seen for place in places]
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10)) and seen == [tuner.drawn(10, 4, 3, step) for step in range(5)]
    assert sorted(tuner.drawn(3, 8, 3, 0)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": ()}, "nothing to compare"),
        ({"method": ("gorp", "gorp")}, "a method is named twice: gorp, gorp"),
        ({"method": ("galore",)}, "unknown method 'galore', known are adamw, protected"),
        ({"method": ("lora:0.9",)}, "only gorp and protected have a share"),
        ({"method": ("gorp:2",)}, r"energy must be in \(0, 1\], got 2.0"),
        ({"task": ("imdb", "imdb")}, "a task is named twice"),
        ({"task": ()}, "task needs at least one value"),
        ({"seed": (1000,)}, "seed 1000 is the tuning seed"),
        ({"trials": 2}, "trials must be at least 3"),
        ({"examples": 1}, "examples must be at least 2"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"length": 2}, "length must be at least 4"),
    ],
)
def test_comparisons_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        continual.Config(**fields)


def test_what_is_refused_leaves_no_run(small: continual.Config, tmp_path: Path) -> None:
    for fields, message in (({"task": ("nowhere",)}, "there is no task"), ({"examples": 2}, "examples=2 is not one of each")):
        with pytest.raises(runs.WrongInput, match=message):
            continual.main(replace(small, **fields))
    assert not list(tmp_path.glob("continual-*")) and not (tmp_path / "cells").exists()


def test_every_preset_names_methods_that_exist() -> None:
    for config in continual.PRESETS.values():
        for label in config.method:
            rates = continual.first(config, label)
            assert len(set(rates)) == 3 and continual.trial(config, label, rates[0]).method in METHODS
