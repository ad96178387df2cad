"""Haar–Stiefel law: V = √(cn/r)·Q with Q uniform on the orthonormal n×r frames. The optimum without knowledge of the gradient.

Proof. With R = QQᵀ, E[RMR] commutes with every rotation of M, so it is αM + β·tr(M)I for symmetric M. M = I gives
α + nβ = r/n (R² = R). The trace of M ↦ tr(R·M·R·M) summed over an orthonormal basis of symmetric matrices is (r² + r)/2, and
equals α·n(n+1)/2 + β·n. Solving: α = r(nr+n−2)/(n(n−1)(n+2)), β = r(n−r)/(n(n−1)(n+2)). At n = 1, R = 1.
Optimal: tr E[P²] ≥ E[(tr P)²]/r ≥ c²n²/r for every law with E[P] = cI, with equality iff VᵀV = (cn/r)I.

Source: arXiv 2603.20632 (optimality); Collins & Śniady (2006) for Haar moments.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from theory.arguments import Array, check_rank, symmetric, trace

CENTRED = True  # V and −V have one law, so E[V] = 0


def mean(n: int, rank: int, c: float = 1.0) -> Array:
    """E[P] = cI, shape (n, n). Raises ``ValueError`` unless 1 ≤ rank ≤ n and c > 0."""
    check_rank("haar_stiefel.mean", n, rank, c)
    return c * np.eye(n)


def second_moment(M: ArrayLike, rank: int, c: float = 1.0) -> Array:
    """E[PMP] = (cn/r)²[αM + β·tr(M)I] for symmetric M of shape (*batch, n, n); E[P²] = c²(n/r)I."""
    M = symmetric("haar_stiefel.second_moment", "M", M)
    check_rank("haar_stiefel.second_moment", n := M.shape[-1], rank, c)
    alpha, beta = frame_coefficients(n, rank, rank**2)
    return (c * n / rank) ** 2 * (alpha * M + beta * trace(M) * np.eye(n))


def trace_weighted_mean(n: int, rank: int, c: float = 1.0) -> Array:
    """E[tr(P)·P] = c²nI, shape (n, n): tr(P) = cn for every draw."""
    check_rank("haar_stiefel.trace_weighted_mean", n, rank, c)
    return c**2 * n * np.eye(n)


def frame_coefficients(n: int, columns: float, columns_squared: float) -> tuple[float, float]:
    """(α, β) of E[RMR] = αM + β·tr(M)I, R = QQᵀ, Q a Haar frame of t columns in dimension n.

    t may be random and independent of the directions: both coefficients are quadratic in t, so E[t] (``columns``) and E[t²]
    (``columns_squared``) are all that is needed.
    """
    if n == 1:  # R is t itself, 0 or 1
        return columns_squared, 0.0
    denominator = n * (n - 1) * (n + 2)
    alpha = (n * columns_squared + (n - 2) * columns) / denominator
    beta = (n * columns - columns_squared) / denominator
    return alpha, beta
