"""Ranks at one budget against each other in training: one learning rate each, chosen on equal budgets, then pairs of equal seed.

Everything but the ranks is the same: law, c, K, initialisation, data order, and how many learning rates are tried (experiments/comparison/search.py),
with a seed that is not compared. A cell is a run of ``lowrank pretrain`` or of ``lowrank finetune`` in RUNS_DIR/cells. Uniform ranks are the option
``--rank``, others a file of ``--ranks``.

A step of Adam changes the entries of B (m×r) by η·D, D about ±1, and W by ‖ΔW‖ = η‖DVᵀ‖. With VᵀV = (cn/r)I this is η√(cn/r)·√(mr) = η√(c·mn): at
one c a rank is no step length. At c = r/n of each layer it is η√(mr), and so it is of a biased law, V = √c·Q, at c = 1: a smaller rank then also
means shorter steps, and ranks are not all that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from estimators import LAWS, selection
from experiments import pretrain, runs
from experiments.comparison import grid, outcomes, search
from experiments.comparison.plan import TUNING_SEED
from experiments.finetuning import summary, tuner
from experiments.finetuning.config import Tuning
from experiments.ranking import spectra, training
from experiments.ranking.allotment import TRAINING, Ranks

if TYPE_CHECKING:
    from experiments.ranks import Config

TASKS = ("pretrain", "finetune")


@dataclass(frozen=True, kw_only=True)
class Contest:
    """``base``: a tuning run with uniform ranks, and ``longer``: what of it is otherwise in a compared one; ``score``: what chooses, lower is better;
    ``outcome``: of a finished cell, by name, with ``seconds``."""

    task: str
    rates: tuple[float, ...]
    base: Any
    longer: Mapping[str, Any]
    score: Callable[[Any], float]
    outcome: Callable[[Any], dict[str, float]]
    job: grid.Job

    def trial(self, lr: float) -> Any:
        """The tuning run at one learning rate."""
        return replace(self.base, lr=lr)

    def compared(self, cell: Any, seed: int) -> Any:
        """The run of one seed, of the tuning run that was chosen."""
        return replace(cell, seed=seed, **self.longer)


def pretraining(config: Config) -> Contest:
    """Of the model of the configuration, from random weights; outcome: held-out loss. A run of ``lowrank pretrain`` is known by the name of its text:
    cells of a local one are in a folder of its SHA-256."""
    base = replace(
        pretrain.PRESETS[config.model],
        **_common(config) | {"runs_dir": config.runs_dir / "cells" / training.text_sha256(config.data)[:8]},
        rank=config.rank,
        length=config.length,
        accumulate=1,
        data=config.data,
        measure_every=0,
        eval_tokens=config.eval_tokens,
        save_model=False,
        steps=config.tune_steps,
        sequences=config.sequences,
    )
    return Contest(
        task="pretrain",
        rates=config.lr,
        base=base,
        longer={"steps": config.compare_steps},
        score=outcomes.tail,
        outcome=_held_out,
        job=grid.PRETRAINING,
    )


def _held_out(cell: pretrain.Config) -> dict[str, float]:
    run = pretrain.opened(cell)
    if not run.done:
        return {"loss": float("inf")}
    rows = {row["kind"]: row for row in run.rows()}  # the last of each
    return {"loss": rows["eval"]["loss"], "seconds": rows["end"]["seconds"]}


def finetuning(config: Config) -> Contest:
    """Of a pretrained classifier; outcomes: loss and accuracy on the test examples."""
    base = Tuning(
        **_common(config),
        model=config.finetune_model,
        task=config.finetune_task,
        data_sha256=tuner.local_sha256(config.finetune_task, None),
        rank=config.finetune_rank,
        k=64,
        tests=1,
        steps=config.finetune_steps,
    )
    return Contest(
        task="finetune",
        rates=config.finetune_lr,
        base=base,
        longer={"tests": config.tests},
        score=summary.validation,
        outcome=_tested,
        job=grid.Job(tuner.opened, tuner.tune, lambda _: None),
    )


def _tested(cell: Tuning) -> dict[str, float]:
    row = summary.tested("", cell)
    return {name: row[name] for name in ("loss", "accuracy", "seconds") if name in row}


def _common(config: Config) -> dict[str, Any]:
    return {
        "method": "lowrank",
        "law": config.law,
        "c": 1.0 if config.c == "r/n" and not LAWS[config.law].unbiased else config.c,  # V = √c·Q: columns of length √c at any rank
        "refresh_every": config.refresh_every,
        "state": "row_scale",
        "seed": TUNING_SEED,
        "checkpoint_every": 0,
        "device": config.device,
        "quiet": True,
        "runs_dir": config.runs_dir / "cells",
    }


def held(contest: Contest, found: Mapping[str, Ranks], config: Config, run: runs.Run) -> list[dict[str, Any]]:
    """Train it all; rows ``trial``, ``final`` and ``paired``, each choice of ranks against uniform ones."""
    tuning = {by: [_with(contest.trial(lr), by, found[by], contest.task, run) for lr in contest.rates] for by in TRAINING}
    train = lambda cells, stage="tune": grid.train(cells, config.workers, f"{contest.task}: {stage}", config.quiet, contest.job)  # noqa: E731
    named = {"task": contest.task}

    def told(by: str, some: list[Any]) -> list[dict[str, Any]]:
        rows = search.judged(some, contest.score)
        return [{"kind": "trial", **named, "label": by, "lr": cell.lr, **row} for cell, row in zip(some, rows, strict=True)]

    trials, chosen = search.tuned(tuning, config.further, contest.score, told, train)
    compared = {by: [contest.compared(cell, seed) for seed in config.seed] for by, cell in chosen.items()}
    train([cell for some in compared.values() for cell in some], "compare")
    finals: list[dict[str, Any]] = [
        {"kind": "final", **named, "label": by, "lr": cell.lr, "seed": cell.seed, "steps": cell.steps, **contest.outcome(cell)}
        for by, some in compared.items()
        for cell in some
    ]
    references = {by: [] if by == TRAINING[0] else [TRAINING[0]] for by in TRAINING}
    measures = [name for name in ("loss", "accuracy") if name in finals[0]]
    paired = [{**row, **named, "of": of} for of in measures for row in outcomes.paired(finals, references, of=of)]
    return [*trials, *finals, *paired]


def _with(cell: Any, by: str, ranks: Ranks, task: str, run: runs.Run) -> Any:
    """The cell with these ranks, which the run keeps as a file."""
    if by == TRAINING[0]:
        return cell
    path: Path = run.path / f"{task}-{by}.json"
    if not path.exists() or run.read(path.name) != ranks:
        run.write(path.name, ranks)
    return replace(cell, ranks=path)


def finetuned_moment(contest: Contest, count: int, seed: int) -> spectra.Moment:
    """Weights and gradients of the pretrained model before the first step, with the head and the examples of the tuning seed."""
    config: Tuning = contest.trial(contest.rates[0])
    objective, split = tuner.asked(config)
    objective.to(runs.device(config.device)).eval()  # the noise of dropout would count as that of the text
    items = objective.items(split.training)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    size = min(config.sequences, len(items) // count)
    names = list(selection.choose(objective.model, None, 1)[0])

    def loss(model: nn.Module, number: Tensor) -> Tensor:
        del model
        start = int(number) * size
        return objective(objective.batch([items[place] for place in order[start : start + size]]))

    return spectra.moment(0, objective.model, names, torch.tensor, count, 1, loss=loss, seed=seed)
