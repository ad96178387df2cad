"""The training whose spectra are taken, its model at every moment, and which local data a run has read."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from experiments import pretrain, runs
from experiments.comparison.plan import TUNING_SEED
from experiments.finetuning import tuner
from experiments.text import corpus
from experiments.training import checkpoint, models

if TYPE_CHECKING:
    from experiments.ranks import Config


def text_sha256(data: str) -> str:
    """Of what a folder built by ``lowrank data`` says of its files, which are compared with it when they are read; empty for the default corpus."""
    manifest = Path(data) / "manifest.json"
    return runs.sha256(manifest) if data != corpus.MOVIE_REVIEWS and manifest.exists() else ""


def data_sha256(config: Config) -> str:
    """Of the local data of all parts of the run; empty where it has none."""
    sums = [text_sha256(config.data), tuner.local_sha256(config.finetune_task, None) if "finetune" in config.tasks else ""]
    return hashlib.sha256(" ".join(sums).encode()).hexdigest() if any(sums) else ""


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
