"""A rank for every layer under one budget: the least total error for what the ranks cost together.

Layer l has the error f_l(r), which falls with r, at the cost a_l·r. Least Σ f_l(r_l) subject to Σ a_l·r_l ≤ b:

    for a multiplier λ ≥ 0 every layer takes the r_l of least f_l(r) + λ·a_l·r

Optimal for what it costs because any cheaper or equal choice has Σ f ≥ Σ (f_l(r_l) + λa_l·r_l) − λb' with b' its cost (Lagrangian duality, Everett
1963); only budgets between two neighbours on the lower convex hull of the f_l are not met exactly, by less than one step of one layer, and what is
left is given to the steps of the largest gain that still fit. For floor-attaining laws f_l = (n_l/r)·t_l, so r_l ∝ √(n_l t_l/a_l).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from theory.arguments import Array

BISECTIONS = 200


def ranks(errors: Sequence[Array], choices: Sequence[np.ndarray], costs: Sequence[float], budget: float) -> list[int]:
    """r of every layer. ``choices``: possible ranks of each, increasing; ``errors``: f_l at these; ``costs``: a_l > 0 a unit of rank; ``budget``: b.

    >>> ranks([np.array([8.0, 4.0, 2.0]), np.array([1.0, 0.5, 0.25])], [np.array([1, 2, 4])] * 2, [1.0, 1.0], 5.0)
    [4, 1]

    Raises ``ValueError`` when the smallest ranks are above the budget, for shapes that differ, and for costs that are not positive.
    """
    call = f"allocation.ranks(budget={budget:g})"
    if not len(errors) == len(choices) == len(costs) or any(np.shape(f) != np.shape(r) for f, r in zip(errors, choices, strict=False)):
        raise ValueError(f"{call}: errors, choices and costs must have one entry a layer, and an error for every choice")
    if not all(cost > 0 for cost in costs):
        raise ValueError(f"{call}: costs must be positive")
    spent = [np.asarray(r, dtype=np.float64) * cost for r, cost in zip(choices, costs, strict=True)]
    if (least := sum(float(s[0]) for s in spent)) > budget:
        raise ValueError(f"{call}: the smallest ranks cost {least:g} already")

    def taken(multiplier: float) -> list[int]:
        return [int(np.argmin(f + multiplier * s)) for f, s in zip(errors, spent, strict=True)]

    def total(at: list[int]) -> float:
        return sum(float(s[i]) for s, i in zip(spent, at, strict=True))

    if total(taken(0.0)) <= budget:
        best = taken(0.0)
    else:
        low, high = 0.0, max(float(np.max((f[0] - f[1:]) / (s[1:] - s[0]), initial=0.0)) for f, s in zip(errors, spent, strict=True)) + 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if total(taken(middle)) <= budget else (middle, high)
        best = taken(high)
    _fill(best, errors, spent, budget - total(best))
    return [int(r[i]) for r, i in zip(choices, best, strict=True)]


def _fill(best: list[int], errors: Sequence[Array], spent: Sequence[Array], left: float) -> None:
    """Spend what is left: again and again the step of the largest gain a unit of cost that fits."""
    while True:
        steps = [
            ((f[i] - f[j]) / (s[j] - s[i]), layer, j)
            for layer, (f, s, i) in enumerate(zip(errors, spent, best, strict=True))
            for j in range(i + 1, len(s))
            if s[j] - s[i] <= left and f[j] < f[i]
        ]
        if not steps:
            return
        _, layer, j = max(steps)
        left -= float(spent[layer][j] - spent[layer][best[layer]])
        best[layer] = j
