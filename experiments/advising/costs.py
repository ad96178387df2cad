"""What a step costs: peak bytes on fake tensors, and seconds from counted operations and the machine's own rates, or measured.

A step of full AdamW is measured; of another method its prediction is that, plus what it does more, less what it does not do:

    products       theory/operations.py, at the rate of a square product
    updates        Adam reads and writes UPDATE numbers for each trained one, at the rate of a copy
    redraws        n·r normal numbers and 2nr² operations; fitted laws: a gradient and its directions; both once in K steps
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from estimators import LAWS, selection
from experiments import pretrain
from experiments.advising.subject import Subject
from experiments.benching.limits import Limits
from experiments.footprints import CHANGE, PLAIN, followed, kept, period
from experiments.training.faked import Ledger
from experiments.training.stepper import Stepper, Task
from experiments.training.timing import pairs
from theory import operations

if TYPE_CHECKING:
    from experiments.advise import Config

UPDATE = 7  # weight, gradient and two moments read, three of them written
BYTES = 4
POWER_PRODUCTS = 12  # operations an element and direction of the range finder with two power iterations, estimators/directions.py
FULL = "adamw"


def settings(config: Config, law: str, rank: int | float, refresh_every: int) -> pretrain.Config:
    """The training that is weighed and timed; its model field is not read. ``law``: FULL for every weight."""
    made = {"method": "adamw"} if law == FULL else {"method": "lowrank", "law": law, "rank": rank}
    return replace(
        pretrain.Config(model="7b"),
        **made,
        refresh_every=refresh_every,
        sequences=config.sequences,
        length=max(config.length, 2),
        seed=config.seed,
        device=config.device,
        measure_every=0,
        eval_tokens=max(2, config.length),
        save_model=False,
    )


def peak_bytes(config: Config, subject: Subject, law: str, rank: int | float, device: torch.device) -> int:
    """The most that a step holds, redraws included. Raises ``ValueError`` for a model that fake tensors cannot follow."""
    build, ids = subject.unweighted(), subject.batch(0)
    made = settings(config, law, rank, period("lowrank", law) if law != FULL else 3)

    def make(ledger: Ledger) -> Stepper:
        model = build().to(device)
        model.train()
        stand_in = torch.zeros(ids.shape, dtype=ids.dtype, device=device)
        return Stepper(made, device, Task(model, lambda: kept(subject.loss(model, stand_in), ledger)))

    ledger = followed(make, config.operations)
    return max(sum(ledger.peak(part).values()) for part in (PLAIN, CHANGE) if part in ledger.parts)


def timed(config: Config, subject: Subject, chosen: dict[str, tuple[str, float, int]], device: torch.device) -> dict[str, dict[str, Any]]:
    """Seconds of steps of full AdamW and of others side by side, name → row; ``chosen``: name → (law, r/n, K), redraws in their turn."""

    def step(law: str, rank: int | float, refresh_every: int) -> Callable[[], None]:
        model, ids = subject.again().to(device), subject.batch(0)
        return Stepper(settings(config, law, rank, refresh_every), device, Task(model, lambda: subject.loss(model, ids))).step

    rows = pairs(step(FULL, 1, 1), {name: step(*made) for name, made in chosen.items()}, device, config.repeats)
    return {row["name"]: row for row in rows}


def chosen_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that ``convert`` would project at rank 1."""
    return selection.choose(model, None, 1)[0]


def predicted_seconds(
    full: float, shapes: dict[str, tuple[int, int, int]], law: str, tokens: int, refresh_every: int, machine: Limits
) -> float:
    """Of a step with its share of the redraws. ``full``: seconds of full AdamW; ``shapes``: layer → (m, n, r) of those projected."""
    saved, moved = 0.0, 0.0
    for m, n, r in shapes.values():
        saved += operations.dense(tokens, m, n) - operations.low_rank(tokens, m, n, r) - operations.lift(m, n, r)
        moved += UPDATE * BYTES * (m * n - m * r)
    redraw = sum(redraw_seconds(law, m, n, r, tokens, machine) for m, n, r in shapes.values())
    return full - saved / machine.gemm - moved / machine.copy + redraw / refresh_every


def redraw_seconds(law: str, m: int, n: int, r: int, tokens: int, machine: Limits) -> float:
    """Of one layer: V, and for a fitted law the full gradient of the micro-batch and its leading directions."""
    drawing = machine.seconds(operations=operations.redraw(n, r), normals=n * r)
    if not LAWS[law].fitted:
        return drawing
    k = min(2 * r, m, n)
    return drawing + machine.seconds(operations=2 * tokens * m * n + POWER_PRODUCTS * m * n * k + 8 * (m + n) * k**2)


def refresh_every(full: float, shapes: dict[str, tuple[int, int, int]], law: str, tokens: int, machine: Limits, share: float) -> int:
    """K, the smallest of PERIODS whose redraws take at most this share of a step of full AdamW."""
    redraw = sum(redraw_seconds(law, m, n, r, tokens, machine) for m, n, r in shapes.values())
    return next((K for K in PERIODS if redraw / K <= share * full), PERIODS[-1])


PERIODS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
