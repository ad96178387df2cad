"""Compression factors and error feedback: what a compressor keeps, what it adds, and when a feedback loop diverges.

A compressor C is *contractive* with α when E‖C(x) − x‖² ≤ (1−α)‖x‖², *unbiased* with ω when E[C(x)] = x and E‖C(x) − x‖² ≤ ω‖x‖².
Error feedback repairs a contractive one over time: EF14 v = e + g; x ← x − ηC(v); e ← v − C(v). EF21 h ← h + C(g − h); x ← x − ηh.
Sources: Seide et al. (2014); Richtárik et al. (2021, arXiv 2106.05203); GradLite, arXiv 2510.22467.
"""

from __future__ import annotations

import math

import numpy as np

from theory.arguments import Array, check_rank
from theory.moments import Moments


def contraction_one_sided(n: int, rank: int) -> float:
    """α = r/n, exactly, of x ↦ xQQᵀ with a Haar frame Q: E‖xQQᵀ‖² = ‖x‖²·r/n and the residual is orthogonal to it."""
    check_rank("feedback.contraction_one_sided", n, rank)
    return rank / n


def contraction_two_sided(m: int, n: int, rank: int) -> float:
    """α = r²/(mn), exactly, of x ↦ UUᵀxQQᵀ with independent Haar frames: one factor per side."""
    check_rank("feedback.contraction_two_sided", min(m, n), rank)
    return rank**2 / (m * n)


def contraction_top_svd(m: int, n: int, rank: int) -> float:
    """α ≥ r/min(m,n) of the top-r SVD: the r largest of min(m,n) squared singular values hold at least their share.

    Attained when all singular values are equal; 1 on matrices of rank ≤ r.
    """
    check_rank("feedback.contraction_top_svd", min(m, n), rank)
    return rank / min(m, n)


def variance_factor(law: Moments) -> float:
    """The least ω of x ↦ xP for an unbiased law at c = 1: λ_max(E[P²]) − 1, attained along that eigenvector.

    Proof. E‖xP − x‖² = x(E[P²] − I)xᵀ. Haar, coordinate, transform: n/r − 1; Gaussian (n+1)/r; Rademacher (n−1)/r.
    Raises ``ValueError`` unless E[P] = I.
    """
    if abs(law.c - 1) > 1e-12 or not law.unbiased:
        raise ValueError(f"feedback.variance_factor(n={law.n}, r={law.rank}, c={law.c}): defined for E[P] = I only")
    return float(np.linalg.eigvalsh(law.square)[-1] - 1)


def ef14_matrix(eta: float, curvature: float, kept: float) -> Array:
    """The linear map of (x, e) in one EF14 step on f = (λ/2)x² when C keeps the fraction κ of its input (``kept``).

    v = e + λx;  x ← x − ηκv;  e ← (1−κ)v.
    """
    return np.array([[1 - eta * kept * curvature, -eta * kept], [(1 - kept) * curvature, 1 - kept]])


def ef21_matrix(eta: float, curvature: float, kept: float) -> Array:
    """The linear map of (x, h) in one EF21 step: h ← h + κ(λx − h);  x ← x − ηh."""
    return np.array([[1 - eta * kept * curvature, -eta * (1 - kept)], [kept * curvature, 1 - kept]])


def literal_matrix(eta: float, curvature: float, kept: float) -> Array:
    """The linear map of (x, r) in one step of GradLite as transcribed, on f = (λ/2)x² with g̃ = κg.

    x ← x − η(g̃ + r);  r ← r + (g − g̃). Determinant 1 + ηλ(1−2κ): r is added to the update but never paid back.
    """
    return np.array([[1 - eta * kept * curvature, -eta], [(1 - kept) * curvature, 1.0]])


def literal_modulus(eta: float, curvature: float) -> float:
    """√(1+ηλ) > 1, the modulus of both eigenvalues in a direction the compressor discards (κ = 0), for every η > 0."""
    return math.sqrt(1 + eta * curvature)


def literal_diverges(eta: float, curvature: float, kept: float) -> bool:
    """Whether the literal recursion has an eigenvalue of modulus above 1. True for every η > 0 when κ < 1/2.

    Proof. With T = 2 − ηκλ and D = 1 + ηλ(1−2κ) the roots of z² − Tz + D lie in the closed unit disc iff D ≤ 1 and |T| ≤ 1 + D
    (Jury); D ≤ 1 iff κ ≥ 1/2, T ≤ 1 + D iff κ ≤ 1, and −T ≤ 1 + D iff ηλ(3κ−1) ≤ 4.
    """
    if not (eta > 0 and curvature > 0 and 0 <= kept <= 1):
        raise ValueError(f"feedback.literal_diverges(eta={eta}, curvature={curvature}, kept={kept}): need eta, λ > 0, κ in [0, 1]")
    return kept < 0.5 or eta * curvature * (3 * kept - 1) > 4
