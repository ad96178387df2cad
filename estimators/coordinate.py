"""Coordinate law: V = √(cn/r)·[e_i, i ∈ J], J drawn uniformly without replacement (a set) or with it (r independent draws).

Unbiased because each column is a uniform coordinate: E[VVᵀ] = (cn/r)·r·(1/n)I.
Variance: theory/coordinate.py. Without replacement it reaches the floor of Haar–Stiefel, E[P²] = c²(n/r)I; with it the value is that of
Rademacher, c²(n+r−1)/r·I.
Reference: column-row sampling, Drineas, Kannan & Mahoney (2006); Grass (arXiv 2406.17660) selects rows this way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from estimators.law import Law, scale, uniform_subset


@dataclass(frozen=True, eq=False)
class Coordinate(Law):
    """V selects r of n coordinates, scaled. ``replacement``: draw them independently instead of as a set."""

    replacement: bool = False

    stem: ClassVar[str] = "coordinate"

    def chosen(self, batch: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Int[Tensor, "*batch r"]:
        """J, the coordinates of the columns; what a draw is without its zeros."""
        if self.replacement:
            return torch.randint(self.n, (*batch, self.rank), generator=generator, device=device)
        return uniform_subset(self.n, self.rank, batch, generator, device)

    def _draw(self, batch: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
        J = self.chosen(batch, generator, device)
        V = torch.zeros(*batch, self.n, self.rank, device=device, dtype=dtype)
        return V.scatter_(-2, J.unsqueeze(-2), scale(self.n, self.rank, self.c))


@dataclass(frozen=True, eq=False)
class CoordinateReplacement(Coordinate):
    """``Coordinate`` with replacement by default: the classical column-row sampling."""

    replacement: bool = True
