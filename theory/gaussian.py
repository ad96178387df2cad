"""Gaussian law: the entries of V (n×r) are independent N(0, c/r). Exact moments of P = VVᵀ.

Proof. P = Σ_k v_k v_kᵀ over r independent columns v_k ~ N(0, (c/r)I), so E[P] = cI. In E[PMP] = Σ_kl E[v_k v_kᵀ M v_l v_lᵀ]
the r(r−1) terms k ≠ l give (c/r)²M each; the r terms k = l give (c/r)²(2M + tr(M)I) by Isserlis' theorem.
Sum: c²[(r+1)/r·M + tr(M)/r·I].

Source: theory frame of arXiv 2603.20632; Isserlis (1918) for the fourth moments.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from theory.arguments import Array, check_rank, symmetric, trace

CENTRED = True  # V and −V have one law, so E[V] = 0


def mean(n: int, rank: int, c: float = 1.0) -> Array:
    """E[P] = cI, shape (n, n). Raises ``ValueError`` unless 1 ≤ rank ≤ n and c > 0."""
    check_rank("gaussian.mean", n, rank, c)
    return c * np.eye(n)


def second_moment(M: ArrayLike, rank: int, c: float = 1.0) -> Array:
    """E[PMP] for symmetric M of shape (*batch, n, n); the same shape."""
    M = symmetric("gaussian.second_moment", "M", M)
    check_rank("gaussian.second_moment", n := M.shape[-1], rank, c)
    return c**2 * ((rank + 1) / rank * M + trace(M) / rank * np.eye(n))


def trace_weighted_mean(n: int, rank: int, c: float = 1.0) -> Array:
    """E[tr(P)·P] = c²(n + 2/r)I, shape (n, n): the sparse-sign value at kurtosis s = 3."""
    check_rank("gaussian.trace_weighted_mean", n, rank, c)
    return c**2 * (n + 2 / rank) * np.eye(n)
