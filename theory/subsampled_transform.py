"""Subsampled orthonormal transform: V = √(cn/r)·D Cᵀ E_J, D random signs, C orthonormal (DCT-II or Hadamard), J a uniform r-set.

Proof. Given D, DCᵀ is orthonormal and coordinate.py applies in its basis: E[PMP | D] = (cn/r)²[p₂M + (r/n − p₂)·DCᵀ diag(CDMDCᵀ) CD].
With K = (C∘C)ᵀ(C∘C), the expectation of the last matrix over the signs is T(M): on the diagonal the pairs that survive are i = j,
T_aa = Σ_i K_ai M_ii (for i = a once, being its own pair); off it those with {i,j} = {a,b}, T_ab = 2K_ab M_ab.
VᵀV = (cn/r)I for every draw, so it reaches the floor of haar_stiefel.

Source: Ailon & Chazelle (2006), Tropp (2011) for the transform; the moment map is derived above.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.fft import dct
from scipy.linalg import hadamard

from theory.arguments import Array, check_rank, symmetric
from theory.coordinate import pair_inclusion

CENTRED = True  # D and −D have one law, so E[V] = 0

Transform = Literal["dct", "hadamard"]


def matrix(n: int, transform: Transform = "dct") -> Array:
    """The orthonormal C, shape (n, n), rows indexed by frequency.

    ``dct`` is the orthonormal DCT-II. ``hadamard`` is the Sylvester matrix of the largest power of two that divides n, in Kronecker
    product with the DCT of the odd factor, so that every n has one; for n = 2^a it is the Hadamard matrix itself.
    Raises ``ValueError`` for another name.
    """
    if transform == "dct":
        return np.asarray(dct(np.eye(n), axis=0, norm="ortho"), dtype=np.float64)
    if transform == "hadamard":
        power = n & -n  # largest power of two dividing n
        sylvester = np.asarray(hadamard(power), dtype=np.float64) / np.sqrt(power)
        return np.kron(sylvester, matrix(n // power, "dct"))
    raise ValueError(f"subsampled_transform.matrix(n={n}, transform={transform!r}): known transforms are 'dct' and 'hadamard'")


def mean(n: int, rank: int, c: float = 1.0, transform: Transform = "dct") -> Array:
    """E[P] = cI, shape (n, n)."""
    check_rank("subsampled_transform.mean", n, rank, c)
    return c * np.eye(n)


def second_moment(M: ArrayLike, rank: int, c: float = 1.0, transform: Transform = "dct") -> Array:
    """E[PMP] = (cn/r)²[p₂M + (r/n − p₂)T(M)] for symmetric M of shape (*batch, n, n)."""
    M = symmetric("subsampled_transform.second_moment", "M", M)
    check_rank("subsampled_transform.second_moment", n := M.shape[-1], rank, c)
    squares = matrix(n, transform) ** 2
    K = squares.T @ squares
    T = 2 * K * M
    index = np.arange(n)
    T[..., index, index] = np.einsum("ai,...ii->...a", K, M)
    pair = pair_inclusion(n, rank)
    return (c * n / rank) ** 2 * (pair * M + (rank / n - pair) * T)


def trace_weighted_mean(n: int, rank: int, c: float = 1.0, transform: Transform = "dct") -> Array:
    """E[tr(P)·P] = c²nI, shape (n, n): tr(P) = cn for every draw."""
    check_rank("subsampled_transform.trace_weighted_mean", n, rank, c)
    return c**2 * n * np.eye(n)
