"""Rademacher law: the entries of V are ±√(c/r) with equal probability. Sparse sign at density 1.

Proof. theory/sparse_sign.py with s = 1: fourth moment (c/r)², so (s−3)diag(M) = −2diag(M). Every column has the same norm
n·c/r, hence tr(P) = cn for every draw and E[tr(P)P] = c²nI.

Source: arXiv 2007.10412 (randomized automatic differentiation) uses it on the token axis; moments as in sparse_sign.
"""

from __future__ import annotations

from numpy.typing import ArrayLike

from theory import sparse_sign
from theory.arguments import Array

CENTRED = True  # V and −V have one law, so E[V] = 0


def mean(n: int, rank: int, c: float = 1.0) -> Array:
    """E[P] = cI, shape (n, n). Raises ``ValueError`` unless 1 ≤ rank ≤ n and c > 0."""
    return sparse_sign.mean(n, rank, c, sparsity=1.0)


def second_moment(M: ArrayLike, rank: int, c: float = 1.0) -> Array:
    """E[PMP] = c²/r·[(r+1)M + tr(M)I − 2diag(M)] for symmetric M of shape (*batch, n, n)."""
    return sparse_sign.second_moment(M, rank, c, sparsity=1.0)


def trace_weighted_mean(n: int, rank: int, c: float = 1.0) -> Array:
    """E[tr(P)·P] = c²nI, shape (n, n)."""
    return sparse_sign.trace_weighted_mean(n, rank, c, sparsity=1.0)
