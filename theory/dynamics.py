"""Exact expected dynamics of SGD with a projected gradient on a quadratic: the loss curve, its level, its largest stable step.

Setting: F(Θ) = ½tr(ΘHΘᵀ), Θ m×n, H symmetric positive definite n×n; Ĝ = ΘH + N with rows of N independent, mean zero, covariance
C; a fresh draw P each step; Θ ← Θ − η(ΘH + N)P. Then S_t = E[Θ_tᵀΘ_t] obeys a closed linear recursion:

    S_{t+1} = S_t − η(S_t H Ē + Ē H S_t) + η²·𝓣(H S_t H + mC),   Ē = E[P],  𝓣(M) = E[PMP],   E[F_t] = ½tr(H S_t).

Proof. Expand E[Θ_{t+1}ᵀΘ_{t+1}]: P is symmetric and independent of Θ_t and N, N is centred, E[(ΘH+N)ᵀ(ΘH+N)] = HSH + mC.
Source: arXiv 2603.20632 for the estimator; the recursion is derived here and checked against simulation in experiments/dynamics.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import solve_sylvester
from scipy.sparse.linalg import LinearOperator, eigs

from theory.arguments import Array, check_rank, symmetric
from theory.moments import Moments


def second_moment_path(law: Moments, hessian: ArrayLike, noise: ArrayLike, start: ArrayLike, eta: float, steps: int, rows: int) -> Array:
    """S_0 … S_steps, shape (steps+1, n, n), from S_0 = ``start`` = E[Θ_0ᵀΘ_0].

    ``hessian`` H, ``noise`` C (per row), ``start``: (n, n); ``eta`` η; ``rows`` m.
    """
    H, C = _problem("dynamics.second_moment_path", law, hessian, noise)
    S = symmetric("dynamics.second_moment_path", "start", start)
    path = [S]
    for _ in range(steps):
        drift = law.mean @ H @ S
        S = S - eta * (drift + drift.T) + eta**2 * law.second_moment(_even(H @ S @ H) + rows * C)
        S = _even(S)
        path.append(S)
    return np.stack(path)


def expected_loss(law: Moments, hessian: ArrayLike, noise: ArrayLike, start: ArrayLike, eta: float, steps: int, rows: int) -> Array:
    """E[F_0] … E[F_steps], shape (steps+1,); arguments as in ``second_moment_path``."""
    path = second_moment_path(law, hessian, noise, start, eta, steps, rows)
    return 0.5 * np.einsum("ij,tij->t", symmetric("dynamics.expected_loss", "hessian", hessian), path)


def largest_stable_step(law: Moments, hessian: ArrayLike) -> float:
    """The η below which S_t stays bounded and at which it does not: 1/ρ(A⁻¹B), A(S) = c(HS+SH), B(S) = 𝓣(HSH).

    Proof. The map S ↦ S − ηA(S) + η²B(S) is positive; its spectral radius is below 1 iff some S ≻ 0 has A(S) ≻ ηB(S). Such an S
    for η serves every smaller η, and A⁻¹ is positive because H ≻ 0, so the condition is ρ(ηA⁻¹B) < 1 (Perron–Frobenius).

    Raises ``ValueError`` for a law with E[P] ≠ cI: the directions it never sees do not contract at any step.
    """
    H = symmetric("dynamics.largest_stable_step", "hessian", hessian)
    if not law.unbiased:
        raise ValueError(f"dynamics.largest_stable_step(n={law.n}, r={law.rank}): the law is biased, no step contracts every direction")
    if float(np.linalg.eigvalsh(H)[0]) <= 0:
        raise ValueError("dynamics.largest_stable_step: the Hessian must be positive definite")
    n = law.n

    def growth(vector: Array) -> Array:
        S = _even(vector.reshape(n, n))
        return solve_sylvester(law.c * H, law.c * H, law.second_moment(_even(H @ S @ H))).ravel()

    return 1 / _spectral_radius(growth, n)


def growth_factor(law: Moments, hessian: ArrayLike, eta: float) -> float:
    """ρ of S ↦ S − η(SHĒ + ĒHS) + η²𝓣(HSH): the factor by which the noiseless E‖Θ‖² finally changes in one step."""
    H = symmetric("dynamics.growth_factor", "hessian", hessian)
    n = law.n

    def step(vector: Array) -> Array:
        S = _even(vector.reshape(n, n))
        drift = law.mean @ H @ S
        return (S - eta * (drift + drift.T) + eta**2 * law.second_moment(_even(H @ S @ H))).ravel()

    return _spectral_radius(step, n)


def stationary(law: Moments, hessian: ArrayLike, noise: ArrayLike, eta: float, rows: int) -> Array:
    """The fixed point S_∞ of the recursion, (n, n): A(S) − ηB(S) = η·m·𝓣(C). E[F_∞] = ½tr(H S_∞).

    Solved in the coordinates of symmetric matrices, n(n+1)/2 unknowns, so meant for n up to about 60.
    Raises ``ValueError`` when η is at or beyond ``largest_stable_step``.
    """
    H, C = _problem("dynamics.stationary", law, hessian, noise)
    limit = largest_stable_step(law, H)
    if not 0 < eta < limit:
        raise ValueError(f"dynamics.stationary(eta={eta}): a stationary level exists for 0 < eta < {limit:.6g} only")
    n = law.n
    row, column = np.triu_indices(n)
    basis = np.zeros((row.size, n, n))
    basis[np.arange(row.size), row, column] = 1.0
    basis[np.arange(row.size), column, row] = 1.0
    image = law.c * (H @ basis + basis @ H) - eta * law.second_moment(_even(H @ basis @ H))
    target = eta * rows * law.second_moment(C)
    solution = np.linalg.solve(image[:, row, column].T, target[row, column])
    S = np.zeros((n, n))
    S[row, column] = S[column, row] = solution
    return S


def lazy_contraction(n: int, rank: int, eta: float, curvature: float, inner: int, c: float = 1.0) -> float:
    """E‖Θ‖² after one outer step of K = ``inner`` SGD steps in a held subspace, over E‖Θ‖² before; H = hI, no noise.

    1 − (r/n)[1 − (1 − ηh·cn/r)^{2K}] for every law with VᵀV = (cn/r)I and E[P] = cI: P/(cn/r) is a projector, so Θ shrinks by
    (1 − ηh·cn/r)^K inside the subspace, stays outside, and the subspace holds r/n of ‖Θ‖² on average.
    """
    check_rank("dynamics.lazy_contraction", n, rank, c)
    shrink = 1 - eta * curvature * c * n / rank
    return 1 - rank / n * (1 - shrink ** (2 * inner))


def _problem(call: str, law: Moments, hessian: ArrayLike, noise: ArrayLike) -> tuple[Array, Array]:
    H, C = symmetric(call, "hessian", hessian), symmetric(call, "noise", noise)
    if H.shape != (law.n, law.n) or C.shape != (law.n, law.n):
        raise ValueError(f"{call}: hessian {H.shape} and noise {C.shape} must be ({law.n}, {law.n}) for this law")
    return H, C


def _even(M: Array) -> Array:
    return (M + M.swapaxes(-1, -2)) / 2


def _spectral_radius(apply: Callable[[Array], Array], n: int) -> float:
    """Largest |eigenvalue| of a linear map on n×n matrices, given by its action on their n² entries."""
    if n <= 4:  # ARPACK needs room for its subspace
        return float(np.abs(np.linalg.eigvals(np.stack([apply(row) for row in np.eye(n * n)], axis=1))).max())
    operator = LinearOperator((n * n, n * n), matvec=apply, dtype=np.float64)  # pyright: ignore[reportCallIssue]
    value = eigs(operator, k=1, which="LM", v0=np.eye(n).ravel(), return_eigenvectors=False)
    return float(np.abs(value[0]))
