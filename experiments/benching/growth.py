"""How the cost grows with r, n, the number of blocks and K: measured, beside the operations of theory/operations.py; with the
number of devices as theory/communication.py says, whose bytes two processes confirm (results/memory): their time on shared cores says nothing.

Of each curve the first point is 1; where the measured line lies below the predicted one, small products run below the rate of large ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from estimators import keyed
from estimators.haar_stiefel import HaarStiefel
from estimators.linear import LowRankLinear
from experiments import pretrain
from experiments.benching.limits import Limits
from experiments.training import models
from experiments.training.stepper import Stepper, language
from experiments.training.timing import pairs
from theory import operations

if TYPE_CHECKING:
    from experiments.bench import Config

TOKENS, WIDTH = 2048, 1024
RANKS, WIDTHS, BLOCKS, PERIODS = (32, 64, 128, 256, 512), (256, 512, 1024, 2048), (1, 2, 4, 8), (1, 2, 5, 20)


def growth(config: Config, device: torch.device, limits: Limits) -> list[dict[str, Any]]:
    """A row a point: the quantity, its value, seconds and operations, both over those of the first point, and the share of the limit."""
    layers = {("r", r): (WIDTH, r) for r in RANKS} | {("n", n): (n, n // 8) for n in WIDTHS}
    calls: dict[tuple[str, int], tuple[Callable[[], Any], float]] = {
        point: (_layer(n, r, config.seed, device), operations.low_rank(TOKENS, n, n, r) + operations.lift(n, n, r))
        for point, (n, r) in layers.items()
    }
    calls |= {("blocks", blocks): _model(config, blocks, device) for blocks in BLOCKS} | _periods(config, device)
    rows = []
    for name in dict.fromkeys(name for name, _ in calls):
        points = {value: call for (one, value), call in calls.items() if one == name}
        start, (first, least) = next(iter(points.items()))
        timed = pairs(first, {str(value): call for value, (call, _) in points.items() if value != start}, device, config.repeats)
        for row, (value, (_, count)) in zip(timed, points.items(), strict=True):
            sizes = {"predicted_operations": count, "predicted": count / least, "share": limits.seconds(operations=count) / row["seconds"]}
            rows.append(row | {"name": name, "value": value, "over": f"{name} = {start}"} | sizes)
    return rows


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


def _periods(config: Config, device: torch.device) -> dict[tuple[str, int], tuple[Callable[[], Any], float]]:
    """Steps of tiny with V drawn every K steps, as many for every K as the longest cycle has; predicted: a step and 1/K of a redraw."""
    made = _settings(config)
    preset = models.PRESETS["tiny"]
    h, f, blocks = preset["hidden_size"], preset["intermediate_size"], preset["num_hidden_layers"]
    plain = operations.step(made.sequences * (made.length - 1), h, f, blocks, preset["vocab_size"], made.length, 0.125)
    drawn = blocks * (6 * operations.redraw(h, h // 8) + operations.redraw(f, f // 8))
    cycle = max(PERIODS)
    benches = {K: Stepper(replace(made, refresh_every=K), device) for K in PERIODS}
    return {
        ("K", K): (lambda bench=bench: [bench.step() for _ in range(cycle)], cycle * (plain + drawn / K)) for K, bench in benches.items()
    }
