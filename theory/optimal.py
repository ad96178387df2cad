"""The best law: the floor without knowledge of the gradient, and the optimum with it.

Setting: P = VVᵀ with V n×r and E[P] = cI; the cost of a law on a second moment S = E[ĜᵀĜ] with eigenvalues σ is tr(E[P²]S), the
only part of the MSE (theory/mse.py) that depends on the law. Source: arXiv 2603.20632; for one matrix also arXiv 2505.09647.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from theory.arguments import Array, check_rank, finite, spectrum, symmetric


def instance_independent_floor(n: int, rank: int, c: float = 1.0) -> float:
    """The least tr E[P²] of any rank-r law with E[P] = cI: c²n²/r.

    Proof. (tr P)² ≤ r·tr(P²) because P has at most r non-zero eigenvalues; E[(tr P)²] ≥ (E tr P)² = c²n². Equality iff
    VᵀV = (cn/r)I almost surely: Haar–Stiefel, coordinates without replacement, subsampled orthonormal transforms.
    """
    check_rank("optimal.instance_independent_floor", n, rank, c)
    return c**2 * n**2 / rank


def inclusion_probabilities(sigma: ArrayLike, rank: float, floor: float = 0.0) -> Array:
    """π of shape (n,), the inclusion probabilities that minimise Σ σᵢ/πᵢ subject to Σπ = r and floor·r/n ≤ πᵢ ≤ 1.

    πᵢ = min{1, (r−τ)√σᵢ / Σ_{unsaturated} √σ_j}, τ the number of saturated units (arXiv 2603.20632).
    ``sigma``: (n,) eigenvalues of S, in any order, zeros allowed. ``floor``: share of the uniform probability r/n that every unit keeps,
    in [0, 1]; units that would fall below are set to it and the rest is solved again. With floor = 0 a unit with σᵢ = 0 has πᵢ = 0
    unless fewer than r units are positive; the rest of r is then spread evenly over the zeros, which costs nothing.

    >>> inclusion_probabilities([9.0, 1.0, 1.0, 1.0], rank=2)
    array([1.        , 0.33333333, 0.33333333, 0.33333333])
    """
    sigma = spectrum("optimal.inclusion_probabilities", sigma)
    if not 1 <= rank <= sigma.size:
        raise ValueError(f"optimal.inclusion_probabilities(n={sigma.size}, r={rank}): rank must be between 1 and n")
    if not 0 <= floor <= 1:
        raise ValueError(f"optimal.inclusion_probabilities(floor={floor}): floor is a share of r/n and must be in [0, 1]")
    root = np.sqrt(sigma / sigma.max())
    lowest = floor * rank / sigma.size
    at_floor = np.zeros(sigma.size, dtype=bool)
    while True:  # the multiplier only falls as units go to the floor, so the set only grows
        pi = np.full(sigma.size, lowest)
        pi[~at_floor] = _saturated(root[~at_floor], rank - lowest * at_floor.sum())
        below = ~at_floor & (pi < lowest * (1 - 1e-12))
        if not below.any():
            return pi
        at_floor |= below


def _saturated(root: Array, budget: float) -> Array:
    """min{1, λ·root} with Σ = budget ≤ len(root); λ from the smallest τ at which the largest free unit stays below 1."""
    order = np.argsort(-root, kind="stable")
    ordered = root[order]
    rest = np.cumsum(ordered[::-1])[::-1]  # Σ_{j ≥ τ} root_j, summed from the small end
    tau = int(np.argmax((budget - np.arange(root.size)) * ordered <= rest))
    pi = np.ones(root.size)
    free = order[tau:]
    if rest[tau] > 0:
        pi[free] = np.minimum(1.0, (budget - tau) * root[free] / rest[tau])
    else:
        pi[free] = (budget - tau) / free.size
    return pi


def optimal_value(sigma: ArrayLike, rank: int, c: float = 1.0) -> float:
    """tr(E[P²]S) of the optimal spectral law: c²[Σ_sat σ + (Σ_unsat √σ)²/(r−τ)].

    Without saturation this is c²(tr S^{1/2})²/r, for one matrix G the nuclear-norm form c²‖G‖_*²/r.
    """
    sigma = spectrum("optimal.optimal_value", sigma)
    pi = inclusion_probabilities(sigma, rank)
    positive = sigma > 0
    return float(c**2 * np.sum(sigma[positive] / pi[positive]))


def lower_bound(sigma: ArrayLike, rank: int, c: float = 1.0) -> float:
    """No rank-r law with E[P] = cI has tr(E[P²]S) below this; equal to ``optimal_value``, so the spectral law is optimal.

    Proof (duality). For symmetric Y commuting with S and X = PS^{1/2} of rank ≤ r, ‖X‖² − ⟨X, Y⟩ ≥ −¼·(sum of the r largest yᵢ²)
    by Eckart–Young, so E‖X‖² ≥ c·Σ yᵢ√σᵢ − ¼·Σ_{top r} yᵢ². Take yᵢ = 2c√σᵢ on a set of τ units and 2√t on the others,
    c²σᵢ ≥ t on the set; the best √t is c·Σ_unsat√σ/(r−τ), which gives the value, and c²σᵢ ≥ t is the saturation rule itself.
    The same proof with X any random matrix, E[X] = G, makes it the least E‖X‖² of any unbiased rank-r estimate of one matrix.
    """
    sigma = np.sort(spectrum("optimal.lower_bound", sigma))[::-1]
    check_rank("optimal.lower_bound", sigma.size, rank, c)
    root = np.sqrt(sigma)
    best = 0.0
    for tau in range(rank):  # every τ gives a valid bound once y is sorted; the largest is the tight one
        t = (c * root[tau:].sum() / (rank - tau)) ** 2
        y_squared = np.concatenate([4 * c**2 * sigma[:tau], np.full(sigma.size - tau, 4 * t)])
        y = np.sqrt(y_squared)
        best = max(best, float(c * y @ root - np.sort(y_squared)[::-1][:rank].sum() / 4))
    return best


def best_scale(square: ArrayLike, signal: ArrayLike, second: ArrayLike) -> float:
    """c*, the isotropy constant of least MSE for a law whose E[P²] at c = 1 is ``square``: ‖g‖²/tr(E[P²]S).

    Proof. The MSE at c is c²·tr(E[P²]S) − 2c‖g‖² + ‖g‖², a parabola. On a floor-attaining law E[P²] = (n/r)I and
    c* = (r/n)·‖g‖²/tr S. ``signal`` is Σ_Θ = gᵀg, ``second`` is S, all (n, n).
    """
    square = symmetric("optimal.best_scale", "square", square)
    signal = symmetric("optimal.best_scale", "signal", signal)
    second = symmetric("optimal.best_scale", "second", second)
    cost = float(np.sum(square * second))
    if cost <= 0:
        raise ValueError("optimal.best_scale: the second moment is zero, every scale has the same error")
    return float(np.trace(signal)) / cost


def effective_rank(sigma: ArrayLike) -> float:
    """exp of the entropy of σ/Σσ, in [1, n]. Roy & Vetterli (2007), applied to the eigenvalues of S."""
    p = spectrum("optimal.effective_rank", sigma)
    p = p[p > 0] / p.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def stable_rank(sigma: ArrayLike) -> float:
    """Σσ/max σ, in [1, n]; for the eigenvalues of GᵀG it is ‖G‖_F²/‖G‖₂²."""
    sigma = spectrum("optimal.stable_rank", finite("optimal.stable_rank", "sigma", sigma))
    return float(sigma.sum() / sigma.max())
