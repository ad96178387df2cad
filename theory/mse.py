"""Mean squared error of every estimator, exactly, from the two moments of its law.

Setting: Ĝ is an m×n stochastic gradient with mean g, independent of the draw V of the law; P = VVᵀ. Noise Σ_ξ = E[(Ĝ−g)ᵀ(Ĝ−g)],
signal Σ_Θ = gᵀg, second moment S = Σ_ξ + Σ_Θ = E[ĜᵀĜ], all n×n. An error splits into three parts that are never negative:

    projection   what the draw of V adds                          tr((E[P²] − E[P]²)S)
    noise        what Ĝ brings and the mean projector lets through tr(E[P]²Σ_ξ)
    bias         squared distance of the mean estimate from g      tr((E[P] − I)²Σ_Θ)

At E[P] = cI these are tr((E[P²] − c²I)S), c²·tr Σ_ξ and (1−c)²‖g‖². Units: squared gradient. Source: arXiv 2603.20632.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from theory.arguments import Array, matrix, symmetric
from theory.moments import Moments


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """The three parts of a mean squared error, and ⟨E[estimate], g⟩ (``inner``, not squared), in units of squared gradient."""

    projection: float
    noise: float
    bias: float
    inner: float
    signal: float  # ‖g‖²

    @property
    def total(self) -> float:
        """E‖estimate − g‖²."""
        return self.projection + self.noise + self.bias

    @property
    def square(self) -> float:
        """E‖estimate‖²."""
        return self.total + 2 * self.inner - self.signal

    @property
    def alignment(self) -> float:
        """⟨E[estimate], g⟩/‖g‖², which is c for a weakly unbiased law; NaN when g = 0."""
        return self.inner / self.signal if self.signal > 0 else float("nan")


def gradient_moments(gradients: ArrayLike) -> tuple[Array, Array, Array]:
    """(g, Σ_ξ, Σ_Θ) of N equally likely gradients, shape (N, m, n): the exact moments of that finite population."""
    gradients = matrix("mse.gradient_moments", "gradients", gradients)
    if gradients.ndim != 3:
        raise ValueError(f"mse.gradient_moments: gradients must be (N, m, n), got shape {gradients.shape}")
    g = gradients.mean(axis=0)
    centred = (gradients - g).reshape(-1, gradients.shape[-1])
    return g, centred.T @ centred / len(gradients), g.T @ g


def ipa(law: Moments, noise: ArrayLike, signal: ArrayLike) -> Decomposition:
    """MSE of ĜP: E‖ĜP − g‖² = tr(E[P²]S) − 2tr(E[P]Σ_Θ) + tr Σ_Θ. ``noise`` is Σ_ξ, ``signal`` Σ_Θ, both (n, n)."""
    return _decompose(law, law.square, *_pair("mse.ipa", law, noise, signal))


def lr(
    law: Moments,
    rows: int,
    noise: ArrayLike,
    signal: ArrayLike,
    queries: int = 1,
    leave_one_out: bool = False,
    elsewhere: float = 0.0,
) -> Decomposition:
    """MSE of the zeroth-order estimate (1/q)Σ_i ⟨Ĝ, Z_iVᵀ⟩Z_iVᵀ, Z_i standard normal m×r, one V and one Ĝ for all q queries.

    Proof. Given V and Ĝ, ⟨Ĝ,ZVᵀ⟩ = ⟨A,Z⟩ with A = ĜV, and Isserlis gives E[⟨A,Z⟩²‖ZVᵀ‖²] = m·tr(VᵀV)‖A‖² + 2‖AVᵀ‖², that is
    m·tr(P)tr(ĜPĜᵀ) + 2tr(ĜP²Ĝᵀ). The mean over Z is ĜP, so q queries give (1/q)(m·E[tr(P)P] + 2E[P²]) + (1 − 1/q)E[P²]
    in the place of E[P²]. Exact for a loss linear along the perturbation, and for the antithetic form on a quadratic.

    ``rows``: m. ``leave_one_out``: from each slope the mean of the other queries' is taken, in which the loss at W drops out. It adds
    E[āᵢ²]E‖D‖² = m·E[tr(P)P]/(q−1) to one query and a factor 1 + 1/(q−1)² to two different ones.
    ``elsewhere``: Σ E⟨Ĝ_l,D_l⟩² over other parameters that the same queries perturb, ``slope`` of each: it stands in every slope, of mean zero.
    As q → ∞ this is ``ipa``; the full-rank (mn+2)‖g‖² of MeZO is r = n with VVᵀ = I.
    """
    if rows < 1 or queries < 1:
        raise ValueError(f"mse.lr(rows={rows}, queries={queries}): both must be at least 1")
    if leave_one_out and queries < 2:
        raise ValueError(f"mse.lr(queries={queries}, leave_one_out=True): needs at least 2 queries")
    others = 1 / (queries - 1) if leave_one_out else 0.0
    single = (1 + others) * rows * law.trace_weighted_mean() + 2 * law.square
    square = single / queries + (1 - 1 / queries) * (1 + others**2) * law.square
    found = _decompose(law, square, *_pair("mse.lr", law, noise, signal))
    shared = elsewhere * rows * float(np.trace(law.mean)) * (1 + others) / queries
    return replace(found, projection=found.projection + shared)


def slope(law: Moments, noise: ArrayLike, signal: ArrayLike) -> float:
    """E⟨Ĝ, ZVᵀ⟩² = tr(E[P]S), Z standard normal: what one parameter adds to the squared slope of a query."""
    noise, signal = _pair("mse.slope", law, noise, signal)
    return float(np.sum(law.mean * (noise + signal)))


def tokens(law: Moments, delta: ArrayLike, inputs: ArrayLike) -> Decomposition:
    """MSE of the token-axis estimate ΔᵀPX of ΔᵀX, P on the T tokens: E‖ΔᵀPX‖² = tr(E[P ΔΔᵀ P]·XXᵀ).

    ``delta``: Δ, (T, m); ``inputs``: X, (T, n). Column-row sampling is ``coordinate`` with replacement. Here E[P²] is not enough,
    which is why a law is the full map M ↦ E[PMP].
    """
    delta, inputs = matrix("mse.tokens", "delta", delta), matrix("mse.tokens", "inputs", inputs)
    if delta.shape[0] != law.n or inputs.shape[0] != law.n:
        raise ValueError(f"mse.tokens(n={law.n}): delta {delta.shape} and inputs {inputs.shape} must have n rows (tokens)")
    exact = delta.T @ inputs
    expected = delta.T @ law.mean @ inputs
    square = float(np.sum(law.second_moment(delta @ delta.T) * (inputs @ inputs.T)))
    return Decomposition(
        projection=square - float(np.sum(expected**2)),
        noise=0.0,
        bias=float(np.sum((expected - exact) ** 2)),
        inner=float(np.sum(expected * exact)),
        signal=float(np.sum(exact**2)),
    )


def two_sided(left: Moments, right: Moments, gradients: ArrayLike) -> Decomposition:
    """MSE of P_L Ĝ P_R, independent draws on both sides, for N equally likely gradients of shape (N, m, n).

    The moments compose one axis at a time: E‖P_LĜP_R‖² = E tr(E[P_L²]·Ĝ·E[P_R²]·Ĝᵀ), the mean is E[P_L]·g·E[P_R].
    """
    gradients = matrix("mse.two_sided", "gradients", gradients)
    if gradients.shape[-2:] != (left.n, right.n):
        raise ValueError(f"mse.two_sided: gradients {gradients.shape} do not fit laws of n={left.n} (left) and n={right.n} (right)")
    gradients = gradients.reshape(-1, left.n, right.n)
    g = gradients.mean(axis=0)
    expected = left.mean @ g @ right.mean
    count = len(gradients)
    passed = left.mean @ gradients @ right.mean  # the estimate averaged over the draws, for each gradient
    square = float(np.sum((left.square @ gradients @ right.square) * gradients)) / count
    return Decomposition(
        projection=square - float(np.sum(passed**2)) / count,
        noise=float(np.sum((passed - expected) ** 2)) / count,
        bias=float(np.sum((expected - g) ** 2)),
        inner=float(np.sum(expected * g)),
        signal=float(np.sum(g**2)),
    )


def lr_two_sided(left: Moments, right: Moments, gradients: ArrayLike) -> Decomposition:
    """MSE of ⟨Ĝ, UZVᵀ⟩UZVᵀ, Z standard normal r×r, U and V drawn independently by ``left`` and ``right``, for N equally likely gradients (N, m, n).

    As ``lr``: given U and V, E[⟨A,Z⟩²‖UZVᵀ‖²] = tr(P_U)tr(P_V)‖A‖² + 2‖UAVᵀ‖² with A = UᵀĜV, so E‖·‖² is
    tr(E[tr(P_U)P_U]·Ĝ·E[tr(P_V)P_V]·Ĝᵀ) + 2tr(E[P_U²]·Ĝ·E[P_V²]·Ĝᵀ). SubZero: Haar–Stiefel on both sides.
    """
    plain = two_sided(left, right, gradients)
    gradients = matrix("mse.lr_two_sided", "gradients", gradients).reshape(-1, left.n, right.n)
    weighted = float(np.sum((left.trace_weighted_mean() @ gradients @ right.trace_weighted_mean()) * gradients)) / len(gradients)
    return replace(plain, projection=plain.projection + weighted + plain.square)


def _pair(call: str, law: Moments, noise: ArrayLike, signal: ArrayLike) -> tuple[Array, Array]:
    noise, signal = symmetric(call, "noise", noise), symmetric(call, "signal", signal)
    for name, value in (("noise", noise), ("signal", signal)):
        if value.shape != (law.n, law.n):
            raise ValueError(f"{call}: {name} has shape {value.shape}, the law has n={law.n}")
        if float(value.diagonal().min()) < 0:
            raise ValueError(f"{call}: {name} is a second moment and cannot have a negative diagonal ({value.diagonal().min():.3g})")
    return noise, signal


def _decompose(law: Moments, square: Array, noise: Array, signal: Array) -> Decomposition:
    """Split tr(square·S) − 2tr(E[P]Σ_Θ) + tr Σ_Θ, where ``square`` stands for E[P²] or its zeroth-order counterpart."""
    identity = np.eye(law.n)
    through = law.c**2 * identity if law.unbiased else law.mean @ law.mean  # E[P]²
    return Decomposition(
        projection=float(np.sum((square - through) * (noise + signal))),
        noise=float(np.sum(through * noise)),
        bias=float(np.sum((through - 2 * law.mean + identity) * signal)),
        inner=float(np.sum(law.mean * signal)),
        signal=float(np.trace(signal)),
    )
