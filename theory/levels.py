"""The error of ĜVVᵀ from a handful of numbers: no n×n matrix, so it serves layers of any size while they train.

For every law E[P] and E[P²] are multiples of I, or one number for each of k known directions Q and one for the rest. So the error
E‖ĜP − g‖² = tr(E[P²]S) − 2tr(E[P]gᵀg) + ‖g‖² needs of the gradient only tr S, ‖g‖² and, on the known directions, q_iᵀSq_i and ‖gq_i‖².
This is the last column of the table of laws (arXiv 2603.20632, §2); ``moments`` has the matrices these levels are the eigenvalues of.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from theory.arguments import Array, check_rank
from theory.optimal import inclusion_probabilities
from theory.spectral import FLOOR


class Levels(NamedTuple):
    """Eigenvalues of E[P] and E[P²] on the k known directions, (k,), and on everything else."""

    mean: Array
    square: Array
    mean_rest: float
    square_rest: float


def levels(stem: str, n: int, rank: int, c: float = 1.0, **parameters: Any) -> Levels:
    """The levels of the law whose module in theory/ is ``stem``, with that module's keywords; ``basis`` itself is not looked at.

    >>> levels("haar_stiefel", n=8, rank=2).square_rest
    4.0
    """
    check_rank(f"levels({stem!r})", n, rank, c)
    if stem == "spectral":
        sigma = parameters.get("sigma")
        kept = np.zeros(0) if sigma is None else np.asarray(sigma, dtype=np.float64)
        units = np.concatenate([kept, np.full(n - kept.size, float(parameters.get("tail", 1.0)))])
        pi = inclusion_probabilities(units, rank, parameters.get("floor", FLOOR))
        inverse = np.divide(c**2, pi, out=np.zeros_like(pi), where=pi > 0)
        mean = np.where(pi > 0, c, 0.0)
        return Levels(mean[: kept.size], inverse[: kept.size], float(mean[-1]), float(inverse[-1]))
    if stem == "truncated":
        return Levels(np.full(rank, c), np.full(rank, c**2), 0.0, 0.0)
    match stem:
        case "gaussian" | "rademacher" | "sparse_sign":
            s = {"gaussian": 3.0, "rademacher": 1.0}[stem] if stem != "sparse_sign" else parameters.get("sparsity", 3.0)
            square = (n + rank + s - 2) / rank  # s is the kurtosis of an entry of V
        case "coordinate" if parameters.get("replacement", False):
            square = (n + rank - 1) / rank
        case "haar_stiefel" | "coordinate" | "subsampled_transform":
            square = n / rank
        case _:
            raise ValueError(f"levels({stem!r}): unknown law")
    return Levels(np.zeros(0), np.zeros(0), c, c**2 * square)


def ipa(law: Levels, second: float, signal: float, second_on: ArrayLike = (), signal_on: ArrayLike = ()) -> float:
    """E‖ĜP − g‖². ``second``: tr S; ``signal``: ‖g‖²; ``second_on``, ``signal_on``: q_iᵀSq_i and ‖gq_i‖² on the known directions, (k,)."""
    s, g = np.asarray(second_on, dtype=np.float64), np.asarray(signal_on, dtype=np.float64)
    if s.shape != law.square.shape or g.shape != law.mean.shape:
        raise ValueError(f"levels.ipa: {s.size} and {g.size} values for {law.square.size} known directions")
    square = float(law.square @ s) + law.square_rest * (second - float(s.sum()))
    through = float(law.mean @ g) + law.mean_rest * (signal - float(g.sum()))
    return square - 2 * through + signal
