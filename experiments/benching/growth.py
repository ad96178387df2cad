"""How the cost grows with r, n, the number of blocks and K: measured, beside the operations of theory/operations.py.

Of each curve the first point is 1; where the measured line lies below the predicted one, small products run below the rate of large ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from estimators import keyed
from estimators.haar_stiefel import HaarStiefel
from estimators.linear import LowRankLinear
from experiments import pretrain
from experiments.benching.limits import Limits
from experiments.training import models
from experiments.training.stepper import Stepper, language
from experiments.training.timing import timed
from theory import operations

if TYPE_CHECKING:
    from experiments.bench import Config

TOKENS, WIDTH = 2048, 1024
RANKS, WIDTHS, BLOCKS, PERIODS = (32, 64, 128, 256, 512), (256, 512, 1024, 2048), (1, 2, 4, 8), (1, 2, 5, 20)


def growth(config: Config, device: torch.device, limits: Limits) -> list[dict[str, Any]]:
    """A row a point: the quantity, its value, seconds and operations, both over those of the first point, and the share of the machine's rate."""
    layers = {("r", r): (WIDTH, r) for r in RANKS} | {("n", n): (n, n // 8) for n in WIDTHS}
    calls: dict[tuple[str, int], tuple[Callable[[], Any], float]] = {
        point: (_layer(n, r, config.seed, device), operations.low_rank(TOKENS, n, n, r) + operations.lift(n, n, r))
        for point, (n, r) in layers.items()
    }
    for blocks in BLOCKS:
        calls["blocks", blocks] = _model(config, blocks, device)
    rows = _measured(calls, device, config.repeats, limits) + _periods(config, device)
    first = {row["name"]: row for row in reversed(rows)}
    for row in rows:
        start = first[row["name"]]
        row |= {"ratio": row["seconds"] / start["seconds"], "predicted": row["predicted_operations"] / start["predicted_operations"]}
        row["over"] = f"{row['name']} = {start['value']}"
    return rows


def _measured(
    calls: dict[tuple[str, int], tuple[Callable[[], Any], float]], device: torch.device, repeats: int, limits: Limits
) -> list[dict[str, Any]]:
    times: dict[tuple[str, int], list[float]] = {point: [] for point in calls}
    for round_ in range(repeats + 1):
        for point, (call, _) in calls.items():
            spent = timed(call, device)
            if round_:
                times[point].append(spent)
    return [
        {
            "name": name,
            "value": value,
            "seconds": float(np.median(times[name, value])),
            "predicted_operations": count,
            "share": limits.seconds(operations=count) / float(np.median(times[name, value])),
            "repeats": repeats,
        }
        for (name, value), (_, count) in calls.items()
    ]


def _layer(n: int, rank: int, seed: int, device: torch.device) -> Callable[[], Any]:
    """Forward, backward and lift of one square layer."""
    generator = keyed.generator(seed, "bench growth", n * rank, device)
    X = torch.randn(TOKENS, n, generator=generator, device=device, requires_grad=True)
    D = torch.randn(TOKENS, n, generator=generator, device=device)
    layer = LowRankLinear(nn.Linear(n, n, bias=False, device=device), rank)
    layer.hold(HaarStiefel(n=n, rank=rank).sample(generator=generator))

    def call() -> None:
        torch.autograd.grad(layer(X), (X, layer.B), D)
        with torch.no_grad():
            layer.weight.addmm_(layer.B, layer.basis().mT)

    return call


def _settings(config: Config) -> pretrain.Config:
    return replace(pretrain.PRESETS["tiny"], sequences=8, accumulate=1, length=128, rank=0.125, measure_every=0, seed=config.seed)


def _model(config: Config, blocks: int, device: torch.device) -> tuple[Callable[[], Any], float]:
    """A training step of tiny with so many blocks."""
    made = _settings(config)
    preset = models.PRESETS["tiny"]
    bench = Stepper(made, device, language(made, device, num_hidden_layers=blocks))
    count = operations.step(
        made.sequences * (made.length - 1),
        preset["hidden_size"],
        preset["intermediate_size"],
        blocks,
        preset["vocab_size"],
        made.length,
        0.125,
    )
    bench.step()
    return bench.step, count


def _periods(config: Config, device: torch.device) -> list[dict[str, Any]]:
    """Seconds of a step of tiny with V drawn every K steps, whole cycles; predicted: a step's operations and 1/K of a redraw's."""
    made = _settings(config)
    preset = models.PRESETS["tiny"]
    h, f, blocks = preset["hidden_size"], preset["intermediate_size"], preset["num_hidden_layers"]
    plain = operations.step(made.sequences * (made.length - 1), h, f, blocks, preset["vocab_size"], made.length, 0.125)
    drawn = blocks * (6 * operations.redraw(h, h // 8) + operations.redraw(f, f // 8))
    cycle = max(PERIODS)
    benches = {K: Stepper(replace(made, refresh_every=K), device) for K in PERIODS}
    times: dict[int, list[float]] = {K: [] for K in PERIODS}
    for _ in range(5):
        for K, bench in benches.items():
            times[K].append(sum(timed(bench.step, device) for _ in range(cycle)) / cycle)
    return [
        {"name": "K", "value": K, "seconds": float(np.median(times[K][1:])), "predicted_operations": plain + drawn / K, "repeats": 4}
        for K in PERIODS
    ]
