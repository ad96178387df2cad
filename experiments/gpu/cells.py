"""What is measured and trained on a CUDA device, in order of what it tells, and how long each cell may take.

Fixed before any of it was run. Each training cell: 100 M tokens in steps of 128 × 256, bf16 products with float32 weights, r/n of every
layer, K = 20, for the spectral law a full gradient at every tenth redraw, optimizer state by ``row_scale``, c = 1 (under Adam the step of a
projected layer is then, entry by entry, as large as full AdamW's). The one tuned knob is the learning rate: every contender has the same four
trials of 150 steps on 20m at r/n = 1/4 with a seed that is not compared, and takes the one with the smallest mean training loss over the last
fifth; at other sizes it is scaled by the ratio of the presets' learning rates, at other ranks and seeds it is kept. Times:
``experiments.gpu.measure``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, Literal

from estimators import LAWS
from experiments import pretrain
from experiments.comparison.outcomes import TAIL
from experiments.training import models
from experiments.training.options import Precision

TUNING_SEED = 1000  # none of the seeds that are compared
RATE, SHARE = 7.5e14, 0.15  # dense bf16 operations a second of an H200, and the share of them assumed until a cell has shown its speed
BEGIN = 10.0  # seconds assumed for building a model and its optimizer
COMPILING = 60.0  # and for compiling one


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of the whole plan; the defaults are what is reported."""

    models: tuple[str, ...] = ("20m", "60m", "100m")
    ranks: tuple[float, ...] = (0.25, 0.125)
    laws: tuple[str, ...] = ("haar_stiefel", "gaussian", "spectral", "coordinate")
    seeds: tuple[int, ...] = (0, 1)
    tokens: int = 100_000_000
    sequences: int = 128
    length: int = 256
    refresh_every: int = 20
    basis_every: int = 10
    tune_model: str = "20m"
    tune_steps: int = 150
    lr: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    judged_model: str = "100m"
    memory_model: str = "350m"
    memory_sequences: int = 64
    repeats: int = 5
    eval_tokens: int = 2**20  # more than are held out: all of them
    evaluations: int = 4
    precision: Precision = "bf16"
    compile: bool = False
    device: str = "cuda"

    @property
    def steps(self) -> int:
        """Optimizer steps of a training cell, the last of which completes ``tokens``."""
        return math.ceil(self.tokens / (self.sequences * self.length))


@dataclass(frozen=True)
class Cell:
    """One entry of the plan. ``contender``: a law, or adamw; all of them for ``time`` and ``memory``. ``lr``: of a trial only."""

    kind: Literal["time", "memory", "tune", "train"]
    model: str
    contender: str = ""
    rank: float | None = None
    seed: int | None = None
    lr: float | None = None
    compile: bool = False

    @property
    def name(self) -> str:
        """In words, one for each cell: what files and tables call it."""
        parts = [self.kind, self.model, self.contender, "" if self.rank is None else f"r={self.rank:g}n"]
        parts += ["" if self.seed is None else f"seed={self.seed}", "" if self.lr is None else f"lr={self.lr:g}"]
        return " ".join(part for part in [*parts, "compiled" * self.compile] if part)

    @property
    def divisible(self) -> bool:
        """Whether it can stop at a checkpoint and go on; times taken side by side cannot."""
        return self.kind == "train"


def contenders(settings: Settings) -> tuple[str, ...]:
    """Full AdamW first, then the laws."""
    return ("adamw", *settings.laws)


def plan(settings: Settings) -> list[Cell]:
    """Every cell, the most telling first: what the targets are judged by, the learning rates, r/n = 1/4 of each model, the next r/n, the next
    seed. Times of a model stand before its training."""
    first, (model, *_) = settings.ranks[0], settings.models
    cells = [time_cell(settings, settings.judged_model, first), Cell("memory", settings.memory_model, rank=first)]
    cells += [Cell("tune", settings.tune_model, one, _rank(one, first), lr=lr) for one in contenders(settings) for lr in settings.lr]
    for seed, rank in product(settings.seeds, settings.ranks):
        for model in settings.models:
            if seed == settings.seeds[0]:
                cells.append(time_cell(settings, model, rank))
            cells += [train_cell(settings, model, one, rank, seed) for one in contenders(settings)]
        if (seed, rank) == (settings.seeds[0], first):
            cells += [Cell("time", settings.judged_model, rank=first, compile=not settings.compile)]
        if seed == settings.seeds[0] and rank != first:
            cells.append(Cell("memory", settings.memory_model, rank=rank))
    return list(dict.fromkeys(cells))


def time_cell(settings: Settings, model: str, rank: float) -> Cell:
    """The cell that times every contender on ``model`` side by side."""
    return Cell("time", model, rank=rank, compile=settings.compile)


def train_cell(settings: Settings, model: str, contender: str, rank: float, seed: int) -> Cell:
    """The training cell of these values; full AdamW has no rank."""
    return Cell("train", model, contender, _rank(contender, rank), seed, compile=settings.compile)


def _rank(contender: str, rank: float) -> float | None:
    return None if contender == "adamw" else rank


