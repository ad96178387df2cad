"""Whether layers whose weights have a low effective rank are those whose gradients have one.

Layers are no independent points: those of one kind, the last part of a layer's name, are alike in every block, and kinds differ. The correlation
over all layers mixes how kinds differ with how layers of one kind do. The one within kinds is Spearman's of what is left when the mean of its kind is
taken from every layer. Its p is by permutation: if within a kind it does not matter which layer a gradient is of, the gradients of its layers can
change places, and p is the share of such orders, the one found among them, whose correlation is as far from 0. A trend with depth that weights and
gradients have in common is a correlation within kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

PERMUTATIONS = 9999
SAME = 1e-12  # rounding of one correlation


def kind(layer: str) -> str:
    """The last part of a layer's name."""
    return layer.rpartition(".")[2]


def correlation(weights: ArrayLike, gradients: ArrayLike, layers: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """``pooled`` and ``within`` kinds, Spearman's correlations of two numbers a layer, and ``p`` of the latter, of two sides; NaN where all layers of
    a kind are equal in one of them, as where each kind has one layer. ``layers``, ``kinds``: how many."""
    both, kinds = [np.array(values, dtype=float) for values in (weights, gradients)], [kind(layer) for layer in layers]
    places = [np.flatnonzero([one == other for other in kinds]) for one in dict.fromkeys(kinds)]
    pooled: Any = stats.spearmanr(both[0], both[1])
    told = {"layers": len(kinds), "kinds": len(places), "pooled": float(pooled.statistic), "within": float("nan"), "p": float("nan")}
    if not all(any(np.ptp(values[mine]) > 0 for mine in places) for values in both):
        return told
    for values in both:
        for mine in places:
            values[mine] -= values[mine].mean()
    ranks = [stats.rankdata(values) - (len(kinds) + 1) / 2 for values in both]  # of mean 0, in any order
    orders, generator = np.tile(ranks[1], (PERMUTATIONS, 1)), np.random.default_rng(seed)
    for mine in places:
        orders[:, mine] = generator.permuted(orders[:, mine], axis=1)
    scale = np.sqrt(np.square(ranks).sum(1).prod())
    within, permuted = float(ranks[0] @ ranks[1] / scale), orders @ ranks[0] / scale
    return told | {"within": within, "p": float((1 + np.sum(np.abs(permuted) >= abs(within) - SAME)) / (1 + PERMUTATIONS))}
