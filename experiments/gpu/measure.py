"""Times and peaks of whole training steps beside full AdamW, taken in one stretch: the trainer's own steps, redraws and their full gradients
included.

A call is one period of K steps, so redraws weigh 1/K. First each contender's peak: of the second period (optimizer state is there by then),
with a full gradient in it where the law needs any, minus what was held before its model was built. Then periods in turn, ``timing.pairs``:
ratios are medians of ratios within a round; for a fitted law they, and their quartiles, are weighed means of a period with a full gradient
and one without.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from estimators import LAWS
from experiments import runs
from experiments.gpu import cells
from experiments.gpu.cells import Cell, Settings
from experiments.training import cost
from experiments.training.timing import pairs
from experiments.training.trainer import Trainer

STEP_TARGET = 0.9  # of full AdamW's step time, on the judged model
MEMORY_TARGET = 0.7  # of its peak, on the memory model at equal batch
NEVER, FITTING = 10**9, " with full gradient"
LR = 1e-3  # of timed steps; their losses are not used


@dataclass(frozen=True)
class Timed:
    """A trainer and what it holds at most, in bytes."""

    trainer: Trainer
    peak_bytes: int

    def period(self) -> None:
        """K steps with one redraw among them. Raises ``runs.Diverged`` when one was skipped: its time would not be that of a step."""
        for _ in range(self.trainer.config.refresh_every):
            row = self.trainer._step()
            if row["kind"] == "skip":
                raise runs.Diverged(f"{self.trainer.config.model}: a timed step had no finite gradient, in {row['where']}")


def rows(settings: Settings, cell: Cell, data: Path, scratch: Path) -> list[dict[str, Any]]:
    """One row a contender, full AdamW first. ``memory`` cells hold one model at a time, ``time`` cells all of them."""
    if cell.kind == "memory":
        return memory(settings, cell, data, scratch)
    return time(settings, cell, data, scratch)


def memory(settings: Settings, cell: Cell, data: Path, scratch: Path) -> list[dict[str, Any]]:
    """Peak bytes of every contender, alone on the device, and their ratio to full AdamW's."""
    found: dict[str, int] = {}
    for one in cells.contenders(settings):
        found[one] = prepared(settings, cell, one, data, scratch, sequences=settings.memory_sequences, basis_every=1).peak_bytes
        free()
    peer, judged = found["adamw"], cell.model == settings.memory_model
    batch = {"sequences": settings.memory_sequences, "length": settings.length}
    return [
        _named(cell, one)
        | batch
        | {"peak_bytes": peak, "peak_ratio": peak / peer}
        | _judged(judged and one != "adamw", "memory", peak / peer, MEMORY_TARGET)
        for one, peak in found.items()
    ]


def time(settings: Settings, cell: Cell, data: Path, scratch: Path) -> list[dict[str, Any]]:
    """Seconds a step, tokens a second and peak bytes of every contender, and their ratios to full AdamW's.

    A fitted law is timed twice, with a full gradient in every period and with none; what counts is one such period in ``basis_every``.
    """
    everyone = {}
    for one in cells.timed(settings, cell):
        everyone[one] = prepared(settings, cell, one, data, scratch, basis_every=NEVER)
        if fitted(one):
            everyone[f"{one}{FITTING}"] = prepared(settings, cell, one, data, scratch, basis_every=1)
    device = everyone["adamw"].trainer.device
    others: dict[str, Callable[[], None]] = {name: held.period for name, held in everyone.items() if name != "adamw"}
    rows = pairs(everyone["adamw"].period, others, device, settings.repeats)
    found = {row.pop("name").replace("peer", "adamw"): row for row in rows}
    peer, judged = everyone["adamw"].peak_bytes, cell.model == settings.judged_model
    result = []
    for one in cells.timed(settings, cell):
        fitting = f"{one}{FITTING}" if fitted(one) else one
        row = {
            name: value + (found[fitting][name] - value) / settings.basis_every for name, value in found[one].items() if name != "repeats"
        }
        step, peak = row.pop("seconds") / settings.refresh_every, everyone[fitting].peak_bytes
        full = found[fitting]["seconds"] - found[one]["seconds"] if fitted(one) else None
        result.append(
            _named(cell, one)
            | {"sequences": settings.sequences, "length": settings.length, "step_seconds": step, "full_gradient_seconds": full}
            | row
            | {"repeats": settings.repeats, "tokens_per_second": settings.sequences * settings.length / step}
            | {"tokens_per_second_ratio": 1 / row["ratio"], "peak_bytes": peak, "peak_ratio": peak / peer}
            | _judged(judged and one != "adamw", "step", row["ratio"], STEP_TARGET)
        )
    return result


def fitted(contender: str) -> bool:
    """Whether it is a law that needs full gradients now and then."""
    return contender in LAWS and LAWS[contender].fitted


def prepared(settings: Settings, cell: Cell, contender: str, data: Path, scratch: Path, **changed: Any) -> Timed:
    """A contender's trainer after two periods, with the peak of the second."""
    mine = Cell("train", cell.model, contender, None if contender == "adamw" else cell.rank, compile=cell.compile)
    config = cells.config(settings, mine, data, scratch, LR, **changed)
    device = runs.device(config.device)
    before = held(device)
    timed = Timed(Trainer(config, runs.Run(scratch, runs.plain(config))), 0)
    timed.period()
    cost.reset_peak(device)
    timed.period()
    return Timed(timed.trainer, cost.peak_bytes(device) - before)


def held(device: torch.device) -> int:
    """Bytes of tensors on a CUDA device; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def free() -> None:
    """Give back what the last cell held, so that the next one's peak is its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _named(cell: Cell, contender: str) -> dict[str, Any]:
    return {"model": cell.model, "contender": contender, "rank": None if contender == "adamw" else cell.rank, "compile": cell.compile}


def _judged(judged: bool, what: str, ratio: float, target: float) -> dict[str, Any]:
    return {"judged": what, "target": target, "holds": ratio <= target} if judged else {"judged": None, "target": None, "holds": None}
