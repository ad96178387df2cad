"""The runs behind a scaling law: every method, size, token count and seed, each with a schedule of its own, and the learning rates they take.

A model of one size is one comparison of ``lowrank compare`` with one length of training after another; its cells are that question's cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from experiments import compare, pretrain, publish, runs
from experiments.comparison import outcomes, plan, search
from experiments.comparison.outcomes import Contender
from experiments.training import models

if TYPE_CHECKING:
    from experiments.scaling import Config

CARRIED = 4  # learning rates tried at every size but the first
Train = Callable[[list[pretrain.Config], str], None]


@dataclass(frozen=True)
class Point:
    """One run to its own end: whose, of which model, on how many tokens."""

    one: Contender
    model: str
    tokens: int
    cell: pretrain.Config


def comparison(config: Config, model: str, tokens: int) -> compare.Config:
    """All methods on one model for one number of tokens."""
    batch = config.sequences * config.length
    if tokens % batch or config.tune_tokens % batch:
        raise ValueError(
            f"tokens={tokens} and tune_tokens={config.tune_tokens} must be multiples of sequences × length = {config.sequences} × {config.length}"
        )
    shared = ("law", "baselines", "state", "seed", "trials", "other_lr", "sequences", "length", "eval_tokens", "data", "precision")
    return compare.Config(
        model=model,
        rank=(config.rank,),
        refresh_every=(config.refresh_every,),
        search="climb",
        steps=tokens // batch,
        tune_steps=config.tune_tokens // batch,
        evaluations=1,
        **{name: getattr(config, name) for name in (*shared, "device", "workers", "runs_dir", "quiet")},
    )


def contenders(config: Config) -> list[Contender]:
    """Everyone, the same at every size."""
    return plan.contenders(comparison(config, config.model[0], config.tokens[0]))


def chosen(config: Config, train: Train) -> tuple[dict[tuple[Contender, str], pretrain.Config], list[dict[str, Any]]]:
    """(method, model) → a run with the learning rate it is to take, and rows ``trial`` of how that was found.

    Given and searched ones are the same at every size. Tuned ones are tuned at every size, on equal budgets: at the first, ``trials`` learning rates
    from each method's own default on, at every further one ``CARRIED`` from what the size before chose.
    """
    found, rows = {}, []
    before: dict[Contender, float] = {}
    for model in config.model:
        bases = {one: plan.trials(comparison(config, model, config.tokens[0]), one)[0] for one in contenders(config)}
        if config.lr or config.searched:
            found |= {(one, model): _given(config, one, base) for one, base in bases.items()}
            continue
        rates = {one: search.around(before[one]) if one in before else search.first(one.method) for one in bases}
        tuning = {one: [replace(base, lr=lr) for lr in rates[one]] for one, base in bases.items()}
        further = (CARRIED if before else config.trials) - 3
        mine, best = search.tuned(tuning, further, outcomes.tail, outcomes.tuned, lambda cells: train(cells, "tune"))
        rows += [{**row, "model": model, "tokens": config.tune_tokens} for row in mine]
        found |= {(one, model): trial for one, trial in best.items()}
        before = {one: trial.lr for one, trial in best.items()}
    return found, rows


def _given(config: Config, one: Contender, base: pretrain.Config) -> pretrain.Config:
    if config.lr:
        return replace(base, lr=config.lr[one.label])
    table = publish.committed(f"compare/{config.searched}-trial")
    mine = table[(table.label == one.label) & table.chosen]
    if mine.empty:
        raise runs.WrongInput(
            f"compare/{config.searched} has no {one.label}; it has {', '.join(dict.fromkeys(table.label))}, or give --lr, or neither to tune"
        )
    row = mine.iloc[0]
    return replace(base, lr=float(row.lr), **({"c": float(row.c)} if row.c == row.c else {}))


def lengths(config: Config, model: str) -> list[int]:
    """Numbers of tokens that a model is trained on: all, as far as 6ND stays within ``compute``."""
    most = math.inf if config.compute is None else config.compute
    return [tokens for tokens in config.tokens if 6 * models.parameters(model) * tokens <= most]


def points(config: Config, chosen: dict[tuple[Contender, str], pretrain.Config]) -> list[Point]:
    """Every run of the grid, seed by seed."""
    return [
        Point(one, model, tokens, replace(plan.compared(comparison(config, model, tokens), trial, seed), measure_every=0))
        for seed in config.seed
        for (one, model), trial in chosen.items()
        for tokens in lengths(config, model)
    ]