def config(settings: Settings, cell: Cell, data: Path, runs_dir: Path, lr: float, **changed: Any) -> pretrain.Config:
    """The training configuration of one contender; ``changed``: other fields."""
    tuning = cell.kind == "tune"
    steps = settings.tune_steps if tuning else settings.steps
    values: dict[str, Any] = {
        "model": cell.model,
        "method": "adamw" if cell.contender == "adamw" else "lowrank",
        "refresh_every": settings.refresh_every,
        "basis_every": settings.basis_every,
        "state": "row_scale",
        "lr": lr,
        "steps": steps,
        "sequences": settings.sequences,
        "length": settings.length,
        "precision": settings.precision,
        "compile": cell.compile,
        "seed": TUNING_SEED if cell.seed is None else cell.seed,
        "data": str(data),
        "eval_every": 0 if tuning else max(1, steps // settings.evaluations),
        "eval_tokens": settings.length if tuning else settings.eval_tokens,
        "measure_every": 0,
        "checkpoint_every": 0,  # a part that ends in time saves; nothing outlives a device that goes away
        "keep_checkpoints": 1,
        "save_model": False,
        "device": settings.device,
        "runs_dir": runs_dir,
        "quiet": True,
    }
    if cell.contender not in ("", "adamw"):
        values |= {"law": cell.contender, "rank": cell.rank}
    return pretrain.Config(**values | changed)


def learning_rate(settings: Settings, cell: Cell, found: Mapping[str, Mapping[str, Any]]) -> tuple[float, bool] | None:
    """(learning rate of a training cell, whether tuning chose the smallest or largest of its trials); None before tuning is over.

    ``found``: cell name → its record. A trial that diverged counts as an infinite loss.
    """
    rank = _rank(cell.contender, settings.ranks[0])
    records = {lr: found.get(Cell("tune", settings.tune_model, cell.contender, rank, lr=lr).name, {}) for lr in settings.lr}
    losses = {
        lr: float(record["row"].get("loss", math.inf)) for lr, record in records.items() if "row" in record
    }  # a failed one has no row
    if len(losses) < len(records) or min(losses.values()) == math.inf:
        return None
    best = min(losses, key=lambda lr: losses[lr])
    scale = pretrain.PRESETS[cell.model].lr / pretrain.PRESETS[settings.tune_model].lr
    return float(f"{best * scale:.6g}"), best in (min(settings.lr), max(settings.lr))


def tail_loss(rows: list[dict[str, Any]], steps: int) -> float:
    """Mean training loss over the last ``TAIL`` of ``steps``: what a trial is chosen by."""
    losses = [row["loss"] for row in rows if row["kind"] == "train"][-max(1, int(TAIL * steps)) :]
    return sum(losses) / len(losses) if losses else math.inf


# how long


def tokens_of(settings: Settings, cell: Cell) -> int:
    """Tokens that a cell trains or times, summed over its contenders."""
    batch = settings.sequences * settings.length
    if cell.kind == "train":
        return settings.steps * batch
    if cell.kind == "tune":
        return settings.tune_steps * batch
    if cell.kind == "memory":
        return len(contenders(settings)) * 2 * settings.refresh_every * settings.memory_sequences * settings.length
    everyone = timed(settings, cell)
    fitted = sum(one in LAWS and LAWS[one].fitted for one in everyone)  # timed with and without a full gradient
    return (len(everyone) + fitted) * (settings.repeats + 3) * settings.refresh_every * batch


def timed(settings: Settings, cell: Cell) -> tuple[str, ...]:
    """Who is timed side by side: everyone, but only two where the other way of compiling is tried."""
    return contenders(settings)[:2] if cell.compile != settings.compile else contenders(settings)


def flops_per_token(model: str, length: int) -> float:
    """Operations of full training: 6 a matrix weight beside the embedding, and attention."""
    preset = models.PRESETS[model]
    matrices = models.parameters(model) - preset["vocab_size"] * preset["hidden_size"]
    return 6 * matrices + 12 * preset["num_hidden_layers"] * preset["hidden_size"] * length


def seconds(settings: Settings, cell: Cell, found: Mapping[str, Mapping[str, Any]]) -> float:
    """Estimated seconds of a cell: by the tokens a second that its model has shown so far, else by operations at ``SHARE`` of ``RATE``."""
    shown = list(_shown(cell.model, found))
    rate = min(shown) if shown else RATE * SHARE / flops_per_token(cell.model, settings.length)
    begin = (BEGIN + COMPILING * cell.compile) * (1 if cell.kind in ("train", "tune") else len(timed(settings, cell)))
    return begin / (2 if cell.kind == "tune" else 1) + tokens_of(settings, cell) / rate


def _shown(model: str, found: Mapping[str, Mapping[str, Any]]) -> Iterator[float]:
    for record in found.values():
        rows = record.get("rows") or [record.get("row", {})]
        yield from (row["tokens_per_second"] for row in rows if row.get("model") == model and row.get("tokens_per_second"))


def as_fields(cell: Cell) -> dict[str, Any]:
    """The cell's own values, for a row of a table."""
    return {field.name: getattr(cell, field.name) for field in fields(cell)}
