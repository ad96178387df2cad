"""Fixed-size sampling designs: r of n units, unit i with probability exactly π_i, many draws at once.

Unbiased weights 1/π_i need exact first-order probabilities, which `torch.multinomial(replacement=False)` does not give (target
.9/.6/.3/.1/.1 comes out as .77/.63/.35/.12/.12). Both designs here take the units in the order given, so the number drawn from any prefix
is its Σπ rounded down or up. Joint probabilities: theory/spectral.py.
References: Madow (1949), systematic; Deville & Tillé (1998), pivotal.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad


def inclusion_probabilities(sigma: Float[Tensor, "*layers n"], rank: int, floor: float) -> Float[Tensor, "*layers n"]:
    """π minimising Σσ_i/π_i under Σπ = r, floor·r/n ≤ π_i ≤ 1: π = clip(λ√σ, floor·r/n, 1), λ exactly, in float64.

    Σ clip(λ√σ, …) only grows with λ, so a unit is saturated if the sum is below r where it just saturates, and floored if it is not below r
    where it just leaves the floor. Both are compared times √σ_i and a tie is free: no unit, however small, loses its π to rounding.
    Zeros among σ share what is left when fewer than r units are positive. Source: arXiv 2603.20632; theory/optimal.py.
    """
    sigma = sigma.double()
    n = sigma.shape[-1]
    root = (sigma / sigma.amax(-1, keepdim=True)).sqrt()
    lowest = floor * rank / n
    ordered = root.sort(-1).values
    sums = pad(ordered.cumsum(-1), (1, 0))  # from the smallest on: a difference is as exact as its largest term
    between = torch.searchsorted(ordered, lowest * root, right=True), torch.searchsorted(ordered, root, right=True)
    budget, rest = _free(sums, rank, lowest, *between)
    saturated, floored = budget * root > rest, root <= 0
    zero = floored
    if lowest > 0:
        budget, rest = _free(sums, rank, lowest, torch.searchsorted(ordered, root), torch.searchsorted(ordered, root / lowest))
        floored = zero | (budget * root <= lowest * rest)
    free = ~(saturated | floored)
    mass = rank - saturated.double().sum(-1, keepdim=True) - lowest * floored.double().sum(-1, keepdim=True)
    total = torch.where(free, root, 0.0).sum(-1, keepdim=True)
    share = (mass * root / total.clamp_min(torch.finfo(torch.float64).tiny)).clamp(lowest, 1)
    pi = torch.where(saturated, 1.0, torch.where(floored, lowest, share))
    missing = torch.where(total > 0, 0.0, mass.clamp_min(0))
    return torch.where(zero, pi + missing / zero.sum(-1, keepdim=True).clamp_min(1), pi)


def _free(sums: Tensor, rank: int, lowest: float, floored: Tensor, unsaturated: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of r for the units between these two ranks, and Σ√σ of them."""
    n = sums.shape[-1] - 1
    return rank - n + unsaturated - lowest * floored, sums.gather(-1, unsaturated) - sums.gather(-1, floored)


def systematic(pi: Float[Tensor, "*layers n"], rank: int, batch: tuple[int, ...], generator: torch.Generator) -> Int[Tensor, "*draws r"]:
    """Madow's design, J of shape (*batch, *layers, r), ascending: one uniform u a draw, units whose [C_{i−1}, C_i) holds u + j."""
    layers = pi.shape[:-1]
    upper = pi.double().cumsum(-1)
    upper = upper * (rank / upper[..., -1:])  # the sum is r up to rounding
    u = torch.rand(*batch, *layers, 1, generator=generator, device=pi.device, dtype=torch.float64)
    position = u + torch.arange(rank, device=pi.device)
    J = torch.searchsorted(upper.expand(*batch, *upper.shape).contiguous(), position, right=True)
    return J.clamp_max(pi.shape[-1] - 1)


def pivotal(pi: Float[Tensor, "*layers n"], rank: int, batch: tuple[int, ...], generator: torch.Generator) -> Int[Tensor, "*draws r"]:
    """The ordered pivotal design, J of shape (*batch, *layers, r), ascending: the live unit duels the next, one of them is decided.

    A duel of values a and π_j: below 1 together, the loser is rejected and the winner goes on with the sum; otherwise the winner is selected
    and the loser goes on with the sum less 1. One pass over the n units, every draw at once.
    """
    n = pi.shape[-1]
    shape = (*batch, *pi.shape[:-1])
    chance = torch.rand(*shape, n, generator=generator, device=pi.device, dtype=torch.float64)
    selected = torch.zeros(*shape, n, dtype=torch.bool, device=pi.device)
    live = torch.zeros(shape, dtype=torch.long, device=pi.device)
    a = pi[..., 0].double()
    for j in range(1, n):
        p = pi[..., j].double()
        total = a + p
        split = total >= 1
        live_wins = torch.where(split, (1 - p) / (2 - total).clamp_min(1e-300), a / total.clamp_min(1e-300))
        wins = chance[..., j] < live_wins
        chosen = torch.where(wins, live, j)
        selected.scatter_(-1, chosen.unsqueeze(-1), split.expand(shape).unsqueeze(-1) | selected.gather(-1, chosen.unsqueeze(-1)))
        live = torch.where(wins ^ split, live, j)  # a winner goes on below 1, a loser above
        a = torch.where(split, total - 1, total)
    last = live.unsqueeze(-1)
    selected.scatter_(-1, last, (a > 0.5).expand(shape).unsqueeze(-1) | selected.gather(-1, last))
    return selected.nonzero()[:, -1].view(*shape, rank)


DESIGNS = {"systematic": systematic, "pivotal": pivotal}
