"""Gaussian law: the entries of V are independent N(0, c/r).

Unbiased because the columns v_k are independent with E[v_k v_kᵀ] = (c/r)I and P = Σ_k v_k v_kᵀ.
Variance: theory/gaussian.py, E[P²] = c²(n+r+1)/r·I. Not exact at r = n: VVᵀ ≠ I.
Reference: the law of Flora (arXiv 2402.03293), APOLLO and RSO; frame of arXiv 2603.20632.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from estimators.law import Law


@dataclass(frozen=True, eq=False)
class Gaussian(Law):
    """V (n×r) with independent N(0, c/r) entries."""

    stem: ClassVar[str] = "gaussian"

    def _draw(self, batch: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
        Z = torch.randn(*batch, self.n, self.rank, generator=generator, device=device, dtype=dtype)
        return Z * math.sqrt(self.c / self.rank)
