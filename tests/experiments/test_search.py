"""The search for a learning rate: around the default, then where the losses lead, with equally many trials for everyone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from experiments import compare, pretrain
from experiments.comparison import grid, search
from optimizers import OPTIMIZERS


def test_it_begins_around_the_default_of_a_method() -> None:
    assert search.first("galore") == [0.00316, 0.01, 0.0316] and search.first("adamw") == [0.000949, 0.003, 0.00949]
    assert search.first("ldadam") == search.first("lisa") == search.first("adamw")  # whose defaults are for large models
    assert all(search.start(name) > 0 for name in OPTIMIZERS)


@pytest.mark.parametrize(
    "losses, expected",
    [
        ({1.0: 3.0, 3.0: 2.0, 9.0: 1.0}, 28.5),  # still falling at the largest: beyond it
        ({1.0: 1.0, 3.0: 2.0, 9.0: math.inf}, 0.316),
        ({1.0: 2.0, 4.0: 1.0, 9.0: 1.5}, 6.0),  # between the best and its better neighbour
        ({1.0: 1.2, 4.0: 1.0, 9.0: math.inf}, 2.0),
    ],
)
def test_it_goes_on_where_losses_fall(losses: dict[float, float], expected: float) -> None:
    assert search.following(losses) == pytest.approx(expected, rel=1e-3)


def test_it_finds_the_minimum_of_a_parabola_from_far_away() -> None:
    losses = {rate: math.log(rate / 2.0) ** 2 for rate in (0.001, 0.00316, 0.01)}
    for _ in range(12):
        rate = search.following(losses)
        assert rate not in losses
        losses[rate] = math.log(rate / 2.0) ** 2
    assert min(losses, key=lambda rate: losses[rate]) == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("fields", [{"lr": (1e-3,)}, {"c": (1.0,)}, {"tune_c": False}, {"lora_scale": (2.0,)}])
def test_what_a_search_does_not_use_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(fields))} would have no effect"):
        compare.Config(search="climb", **fields)


def test_one_loss_is_no_search() -> None:
    with pytest.raises(ValueError, match="needs at least two"):
        search.following({1.0: 2.0})


def test_everyone_has_equally_many_trials(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "train", lambda cells, *_: [pretrain.main(cell) for cell in cells])
    config = compare.Config(
        law=("haar_stiefel",), baselines=("adamw", "muon", "lisa"), search="climb", trials=4, other_lr=2e-3, seed=(0, 1), steps=3, tune_steps=2,
        sequences=2, length=16, eval_tokens=64, data=str(text), runs_dir=tmp_path, quiet=True,
    )  # fmt: skip
    rows = compare.main(config).rows()
    tried = {
        label: [row["lr"] for row in rows if row["kind"] == "trial" and row["label"] == label]
        for label in ("haar_stiefel", "adamw", "muon", "lisa")
    }
    assert all(len(set(rates)) == 4 for rates in tried.values())
    assert tried["muon"][:3] == search.first("muon")
    final = [row for row in rows if row["kind"] == "final"]
    assert len(final) == 8 and all(math.isfinite(row["loss"]) for row in final)


@dataclass(frozen=True)
class Trial:
    lr: float
    steps: int = 5


def test_everyone_climbs_from_what_it_has_seen_itself() -> None:
    """The loss is smallest at 0.1 for one and beyond all rates for the other; trained are all first trials, then one of each at a time."""
    best = {"a": 0.1, "b": 100.0}
    owner: dict[Trial, str] = {}
    tuning = {name: [Trial(rate * (1 + i / 10)) for rate in (0.03, 0.1, 0.3)] for i, name in enumerate(best)}
    trained: list[list[Trial]] = []

    def train(cells: list[Trial]) -> None:
        trained.append(cells)
        owner.update((cell, name) for name, some in tuning.items() for cell in some)

    score = lambda trial: abs(math.log(trial.lr / best[owner[trial]]))  # noqa: E731
    search.climb(tuning, 2, score, train)
    assert [len(cells) for cells in trained] == [6, 2, 2] and [len(some) for some in tuning.values()] == [5, 5]
    assert [trial.lr for trial in tuning["b"]][3:] == [search.rounded(0.33 * search.FACTOR), search.rounded(1.04 * search.FACTOR)]
    assert all(0.03 < trial.lr < 0.3 for trial in tuning["a"][3:])
    for name, some in tuning.items():
        rows = search.judged(some, score)
        (chosen,) = (i for i, row in enumerate(rows) if row["chosen"])
        assert rows[chosen]["loss"] == min(row["loss"] for row in rows) and rows[chosen]["at_edge"] == (name == "b")
        assert {row["steps"] for row in rows} == {5} and sum(row["at_edge"] for row in rows) <= 1
