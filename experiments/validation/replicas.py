"""What an optimizer makes of stochastic gradients: many replicas of one matrix, each with gradients and draws of its own.

A replica takes ``period`` steps. Its frame is chosen at the first and measured at the last, as old as frames are in training. ``path``: what of the
last gradient reaches the weight but for the inner rule; ``update``: what the weight gets in the last step, over the learning rate. Learning rates are
small: the law of the gradients does not move with the weights. Every method sees the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from estimators import Measurement, keyed, measure_estimates
from experiments.validation.travelling import travelling
from optimizers import Frugal, Subspace
from optimizers.buckets import stack
from optimizers.outputs import Context

LR = 1e-3
BUDGET_BYTES = 2**25  # of the estimates of one chunk of replicas
TOGETHER = 4  # replicas are made in multiples of: a quarter of them can have its turn


@dataclass(frozen=True)
class Source:
    """Stochastic gradients of one matrix: their mean g (m, n), and ``draw(size, generator)`` → (size, m, n), independent ones."""

    name: str
    g: Float[Tensor, "m n"]
    draw: Callable[[int, torch.Generator], Tensor]


def gaussian(m: int, n: int, noise: float, seed: int) -> Source:
    """g with singular values 1, 1/2, 1/3, …, so that a quarter of them holds most of it, and white noise with E‖noise‖² = ``noise``·‖g‖²."""
    generator = keyed.generator(seed, "gradient", 0)
    k = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(size, k, generator=generator, dtype=torch.float64))[0] for size in (m, n))
    g = (U / torch.arange(1, k + 1)) @ V.mT
    spread = (noise * float(g.square().sum()) / g.numel()) ** 0.5
    return Source(f"{m}x{n}", g, lambda size, generator: g + spread * torch.randn(size, m, n, generator=generator, dtype=g.dtype))


def population(name: str, gradients: Float[Tensor, "batches m n"]) -> Source:
    """Equally likely mini-batches: g is their mean, exactly."""
    return Source(name, gradients.mean(0), lambda size, generator: gradients[torch.randint(len(gradients), (size,), generator=generator)])


class Replicas(NamedTuple):
    """An optimizer and how it is used. ``rank``: r; ``share`` of the matrices that have their turn, where that is the method's."""

    kind: type[Subspace]
    rank: int
    share: float
    period: int
    seed: int
    hook: str | None = None
    """What gradients pass on their way, of ``travelling.HOOKS``."""


class Pair(NamedTuple):
    """Measurements of the path, against g, and of the update over the learning rate."""

    path: Measurement
    update: Measurement


def measure(replicas: Replicas, source: Source, draws: int) -> Pair:
    """Path and update of ``draws`` replicas on the same gradients, whatever the method; ``draws`` in 16 equal groups of multiples of TOGETHER."""
    serial, held = count(), []

    def paths(size: int, generator: torch.Generator) -> Tensor:
        passed, updates = run(replicas, source, size, generator, first=next(serial) * draws)
        held.append(updates)
        return passed

    generator = keyed.generator(replicas.seed, f"replicas {source.name}", 0)
    one = 4 * source.g.numel() * source.g.element_size()  # as measure_estimates counts
    chunk = max(1, BUDGET_BYTES // one // TOGETHER) * TOGETHER
    path = measure_estimates(paths, source.g, draws, generator=generator, budget_bytes=chunk * one)
    chunks = iter(held)
    update = measure_estimates(lambda *_: next(chunks), source.g, draws, generator=generator, budget_bytes=chunk * one)
    return Pair(path, update)


def run(replicas: Replicas, source: Source, size: int, generator: torch.Generator, first: int = 0) -> tuple[Tensor, Tensor]:
    """(path, update) of replicas ``first``, ``first`` + 1, …, (size, m, n) each."""
    kind, g = replicas.kind, source.g
    if size % TOGETHER and kind.takes(layers=1, freeze=False) | ({"frugal": 1} if kind is Frugal else {}):
        raise ValueError(f"replicas.run(size={size}): a share of the matrices has its turn, {TOGETHER} or a multiple are needed")
    start = torch.randn(g.shape, generator=keyed.generator(replicas.seed, "weights", 0), dtype=g.dtype) * g.numel() ** -0.25
    named = [(f"{first + i}", nn.Parameter(start.clone())) for i in range(size)]
    parameters = [p for _, p in named]
    rank = replicas.share if kind is Frugal else replicas.rank  # its rank is the share of matrices that have their turn
    options = kind.takes(every=replicas.period, rank=rank, layers=replicas.share)
    options |= kind.takes(order="random", freeze=False, precision="full")
    optimizer = kind(named, LR, seed=replicas.seed + first, foreach=True, **options)
    before, passed = torch.zeros(size, *g.shape, dtype=g.dtype), torch.zeros(size, *g.shape, dtype=g.dtype)

    def watch(names: tuple[str, ...], context: Context) -> None:
        places = [int(name) - first for name in names]
        seen = stack([_turned(p.grad, context.flipped) for p in (parameters[i] for i in places) if p.grad is not None])
        passed[places] = _turned(context.path(seen), context.flipped)

    optimizer.watch = watch
    with travelling(replicas.hook, parameters, replicas.rank, replicas.seed + first) as give:
        for _ in range(replicas.period):
            passed.zero_()  # a matrix that has no turn passes nothing on
            give(source.draw(size, generator))
            before = torch.stack([p.detach() for p in parameters]).clone()
            optimizer.step()
    return passed, (before - torch.stack([p.detach() for p in parameters])) / LR


def _turned(X: Tensor, flipped: bool) -> Tensor:
    return X.mT if flipped else X
