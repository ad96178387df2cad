"""A rank for every layer from the spectra of its weights: one threshold for all layers, and what truncation costs.

    W_r = Σ_{i≤r} sᵢuᵢvᵢᵀ        ‖W − W_r‖² = Σ_{i>r} sᵢ²        the least of all matrices of rank r (Eckart & Young, 1936)

A threshold τ on the normalised singular values gives r_l(τ) = #{i : sᵢ/s₁ ≥ τ}. It falls as τ grows, by one singular value of one layer at a time, so
some τ meets a budget Σ a_l·r_l ≤ b with less than one step of one layer left over. At the cost a = m + n a rank r is stored as factors (m×r and r×n),
which are smaller than the matrix where r(m+n) < mn only: these are the low-rank components, the others stay as they are.

Reference: arXiv 2407.11239 (WeLore), from its text: one threshold for a wanted average reduction of the ranks. Differs from it: the budget counts
costs. The threshold minimises no error; the ranks of least total ‖W − W_r‖² are ``allocation.ranks`` with ``tails`` as errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from theory.arguments import Array, spectrum


def tails(s: Array) -> Array:
    """‖W − W_r‖² for r = 1, …, k. ``s``: singular values, (k,), in any order.

    >>> tails(np.array([2.0, 1.0])).tolist()
    [1.0, 0.0]
    """
    squares = np.sort(spectrum("truncation.tails", s) ** 2)  # smallest first: sums of small numbers lose nothing
    return np.concatenate([np.cumsum(squares)[:-1][::-1], [0.0]])


def ranks(singular: Sequence[Array], costs: Sequence[float], budget: float, largest: Sequence[int] | None = None) -> list[int]:
    """r_l of every layer at the smallest threshold that the budget allows. ``singular``: sᵢ of each, in any order; ``costs``: a_l > 0 a unit of rank;
    ``largest``: limits of each r_l. Every layer has rank 1 at least, because s₁/s₁ = 1.

    >>> ranks([np.array([4.0, 3.0, 2.0]), np.array([8.0, 1.0, 1.0])], [1.0, 1.0], 4.0)
    [3, 1]

    Raises ``ValueError`` for lists of different lengths, costs that are not positive, limits below 1, and a budget that ranks of 1 exceed.
    """
    call = f"truncation.ranks(budget={budget:g})"
    limits = [len(s) for s in singular] if largest is None else list(largest)
    if not len(singular) == len(costs) == len(limits):
        raise ValueError(f"{call}: singular, costs and largest must have one entry a layer")
    if not all(cost > 0 for cost in costs) or not all(limit >= 1 for limit in limits):
        raise ValueError(f"{call}: costs must be positive and limits at least 1")
    if sum(costs) > budget * (1 + 1e-12):
        raise ValueError(f"{call}: ranks of 1 cost {sum(costs):g} already")
    normalised = [np.sort(spectrum(call, s))[::-1][:limit] for s, limit in zip(singular, limits, strict=True)]
    value = np.concatenate([s[1:] / s[0] for s in normalised])
    layer = np.concatenate([np.full(len(s) - 1, place) for place, s in enumerate(normalised)])
    order = np.argsort(-value, kind="stable")
    spent = sum(costs) + np.cumsum(np.asarray(costs, dtype=np.float64)[layer[order]])
    taken = layer[order][spent <= budget * (1 + 1e-12)]
    return (1 + np.bincount(taken, minlength=len(singular))).tolist()


def factors_are_smaller(m: int, n: int, rank: int) -> bool:
    """Whether r(m+n) < mn: the layer is a low-rank component.

    >>> factors_are_smaller(128, 128, 63), factors_are_smaller(128, 128, 64)
    (True, False)
    """
    return rank * (m + n) < m * n
