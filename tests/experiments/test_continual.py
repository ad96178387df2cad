"""Tasks in sequence: the measures by hand, what is trained and what stays, the comparison in small, and its page."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from experiments import cli, continual, runs
from experiments.comparison import grid, outcomes
from experiments.continuing import learner, measures
from experiments.continuing.config import Sequence as Cell
from experiments.continuing.methods import METHODS
from experiments.finetuning import objectives, tuner
from experiments.pages import continual as page
from experiments.pages.figures import svg
from experiments.text import labelled
from optimizers.gorp import GORP
from optimizers.protected import Protecting
from tests.experiments.test_labelled import own

TRIANGLE = [[0.9], [0.8, 0.7], [0.6, 0.75, 0.5]]


def test_the_measures_by_hand() -> None:
    assert measures.average(TRIANGLE) == pytest.approx((0.6 + 0.75 + 0.5) / 3)
    assert measures.learned(TRIANGLE) == pytest.approx((0.9 + 0.7 + 0.5) / 3)
    assert measures.forgetting(TRIANGLE) == pytest.approx(((0.9 - 0.6) + (0.7 - 0.75)) / 2)
    assert measures.transfer(TRIANGLE) == pytest.approx(((0.6 - 0.9) + (0.75 - 0.7)) / 2)
    later = [[0.5], [0.9, 0.7], [0.6, 0.75, 0.5]]
    assert measures.forgetting(later) == pytest.approx(((0.9 - 0.6) - 0.05) / 2), "the best before, not the first"
    assert measures.forgetting(later) >= -measures.transfer(later)
    assert measures.forgetting([[0.4]]) == measures.transfer([[0.4]]) == 0


@pytest.mark.parametrize("rows", [[], [[0.5, 0.5]], [[0.5], [0.5]]])
def test_what_is_no_triangle_is_refused(rows: list[list[float]]) -> None:
    for measure in (measures.average, measures.learned, measures.forgetting, measures.transfer):
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
            assert math.isnan(one["learned"]) if label == "joint" else one["learned"] == pytest.approx((a[0, 0] + a[1, 1]) / 2)
            assert math.isnan(one["forgetting"]) if label == "joint" else one["forgetting"] == pytest.approx(a[0, 0] - a[1, 0])
            assert (one["directions"] > 0) == (one["basis_bytes"] > 0) == (label in ("gorp", "protected"))
    difference = {(row["measure"], row["label"], row["reference"]): row["difference"] for row in of("paired")}
    mean = lambda label: sum(row["average"] for row in of("final") if row["label"] == label) / 3  # noqa: E731
    assert difference["average", "gorp", "lora"] == pytest.approx(mean("gorp") - mean("lora"))
    assert ("forgetting", "joint", "adamw") not in difference and ("average", "adamw", "adamw") not in difference
    assert continual.main(small).path == run.path and run.rows() == rows

    told = page.lines(page.merged({kind: pd.DataFrame(of(kind)) for kind in page.KINDS}))
    assert {line["method"] for line in told} == set(small.method) and {"ACC − lora [95 %]", "F − adamw [95 %]"} <= set(told[0])
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


@pytest.fixture
def learnt(small: continual.Config) -> Callable[..., learner.Learner]:
    """A sequence that is over: by method, with other fields of its cell."""

    def over(method: str, **fields: Any) -> learner.Learner:
        cell = replace(continual.trial(small, method, 1e-2), **fields)
        one = learner.Learner(cell, learner.opened(cell))
        one.train()
        return one

    return over


@pytest.mark.parametrize("tests", [0, 8])
def test_every_task_is_asked_with_its_own_head_and_examples(
    learnt: Callable[..., learner.Learner], monkeypatch: pytest.MonkeyPatch, tests: int
) -> None:
    """On validation examples at the end, or on test examples after each task; none of them is trained on."""
    asked: list[tuple[int, list[Any]]] = []

    def score(self: Any, items: list[Any], at_once: int) -> dict[str, float]:
        del at_once
        asked.append((self.model.classifier.task, items))
        return {"loss": 0.0, "accuracy": 0.0}

    monkeypatch.setattr(objectives.Objective, "score", score)
    one = learnt("adamw", tests=tests)
    assert [task for task, _ in asked] == ([0, 0, 1] if tests else [0, 1])
    for task, items in asked:
        name = one.config.task[task]
        split = labelled.split(labelled.find(name), 12 // len(labelled.find(name).labels), one.config.seed, tests)
        assert items == one.objective.items(split.test if tests else split.validation)
        assert one.items[task]["training"] == one.objective.items(split.training) != items
    assert [row["chance"] for row in one.run.rows() if row["kind"] == "accuracy"][-1] == pytest.approx(learner.chance(asked[-1][1]))


def test_chance_is_one_answer_for_all() -> None:
    assert learner.chance([{"labels": label} for label in (0, 1, 1, 2)]) == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_moments_are_forgotten_after_a_task_and_joint_learns_each_as_long(learnt: Callable[..., learner.Learner], method: str) -> None:
    one = learnt(method)
    left = {key for state in one.optimizer.state.values() for key in state}
    assert left <= {"draws", "P"} and ("P" in left) == (method in ("gorp", "protected"))
    rows = [row["task"] for row in one.run.rows() if row["kind"] == "train"]
    order = [0, 1] * 3 if method == "joint" else [0] * 3 + [1] * 3
    assert rows == [one.config.task[task] for task in order]


def test_state_and_basis_are_of_one_moment(learnt: Callable[..., learner.Learner]) -> None:
    """Two moments of all that one task trains, and P after the last task."""
    one = learnt("protected")
    (end,) = (row for row in one.run.rows() if row["kind"] == "end")
    matrices = sum(p.numel() for p in one.way.method.matrices())
    head = max(sum(p.numel() for p in head.parameters()) for head in one.heads.heads)
    assert end["state_bytes"] == 4 * 2 * (matrices + head) + end["basis_bytes"]
    assert (
        end["basis_bytes"] == sum(4 * W.shape[1] * P.shape[1] for W in one.way.method.matrices() if (P := _basis(one, W)) is not None) > 0
    )


def _basis(one: learner.Learner, W: torch.Tensor) -> torch.Tensor | None:
    assert isinstance(one.optimizer, Protecting)
    return one.optimizer.basis_of(W)


def test_the_schedule_is_the_one_that_is_asked_for(learnt: Callable[..., learner.Learner]) -> None:
    assert {group["lr"] for group in learnt("adamw", warmup=0.0, final_lr=1.0, other_lr=None).optimizer.param_groups} == {1e-2}
    assert all(group["lr"] < 1e-2 for group in learnt("adamw", other_lr=None).optimizer.param_groups)


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
    batch = one.objective.batch(one.items[0]["training"])
    one.objective.eval()
    said = one.objective.logits(batch).detach()
    one._end(0)
    one.heads.task = 0
    torch.testing.assert_close(one.objective.logits(batch).detach(), said, rtol=0, atol=1e-5)  # with the adapters' own scale
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


def rows(**accuracy: tuple[float, float]) -> dict[str, pd.DataFrame]:
    """A comparison of two seeds on one task after another, of which only the second is forgotten."""
    finals, after = [], []
    for label, just in accuracy.items():
        for seed, value in enumerate(just):
            finals.append({"label": label, "lr": 0.1, "seed": seed, "average": value, "learned": value or math.nan, "chance": 0.5})
            finals[-1] |= {"forgetting": 0.1 * seed if value else math.nan, "transfer": -0.1 * seed if value else math.nan}
            finals[-1] |= {"seconds": 1.0 if value else math.nan}
            if value:
                after.append({"label": label, "seed": seed, "after": 0, "task": 0, "name": "a", "accuracy": value, "chance": 0.5})
                after.append({"label": label, "seed": seed, "after": 1, "task": 0, "name": "a", "accuracy": 0.1, "chance": 0.5})
    references = {label: [other for other in accuracy if other != label] for label in accuracy}
    paired = [{**row, "measure": "average"} for row in outcomes.paired(finals, references, of="average")]
    trial = [{"label": label, "chosen": True, "at_edge": label == "gorp"} for label in accuracy]
    return {"trial": pd.DataFrame(trial), "accuracy": pd.DataFrame(after), "final": pd.DataFrame(finals), "paired": pd.DataFrame(paired)}


def test_what_is_said_of_the_rows() -> None:
    said = "\n".join(page.findings(rows(adamw=(0.9, 0.9), gorp=(0.8, 0.8), lora=(0.6, 0.5))))
    assert "not told apart from chance just after learning" in said and "`lora` on a (+5.0 ± 63.5)" in said and "`gorp` on" not in said
    assert "ACC: of 3 differences 1 has an interval without zero: `adamw` − `gorp` +10.0 [+10.0, +10.0]" in said
    assert (
        "the 3 intervals of differences are not corrected for their number" in said
        and "smallest or largest tried" in said.split("`gorp`")[-2]
    )
    every = page.findings(rows(adamw=(0.9, 0.9), gorp=(0.8, 0.8)))[0]
    assert "every method is above chance on every task" in every


def test_a_seed_that_diverged_is_not_learnt_at_once() -> None:
    kinds = rows(adamw=(0.9, 0.9), gorp=(0.8, 0.0))
    (row,) = (row for row in page.merged(kinds) if row["method"] == "gorp")
    assert row["average"] == 0.4 and row["learned"] == 0.8 and row["forgetting"] == 0.0 and row["diverged"] == 1
    assert "`gorp` (1 of 2 seeds)" in "\n".join(page.findings(kinds))
    assert "`joint` (1 of 2 seeds)" in "\n".join(page.findings(rows(adamw=(0.9, 0.9), joint=(0.8, 0.0))))
    across = lambda figure: [line.get_label() for line in figure.axes[-1].lines if not str(line.get_label()).startswith("_")]  # noqa: E731
    assert across(page.drawn(kinds, ["a"])) == []
    assert across(page.drawn(rows(adamw=(0.9, 0.9), joint=(0.8, 0.8)), ["a"])) == ["joint"]


@pytest.mark.parametrize("name", page.COMMITTED)
def test_the_figure_is_of_the_committed_rows(name: str) -> None:
    figure, found = page.figure_of(name), page.committed(name)
    assert figure is not None and found is not None
    shown = (page.RESULTS / "continual" / f"{name}.svg").read_text(encoding="utf-8")
    labels = [ax.get_title() for ax in figure.axes] + [str(label) for label in found[0]["final"].label.unique()]
    assert labels and all(f">{label}<" in shown for label in labels)
    points = lambda text: re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)"', text)  # noqa: E731
    again = [tuple(map(float, point)) for point in points(svg(figure))]
    assert len(again) > 20 and again == [pytest.approx(tuple(map(float, point)), abs=0.1) for point in points(shown)]
