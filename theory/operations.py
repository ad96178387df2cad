"""Operations (multiplications and additions, two for each pair) of a layer, a lift and a redraw, and of a training step made of them.

    nn.Linear, forward and backward with its weight gradient                 6Tmn
    LowRankLinear, B = 0 in the forward pass                                 4Tmn + 2Tr(m + n)
    LowRankLinear, B in the forward pass                                     4Tmn + 2Tr(m + n) + 2Tr(2m + n)
    lift W ← W + BVᵀ                                                         2mnr
    Haar–Stiefel V: Gram matrix and triangular solve, half of each counted   2nr²

T tokens, m out-features, n in-features, r rank. Source: estimators/linear.py; the ratio at r = n/8, m = n is 0.75 with B = 0, 1 − 1/3 + r(m+n)/3mn.
"""

from __future__ import annotations


def dense(T: int, m: int, n: int) -> int:
    """Of ``nn.Linear``: product, and gradients of input and weight."""
    return 6 * T * m * n


def low_rank(T: int, m: int, n: int, r: int, *, inside: bool = False) -> int:
    """Of LowRankLinear; ``inside``: B is not zero.

    >>> low_rank(4096, 1024, 1024, 128) / dense(4096, 1024, 1024)
    0.75
    """
    return 4 * T * m * n + 2 * T * r * (m + n) + (2 * T * r * (2 * m + n) if inside else 0)


def lift(m: int, n: int, r: int) -> int:
    """Of W ← W + BVᵀ."""
    return 2 * m * n * r


def redraw(n: int, r: int) -> int:
    """Of orthonormal columns from Gaussian ones by Cholesky, the r³/3 of the factor itself left out."""
    return 2 * n * r**2


def step(T: int, h: int, f: int, blocks: int, vocabulary: int, length: int, ratio: float | None, lift_every: int = 1) -> int:
    """Of a training step of a LLaMA on T tokens in sequences of ``length``: layers, attention, head. ``ratio``: r/n, None for full training.

    Attention: scores and their products with values, forward once and backward twice: 12·T·length·h a block.
    """
    shapes = [(h, h)] * 4 + [(f, h)] * 2 + [(h, f)]
    if ratio is None:
        layers = sum(dense(T, m, n) for m, n in shapes)
    else:
        ranks = [max(1, round(ratio * n)) for _, n in shapes]
        layers = sum(low_rank(T, m, n, r, inside=lift_every > 1) for (m, n), r in zip(shapes, ranks, strict=True))
        layers += sum(lift(m, n, r) for (m, n), r in zip(shapes, ranks, strict=True)) // lift_every
    return blocks * (layers + 12 * T * length * h) + dense(T, vocabulary, h)
