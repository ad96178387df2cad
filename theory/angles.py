"""Principal angles between two subspaces, their overlap, and the overlap that chance alone gives.

For Q, Q' (n×r) with orthonormal columns the singular values of QᵀQ' are the cosines of the principal angles θᵢ (Björck & Golub, 1973). The overlap is

    ‖QᵀQ'‖²/r = (1/r) Σ cos²θᵢ = tr(QQᵀQ'Q'ᵀ)/r,     1 for equal spans, 0 for orthogonal ones,     r/n on average over a uniform Q

because E[QQᵀ] = (r/n)I for Haar-distributed Q (theory/haar_stiefel.py), whatever Q' is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from theory.arguments import Array, matrix


def principal_angles(Q: ArrayLike, other: ArrayLike) -> Array:
    """θᵢ in radians, smallest first, (r,). ``Q``, ``other``: (n, r), orthonormal columns. Raises ``ValueError`` for other shapes or columns.

    Angles near 0 come from their sines, whose rounding error is not magnified as that of cosines near 1 is.

    >>> principal_angles(np.eye(3)[:, :1], np.eye(3)[:, 1:2]).round(4).tolist()
    [1.5708]
    """
    A, B = _frames(Q, other)
    cosines = np.linalg.svd(A.T @ B, compute_uv=False)
    sines = np.linalg.svd(B - A @ (A.T @ B), compute_uv=False)[::-1]
    return np.arctan2(sines, cosines)


def overlap(Q: ArrayLike, other: ArrayLike) -> float:
    """Mean cos²θᵢ, in [0, 1]."""
    A, B = _frames(Q, other)
    return float(np.sum((A.T @ B) ** 2) / A.shape[1])


def chance(n: int, rank: int) -> float:
    """E[overlap] where one of the subspaces is uniform: r/n."""
    return rank / n


def _frames(Q: ArrayLike, other: ArrayLike) -> tuple[Array, Array]:
    A, B = matrix("angles", "Q", Q), matrix("angles", "other", other)
    if A.shape != B.shape or A.ndim != 2:
        raise ValueError(f"angles: Q and other must be two matrices of one shape, got {A.shape} and {B.shape}")
    for F in (A, B):
        if (defect := float(np.abs(F.T @ F - np.eye(F.shape[1])).max())) > 1e-5:  # frames of float32 gradients
            raise ValueError(f"angles: columns must be orthonormal, largest |QᵀQ − I| is {defect:.3g}")
    return A, B
