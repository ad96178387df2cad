"""Sketch, lift, estimate: the three products every projected estimator is made of.

With V n×r from a law with E[VVᵀ] = cI, independent of the m×n gradient G: the sketch GV (m×r) is what is stored, its lift is the
estimate GVVᵀ. Unbiased up to c because E[GVVᵀ] = G·E[VVᵀ] = cG. Variance: theory/mse.py. Leading axes are batch and broadcast.
Reference: arXiv 2603.20632.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from estimators.law import check_finite


def sketch(G: Float[Tensor, "*batch m n"], V: Float[Tensor, "*batch2 n r"]) -> Float[Tensor, "*batch3 m r"]:
    """GV, m×r. Raises ``ValueError`` when the columns of G and the rows of V differ in number, or G is not finite."""
    if G.ndim < 2 or V.ndim < 2 or G.shape[-1] != V.shape[-2]:
        raise ValueError(f"sketch(G={tuple(G.shape)}, V={tuple(V.shape)}): G must be (*, m, n) and V (*, n, r)")
    check_finite("sketch", "G", G)
    return G @ V


def lift(B: Float[Tensor, "*batch m r"], V: Float[Tensor, "*batch2 n r"]) -> Float[Tensor, "*batch3 m n"]:
    """BVᵀ, m×n. Raises ``ValueError`` when B and V differ in their number of columns."""
    if B.ndim < 2 or V.ndim < 2 or B.shape[-1] != V.shape[-1]:
        raise ValueError(f"lift(B={tuple(B.shape)}, V={tuple(V.shape)}): B must be (*, m, r) and V (*, n, r)")
    return B @ V.mT


def estimate(G: Float[Tensor, "*batch m n"], V: Float[Tensor, "*batch2 n r"]) -> Float[Tensor, "*batch3 m n"]:
    """GVVᵀ, m×n, in O(mnr): the lift of the sketch, never through VVᵀ."""
    return lift(sketch(G, V), V)


def on_left(estimator: Callable[[Tensor, Tensor], Tensor], G: Float[Tensor, "*batch m n"], U: Float[Tensor, "*batch2 m r"]) -> Tensor:
    """The same estimator on the rows: ``on_left(estimate, G, U)`` is UUᵀG, with U m×r."""
    return estimator(G.mT, U).mT
