"""Rademacher law: the entries of V are ±√(c/r) with equal probability.

Unbiased because entries are independent, centred, of variance c/r. Every draw has tr(VVᵀ) = cn.
Variance: theory/rademacher.py, E[P²] = c²(n+r−1)/r·I.
Reference: randomized automatic differentiation, arXiv 2007.10412; frame of arXiv 2603.20632.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from estimators.law import Law


@dataclass(frozen=True, eq=False)
class Rademacher(Law):
    """V (n×r) with independent ±√(c/r) entries."""

    stem: ClassVar[str] = "rademacher"

    def _draw(self, batch: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
        sign = torch.randint(0, 2, (*batch, self.n, self.rank), generator=generator, device=device, dtype=dtype)
        return (2 * sign - 1) * math.sqrt(self.c / self.rank)
