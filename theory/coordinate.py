"""Coordinate law: V = √(cn/r)·[e_i, i ∈ J], J uniform, without replacement (a set) or with it (r independent draws).

Proof, without: R = E_J E_Jᵀ is diagonal with P(i∈J) = r/n and P(i,j∈J) = p₂ = r(r−1)/(n(n−1)), so E[RMR]_ij = p₂M_ij off the
diagonal and (r/n)M_ii on it. With: R = Σ_k e_{i_k}e_{i_k}ᵀ; the r terms k = l give (1/n)diag(M), the r(r−1) terms k ≠ l give
M/n². Both have tr(P) = cn for every draw; only the first has VᵀV = (cn/r)I and reaches the floor of haar_stiefel.

Source: column-row sampling, Drineas, Kannan & Mahoney (2006); moments derived above.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from theory.arguments import Array, check_rank, diagonal, symmetric

CENTRED = False  # the entries of V are not negative


def mean(n: int, rank: int, c: float = 1.0, replacement: bool = False) -> Array:
    """E[P] = cI, shape (n, n), for both designs."""
    check_rank("coordinate.mean", n, rank, c)
    return c * np.eye(n)


def weighted_second_moment(M: ArrayLike, rank: int, probabilities: ArrayLike) -> Array:
    """E[PMP] for symmetric M (*batch, n, n) and r independent draws with probabilities q (n,), column i scaled by 1/√(rq_i), so that E[P] = I.

    P = Σ_k e_k e_kᵀ/(rq_k): the r terms k = l give diag(M_ii/q_i)/r, the r(r−1) others (r−1)/r·M. Uniform q: ``second_moment`` with replacement.
    Raises ``ValueError`` for q that are not positive or do not sum to 1. Source: column-row sampling, Drineas, Kannan & Mahoney (2006).
    """
    M = symmetric("coordinate.weighted_second_moment", "M", M)
    check_rank("coordinate.weighted_second_moment", n := M.shape[-1], rank, 1.0)
    q = np.asarray(probabilities, dtype=float)
    if q.shape != (n,) or not (q > 0).all() or abs(q.sum() - 1) > 1e-9:
        raise ValueError(f"coordinate.weighted_second_moment(probabilities={q}): must be {n} positive numbers with sum 1")
    return diagonal(M) / (rank * q) + (rank - 1) / rank * M


def second_moment(M: ArrayLike, rank: int, c: float = 1.0, replacement: bool = False) -> Array:
    """E[PMP] for symmetric M of shape (*batch, n, n).

    Without replacement (cn/r)²[p₂M + (r/n − p₂)diag(M)]; with it (cn/r)²[r(r−1)/n²·M + (r/n)diag(M)].
    """
    M = symmetric("coordinate.second_moment", "M", M)
    check_rank("coordinate.second_moment", n := M.shape[-1], rank, c)
    if replacement:
        pair, single = rank * (rank - 1) / n**2, rank / n
    else:
        pair = pair_inclusion(n, rank)
        single = rank / n - pair
    return (c * n / rank) ** 2 * (pair * M + single * diagonal(M))


def trace_weighted_mean(n: int, rank: int, c: float = 1.0, replacement: bool = False) -> Array:
    """E[tr(P)·P] = c²nI, shape (n, n): tr(P) = cn for every draw of either design."""
    check_rank("coordinate.trace_weighted_mean", n, rank, c)
    return c**2 * n * np.eye(n)


def pair_inclusion(n: int, rank: int) -> float:
    """p₂ = r(r−1)/(n(n−1)), the probability that a uniform r-subset of n holds a given pair; 0 at n = 1."""
    return rank * (rank - 1) / (n * (n - 1)) if n > 1 else 0.0
