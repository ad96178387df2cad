"""Truncation to a fixed orthonormal basis: V = √c·Q for every draw. Biased: E[P] = c·QQᵀ is not a multiple of I unless r = n.

The law is a point mass, so both moments are the matrix itself and its variance is zero: all its error is bias,
‖G(I − QQᵀ)‖² at c = 1. With Q the top-r right singular vectors of G that is the least error of any rank-r matrix
(Eckart & Young 1936): the projector of GaLore (arXiv 2403.03507). Any other Q (leading coordinates, a DCT selection, block
averages) only does worse; no number of draws removes the bias.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from theory.arguments import Array, check_rank, matrix, symmetric

CENTRED = False  # V is constant


def mean(n: int, rank: int, c: float = 1.0, basis: ArrayLike | None = None) -> Array:
    """E[P] = c·QQᵀ, shape (n, n). ``basis`` is Q, (n, r) with orthonormal columns; None means the leading r coordinates."""
    Q = _basis("truncated.mean", n, rank, c, basis)
    return c * Q @ Q.T


def second_moment(M: ArrayLike, rank: int, c: float = 1.0, basis: ArrayLike | None = None) -> Array:
    """E[PMP] = c²·QQᵀMQQᵀ for symmetric M of shape (*batch, n, n)."""
    M = symmetric("truncated.second_moment", "M", M)
    Q = _basis("truncated.second_moment", M.shape[-1], rank, c, basis)
    return c**2 * Q @ (Q.T @ M @ Q) @ Q.T


def trace_weighted_mean(n: int, rank: int, c: float = 1.0, basis: ArrayLike | None = None) -> Array:
    """E[tr(P)·P] = c²r·QQᵀ, shape (n, n)."""
    return c * rank * mean(n, rank, c, basis)


def _basis(call: str, n: int, rank: int, c: float, basis: ArrayLike | None) -> Array:
    check_rank(call, n, rank, c)
    if basis is None:
        return np.eye(n)[:, :rank]
    Q = matrix(call, "basis", basis)
    if Q.shape != (n, rank):
        raise ValueError(f"{call}(n={n}, r={rank}): basis has shape {Q.shape}, expected {(n, rank)}")
    return Q
