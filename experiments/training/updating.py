"""How long an optimizer in a frame takes for its update, alone: beside its two matrix products and beside published packages, with its refresh.

Gradients are those of the preset's own model on text, a few AdamW steps apart, so that the randomized refresh meets what it meets in training:
directions that were right some steps ago. A step is between refreshes; a refresh is what one adds to it, and amortised is a step and its share of
the refresh over the method's own default period. Packages that are not installed have no rows; one that takes PATIENCE seconds for the matrices of a
single block (torch's Muon on a processor without 16-bit products) is compared on them alone, in FEWEST pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from estimators.selection import rank_of
from experiments.training import feed, models
from experiments.training.config import Config
from experiments.training.packages import PACKAGES
from experiments.training.timing import pairs, timed
from optimizers import OPTIMIZERS, BAdam, GaLore

PRODUCTS_LIMIT, REFRESH_LIMIT, PACKAGE_LIMIT, ENERGY = 1.25, 0.1, 1.0, 0.99
NEVER = 10**9
BEFORE, BETWEEN = 10, 10  # AdamW steps before the first gradient that is kept, and from it to the second
PATIENCE, FEWEST, BLOCK = 3.0, 5, 7  # seconds; pairs; matrices of a LLaMA block
REFRESHES = 3  # of each of the two gradients, timed; the six are a whole cycle of COAP's

Made = Callable[[int], torch.optim.Optimizer]  # from the steps between two refreshes


@dataclass(frozen=True)
class Matrices:
    """What is updated, with gradients of two moments; ``rank``: of all."""

    names: list[str]
    parameters: list[nn.Parameter]
    first: list[Tensor]
    second: list[Tensor]
    rank: int
    device: torch.device

    def copies(self, count: int | None = None) -> Matrices:
        """The first ``count`` of them, with parameters of their own."""
        own = [nn.Parameter(p.detach().clone()) for p in self.parameters[:count]]
        return replace(self, names=self.names[:count], parameters=own, first=self.first[:count], second=self.second[:count])

    def refresh(self, make: Made) -> float:
        """Seconds that a refresh adds to a step, on average, from the directions of the one gradient to those of the other."""
        each, never = make(1), make(NEVER)
        times: list[list[float]] = [[], []]
        for _ in range(REFRESHES):
            for some in (self.first, self.second):
                for i, optimizer in enumerate((each, never)):
                    _given(self.parameters, some)
                    times[i].append(timed(optimizer.step, self.device))
        return max(0.0, float(np.mean(times[0][1:]) - np.median(times[1][1:])))  # the first steps of both are refreshes, and first


def rows(config: Config, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """One row a comparison: its name, seconds, ratio and what it should not exceed."""
    names, first, second = gradients(config, device)
    parameters = [nn.Parameter(torch.zeros_like(G)) for G in first]
    matrices = Matrices(names, parameters, first, second, rank_of(min(min(G.shape) for G in first), config.rank), device)
    alone = [_alone(name, matrices, config.rank, repeats) for name in OPTIMIZERS]
    beside = [row for name in PACKAGES for row in _beside(name, matrices, repeats)]
    return [*alone, *beside, *_refreshes(matrices)]


def _made(name: str, matrices: Matrices, ratio: float) -> Made:
    kind = OPTIMIZERS[name]
    rank = ratio if name == "frugal" else matrices.rank  # of its matrices, those that have their turn
    named = list(zip(matrices.names, matrices.parameters, strict=True))  # layers by turns are known by their names
    return lambda every: kind(named, 1e-3, **kind.takes(rank=rank, every=every, freeze=False))


def _period(name: str) -> int | None:
    """The steps between two refreshes that are the default of a method; None for one that has no refresh, or one at every step."""
    kind = OPTIMIZERS[name]
    every = kind.default("every") if kind.takes(every=None) else None
    return None if every in (None, 1) else int(every)


def _alone(name: str, matrices: Matrices, ratio: float, repeats: int) -> dict[str, Any]:
    period, make = _period(name), _made(name, matrices, ratio)
    _given(matrices.parameters, matrices.second)
    optimizer = make(NEVER if period else 1)
    products = lambda: _products(matrices.parameters, matrices.rank)  # noqa: E731
    row: dict[str, Any] = pairs(products, {name: optimizer.step}, matrices.device, repeats)[1] | {"over": "two products"}
    refresh = matrices.refresh(make) if period else 0.0
    row |= {"refresh": refresh if period else None, "period": period, "amortised": row["seconds"] + refresh / (period or 1)}
    return row | ({"target": PRODUCTS_LIMIT, "holds": row["ratio"] <= PRODUCTS_LIMIT} if name == "galore" else {})


def _beside(name: str, matrices: Matrices, repeats: int) -> list[dict[str, Any]]:
    """A step over that of the package, and a step with its share of the refresh over the package's."""
    package, made, ours = PACKAGES[name]
    kind, period = OPTIMIZERS[name.split()[0]], _period(name.split()[0])
    try:
        count, repeats = (BLOCK, FEWEST) if _slow(made, matrices.copies(BLOCK), period) else (None, repeats)
    except ImportError:
        return []
    mine, theirs = matrices.copies(count), matrices.copies(count)
    other: Made = lambda every: made(theirs.parameters, matrices.rank, every)  # noqa: E731
    peer = other(NEVER if period else 1)
    named = list(zip(matrices.names, mine.parameters, strict=True)) if kind is BAdam else mine.parameters
    make: Made = lambda every: kind(named, 1e-3, **kind.takes(rank=matrices.rank, every=every), **ours)  # noqa: E731
    optimizer = make(NEVER if period else 1)
    lent = [G.clone() for G in theirs.second]  # some packages write on the gradients
    base, row = pairs(
        lambda: _stepped(peer, theirs.parameters, lent),
        {name: lambda: _stepped(optimizer, mine.parameters, mine.second)},
        matrices.device,
        repeats,
    )
    row |= {"matrices": len(mine.parameters)}
    found = [row | {"over": package, "target": PACKAGE_LIMIT, "holds": row["ratio"] <= PACKAGE_LIMIT}]
    if period:
        refresh, peers = mine.refresh(make), theirs.refresh(other)
        ratio = (row["seconds"] + refresh / period) / (base["seconds"] + peers / period)
        shared = {"name": f"{name} amortised", "seconds": row["seconds"] + refresh / period, "ratio": ratio, "repeats": REFRESHES}
        shared |= {"refresh": refresh, "peer_refresh": peers, "period": period}
        found.append(shared | {"over": package, "target": PACKAGE_LIMIT, "holds": ratio <= PACKAGE_LIMIT})
    return found


