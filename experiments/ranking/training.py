"""The training whose spectra are taken, and its model at every moment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from experiments import pretrain
from experiments.comparison.plan import TUNING_SEED
from experiments.training import checkpoint, models

if TYPE_CHECKING:
    from experiments.ranks import Config


def source(config: Config, folder: Path) -> pretrain.Config:
    """The training whose spectra are taken, with a checkpoint at every moment."""
    return replace(
        pretrain.PRESETS[config.model], method="adamw", data=config.data, steps=config.steps, lr=config.full_lr, sequences=config.sequences,
        accumulate=1, length=config.length, seed=TUNING_SEED, measure_every=0, eval_tokens=config.eval_tokens, device=config.device, quiet=True,
        runs_dir=folder, checkpoint_every=config.steps // config.moments, keep_checkpoints=config.moments + 1,
    )  # fmt: skip


def moments(config: Config) -> list[int]:
    """The start, and the ends of intervals of one length."""
    return list(range(0, config.steps + 1, config.steps // config.moments))


def model_at(cell: pretrain.Config, step: int) -> nn.Module:
    """The model at a step of the finished cell."""
    run = pretrain.opened(cell)
    model = models.build(cell.model, cell.seed)
    if step == cell.steps:
        with models.quietly():
            return type(model).from_pretrained(run.path / "model")
    if step:
        model.load_state_dict(checkpoint.load(run.path / "checkpoints" / f"checkpoint-{step:08d}")[1]["model"])
    return model
