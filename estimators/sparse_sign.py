"""Sparse-sign law of density 1/s: the entries of V are ±√(cs/r) with probability 1/(2s) each, else 0.

Unbiased because entries are independent, centred, of variance (1/s)·cs/r = c/r.
Variance: theory/sparse_sign.py, E[P²] = c²(n+r+s−2)/r·I; s = 1 is Rademacher, s = 3 has the Gaussian moments.
Reference: Achlioptas, Database-friendly random projections (2003).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from estimators.law import Law


@dataclass(frozen=True, eq=False)
class SparseSign(Law):
    """V (n×r) with a share 1/s of entries ±√(cs/r). ``sparsity``: s ≥ 1, the inverse density."""

    sparsity: float = 3.0  # s

    stem: ClassVar[str] = "sparse_sign"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (1 <= self.sparsity < math.inf):
            raise ValueError(f"{self}: sparsity={self.sparsity} is an inverse density and must be at least 1")

    def _draw(self, batch: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
        u = torch.rand(*batch, self.n, self.rank, generator=generator, device=device, dtype=dtype)
        half = 1 / (2 * self.sparsity)
        sign = (u < half).to(dtype) - (u >= 1 - half).to(dtype)
        return sign * math.sqrt(self.c * self.sparsity / self.rank)