def _slow(made: Callable[..., torch.optim.Optimizer], block: Matrices, period: int | None) -> bool:
    """Whether a step of the package takes PATIENCE for one block, refreshes apart. Raises ``ImportError`` where it is not installed."""
    peer = made(block.parameters, block.rank, NEVER if period else 1)
    step = lambda: _stepped(peer, block.parameters, [G.clone() for G in block.second])  # noqa: E731
    return timed(step, block.device) > PATIENCE and timed(step, block.device) > PATIENCE


def _stepped(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], some: list[Tensor]) -> None:
    _given(parameters, some)  # some packages take the gradients away
    optimizer.step()


def _refreshes(matrices: Matrices) -> list[dict[str, Any]]:
    """The randomized refresh over that of the published package and over the exact one, and the least energy it holds of an exact one."""
    parameters, rank = matrices.parameters, matrices.rank
    others: dict[str, Made] = {"exact": lambda every: GaLore(parameters, rank=rank, every=every)}
    try:
        made = PACKAGES["galore"][1]
        made(parameters, rank, NEVER)
        others["galore_torch"] = lambda every: made(parameters, rank, every)
    except ImportError:
        pass
    mine = GaLore(parameters, rank=rank, every=1, basis="randomized")
    for some in (matrices.first, matrices.second):
        _given(parameters, some)
        mine.step()
    energy = min(_energy(p.grad, mine.state[p]["V"]) for p in parameters if p.grad is not None)
    own = matrices.refresh(lambda every: GaLore(parameters, rank=rank, every=every, basis="randomized"))
    found = []
    for name, make in others.items():
        theirs = matrices.refresh(make)
        row = {"name": "galore refresh", "over": name, "seconds": own, "ratio": own / theirs, "energy": energy, "repeats": REFRESHES}
        judged = {"target": REFRESH_LIMIT, "holds": own / theirs <= REFRESH_LIMIT and energy >= ENERGY} if name == "galore_torch" else {}
        found.append(row | judged)
    return found


def _energy(G: Tensor, V: Tensor) -> float:
    """‖GV‖² over that of as many leading singular directions, of the side that V projects."""
    G = G if G.shape[0] >= G.shape[1] else G.mT
    return float((G @ V).square().sum() / torch.linalg.svdvals(G)[: V.shape[1]].square().sum())


def _given(parameters: list[nn.Parameter], some: list[Tensor]) -> None:
    for p, G in zip(parameters, some, strict=True):
        p.grad = G


def _products(parameters: list[nn.Parameter], rank: int) -> None:
    """GV and the lift BVᵀ added to W, of every matrix: what no projected optimizer can do without."""
    for p in parameters:
        assert p.grad is not None
        G, W = (p.grad, p.data) if p.shape[0] >= p.shape[1] else (p.grad.mT, p.data.mT)
        V = G[:rank].mT if G.shape[0] >= rank else G.new_zeros(G.shape[1], rank)
        W.addmm_(G @ V, V.mT, alpha=-1e-9)


def gradients(config: Config, device: torch.device) -> tuple[list[str], list[Tensor], list[Tensor]]:
    """Names and gradients of the matrices inside the blocks, at two moments of a short training on text."""
    batches, _, _ = feed.open_data(config)
    model = models.build(config.model, config.seed).to(device)  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    kept: list[list[Tensor]] = []
    for t in range(BEFORE + BETWEEN + 1):
        optimizer.zero_grad(set_to_none=True)
        models.loss_of(model, batches.next().to(device)).backward()
        if t in (BEFORE, BEFORE + BETWEEN):
            kept.append([p.grad.clone() for p in model.model.layers.parameters() if p.ndim == 2 and p.grad is not None])
        optimizer.step()
    return [name for name, p in model.model.layers.named_parameters() if p.ndim == 2], kept[0], kept[1]
