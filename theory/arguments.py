"""Argument checks shared by every statement in theory/: they name the call and the values, and return float64 arrays."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

SYMMETRY = 1e-8  # relative asymmetry above which a matrix is not a rounded symmetric one


def check_rank(call: str, n: int, rank: int, c: float = 1.0) -> None:
    """Raise ``ValueError`` unless 1 ≤ rank ≤ n and c is positive and finite."""
    where = f"{call}(n={n}, r={rank}, c={c})"
    if rank != rank or rank != int(rank):
        raise ValueError(f"{where}: rank must be an integer")
    if rank < 1:
        raise ValueError(f"{where}: rank must be at least 1")
    if rank > n:
        raise ValueError(f"{where}: rank must be at most n")
    if not (c > 0 and math.isfinite(c)):
        raise ValueError(f"{where}: c must be positive and finite")


def finite(call: str, name: str, value: ArrayLike) -> Array:
    """``value`` as float64, or ``ValueError`` when any entry is NaN or infinite."""
    array = np.asarray(value, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{call}: {name} of shape {array.shape} has NaN or infinite entries")
    return array


def matrix(call: str, name: str, value: ArrayLike) -> Array:
    """A finite float64 array with at least two axes, the trailing two being the matrix."""
    array = finite(call, name, value)
    if array.ndim < 2:
        raise ValueError(f"{call}: {name} must be a matrix, got shape {array.shape}")
    return array


def symmetric(call: str, name: str, value: ArrayLike) -> Array:
    """A finite symmetric matrix (*batch, n, n), symmetrised to the last bit."""
    array = matrix(call, name, value)
    if array.shape[-1] != array.shape[-2]:
        raise ValueError(f"{call}: {name} must be square, got shape {array.shape}")
    transpose = array.swapaxes(-1, -2)
    defect = float(np.abs(array - transpose).max(initial=0.0))
    if defect > SYMMETRY * float(np.abs(array).max(initial=0.0)):
        raise ValueError(f"{call}: {name} must be symmetric, largest |M - Mᵀ| is {defect:.3g}")
    return (array + transpose) / 2


def spectrum(call: str, sigma: ArrayLike) -> Array:
    """A non-empty, finite, non-negative vector of eigenvalues with at least one positive entry."""
    array = finite(call, "sigma", sigma)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{call}: sigma must be a non-empty vector, got shape {array.shape}")
    if (array < 0).any():
        raise ValueError(f"{call}: sigma must not be negative, smallest entry is {array.min():.3g}")
    if not (array > 0).any():
        raise ValueError(f"{call}: sigma is all zero (shape {array.shape})")
    return array


def trace(M: Array) -> Array:
    """tr(M) over the trailing two axes, kept as (*batch, 1, 1) so that it multiplies a matrix."""
    return np.trace(M, axis1=-2, axis2=-1)[..., None, None]


def diagonal(M: Array) -> Array:
    """diag(M) as a matrix (*batch, n, n)."""
    return M * np.eye(M.shape[-1])
