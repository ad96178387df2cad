"""Sparse-sign law of density 1/s: the entries of V are ±√(cs/r) with probability 1/(2s) each, else 0.

Proof. Independent centred entries with variance c/r and fourth moment s(c/r)². In E[v vᵀMv vᵀ] the off-diagonal entries are
2(c/r)²M_ab and the diagonal ones (c/r)²[tr(M) + (s−1)M_aa], that is (c/r)²[2M + tr(M)I + (s−3)diag M]; the r(r−1) pairs of
different columns add (c/r)²M each. For E[tr(P)P]_aa: of the nr pairs (entry, v_al²) with one l, one is the same entry (s), the
others are independent (1), so r·(c/r)²·(nr − 1 + s).

Source: Achlioptas (2003) for the law; the moments are derived above. s = 1 is Rademacher, kurtosis 3 has the Gaussian moments.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from theory.arguments import Array, check_rank, diagonal, symmetric, trace

CENTRED = True  # V and −V have one law, so E[V] = 0


def mean(n: int, rank: int, c: float = 1.0, sparsity: float = 3.0) -> Array:
    """E[P] = cI, shape (n, n). ``sparsity`` is s ≥ 1, the inverse density."""
    check_rank("sparse_sign.mean", n, rank, c)
    _check_sparsity("sparse_sign.mean", sparsity)
    return c * np.eye(n)


def second_moment(M: ArrayLike, rank: int, c: float = 1.0, sparsity: float = 3.0) -> Array:
    """E[PMP] = c²/r·[(r+1)M + tr(M)I + (s−3)diag(M)] for symmetric M of shape (*batch, n, n)."""
    M = symmetric("sparse_sign.second_moment", "M", M)
    check_rank("sparse_sign.second_moment", n := M.shape[-1], rank, c)
    _check_sparsity("sparse_sign.second_moment", sparsity)
    return c**2 / rank * ((rank + 1) * M + trace(M) * np.eye(n) + (sparsity - 3) * diagonal(M))


def trace_weighted_mean(n: int, rank: int, c: float = 1.0, sparsity: float = 3.0) -> Array:
    """E[tr(P)·P] = c²(n + (s−1)/r)I, shape (n, n)."""
    check_rank("sparse_sign.trace_weighted_mean", n, rank, c)
    _check_sparsity("sparse_sign.trace_weighted_mean", sparsity)
    return c**2 * (n + (sparsity - 1) / rank) * np.eye(n)


def _check_sparsity(call: str, sparsity: float) -> None:
    if not (1 <= sparsity < np.inf):
        raise ValueError(f"{call}(sparsity={sparsity}): sparsity is an inverse density and must be at least 1")
