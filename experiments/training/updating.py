"""How long an optimizer in a frame takes for its update, alone: beside its two matrix products, beside published packages, and its refresh.

Gradients are those of the preset's own model on text, a few AdamW steps apart, so that the randomized refresh meets what it meets in
training: directions that were right some steps ago. ``step`` is between refreshes; packages that are not installed have no rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from estimators.selection import rank_of
from experiments.training import feed, models
from experiments.training.config import Config
from experiments.training.packages import PACKAGES
from experiments.training.timing import pairs, timed
from optimizers import OPTIMIZERS, GaLore

PRODUCTS_LIMIT, REFRESH_LIMIT, PACKAGE_LIMIT, ENERGY = 1.25, 0.1, 1.0, 0.99
NEVER = 10**9
BEFORE, BETWEEN = 10, 10  # AdamW steps before the first gradient that is kept, and from it to the second


def rows(config: Config, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """One row a comparison: its name, seconds, ratio and what it should not exceed."""
    first, second = gradients(config, device)
    parameters = [nn.Parameter(torch.zeros_like(G)) for G in first]
    rank = rank_of(min(min(G.shape) for G in first), config.rank)
    for p, G in zip(parameters, second, strict=True):
        p.grad = G
    found = []
    for name, kind in OPTIMIZERS.items():
        optimizer = kind(parameters, 1e-3, **kind.takes(rank=config.rank if name == "frugal" else rank, every=NEVER, freeze=False))
        row: dict[str, Any] = pairs(lambda: _products(parameters, rank), {name: optimizer.step}, device, repeats)[1]
        row["over"] = "two products"
        found.append(row | ({"target": PRODUCTS_LIMIT, "holds": row["ratio"] <= PRODUCTS_LIMIT} if name == "galore" else {}))
    for name, (package, made, ours) in PACKAGES.items():
        try:
            peer = made(parameters, rank, NEVER)
        except ImportError:
            continue
        mine = OPTIMIZERS[name](parameters, 1e-3, **OPTIMIZERS[name].takes(rank=rank, every=NEVER), **ours)
        lent = [G.clone() for G in second]  # some packages write on the gradients
        row = pairs(lambda: _stepped(peer, parameters, lent), {name: lambda: _stepped(mine, parameters, second)}, device, repeats)[1]
        found.append(row | {"over": package, "target": PACKAGE_LIMIT, "holds": row["ratio"] <= PACKAGE_LIMIT})
    return [*found, *_refreshes(parameters, first, second, rank, device, repeats)]


def _stepped(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], some: list[Tensor]) -> None:
    _given(parameters, some)  # some packages take the gradients away
    optimizer.step()


def _refreshes(
    parameters: list[nn.Parameter], first: list[Tensor], second: list[Tensor], rank: int, device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    """Time of a refresh beyond a step, from the first gradient's directions to the second's, and the least energy it holds of an exact one."""

    def seconds(make: Callable[[int], torch.optim.Optimizer]) -> float:
        each, never = make(1), make(NEVER)
        times = []
        for _ in range(max(3, repeats // 2)):
            for some, optimizer in ((first, each), (second, each), (second, never)):
                _given(parameters, some)
                times.append(timed(optimizer.step, device))
        return float(np.median(times[1::3]) - np.median(times[5::3]))  # the first step of ``never`` is a refresh

    exact = {"exact": lambda every: GaLore(parameters, rank=rank, every=every)}
    try:
        made = PACKAGES["galore"][1]
        made(parameters, rank, NEVER)
        others: dict[str, Callable[[int], torch.optim.Optimizer]] = {"galore_torch": lambda every: made(parameters, rank, every), **exact}
    except ImportError:
        others = {**exact}
    mine = GaLore(parameters, rank=rank, every=1, basis="randomized")
    for some in (first, second):
        _given(parameters, some)
        mine.step()
    energy = min(_energy(p.grad, mine.state[p]["V"]) for p in parameters if p.grad is not None)
    own = seconds(lambda every: GaLore(parameters, rank=rank, every=every, basis="randomized"))
    found = []
    for name, make in others.items():
        theirs = seconds(make)
        row = {"name": "galore refresh", "over": name, "seconds": own, "ratio": own / theirs, "energy": energy, "repeats": repeats}
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


def gradients(config: Config, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of the matrices inside the blocks, at two moments of a short training on text."""
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
    return kept[0], kept[1]
