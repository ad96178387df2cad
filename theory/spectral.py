"""Spectral sampling: keep eigen-directions of S with the best probabilities. The optimum with knowledge of the gradient.

Units are k directions q_i (columns of ``basis``, eigenvalues ``sigma``) and n−k exchangeable tail units of eigenvalue ``tail``, in
this order. π = optimal.inclusion_probabilities(units, r). A fixed-size design draws J of size r with P(i∈J) = π_i; t of them are tail
units and stand for F, a Haar frame of t columns on the complement. V = [q_i√(c/π_i), i ∈ J; F√(c/π̄)]. k = n: full form; k = 0: Haar.

Unbiased for ANY basis and ANY π > 0: E[P] = Σ_i (c/π_i)π_i q_iq_iᵀ + (c/π̄)(E[t]/(n−k))(I − QQᵀ) = cI, since E[t] = (n−k)π̄. Hence a stale
basis costs variance, never bias. P is block diagonal in [Q, Q⊥], so each block of E[PMP] needs the joint probabilities π_ij, E[1_i t]
and E[t²] of the design only.

Source: arXiv 2603.20632 (law), Madow (1949) and Deville & Tillé (1998) (designs); joint probabilities derived below.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from theory.arguments import Array, check_rank, matrix, symmetric
from theory.haar_stiefel import frame_coefficients
from theory.optimal import inclusion_probabilities

CENTRED = False  # the kept directions enter with a fixed sign

Design = Literal["systematic", "pivotal"]
FLOOR = 1e-3  # every unit keeps this share of the uniform probability r/n; costs at most 0.1 % of the optimum


def mean(
    n: int,
    rank: int,
    c: float = 1.0,
    basis: ArrayLike | None = None,
    sigma: ArrayLike | None = None,
    tail: float = 1.0,
    floor: float = FLOOR,
    design: Design = "systematic",
) -> Array:
    """E[P], shape (n, n): cI, or c times the projector on the units with π > 0 when ``floor`` is 0 and some σ is.

    ``basis``: (n, k) orthonormal columns (None: the leading k coordinates); ``sigma``: (k,) (None: k = 0); ``tail``: mean
    eigenvalue of the other n−k directions; ``floor``: see ``optimal.inclusion_probabilities``; ``design`` does not matter here.
    """
    law = _law("spectral.mean", n, rank, c, basis, sigma, tail, floor, design)
    kept = (law.Q * (law.pi > 0)) @ law.Q.T
    return c * (kept + (law.pi_tail > 0) * law.complement)


def second_moment(
    M: ArrayLike,
    rank: int,
    c: float = 1.0,
    basis: ArrayLike | None = None,
    sigma: ArrayLike | None = None,
    tail: float = 1.0,
    floor: float = FLOOR,
    design: Design = "systematic",
) -> Array:
    """E[PMP] for symmetric M of shape (*batch, n, n).

    In the basis [Q, Q⊥]: kept × kept c²π_ij/(π_iπ_j)·M_ij (diagonal c²/π_i), kept × tail c²E[1_i t]/(π_i π̄ d)·M_i⊥,
    tail × tail (c/π̄)²(αM + β·tr(M)I) with the Haar coefficients of dimension d = n−k averaged over t.
    """
    M = symmetric("spectral.second_moment", "M", M)
    law = _law("spectral.second_moment", M.shape[-1], rank, c, basis, sigma, tail, floor, design)
    Q, R, weight = law.Q, law.complement, _inverse(law.pi)
    kept = law.joint * weight[:, None] * weight[None, :] * (Q.T @ M @ Q)
    result = Q @ kept @ Q.T
    if law.dimension:
        tail_weight = float(_inverse(np.array(law.pi_tail)))
        cross = (weight * law.kept_tail * tail_weight / law.dimension)[:, None] * (Q.T @ M @ R)
        alpha, beta = frame_coefficients(law.dimension, law.tail_mean, law.tail_square)
        inside = R @ M @ R
        trace = np.trace(inside, axis1=-2, axis2=-1)[..., None, None]
        result = result + Q @ cross + (Q @ cross).swapaxes(-1, -2) + tail_weight**2 * (alpha * inside + beta * trace * R)
    return c**2 * result


def trace_weighted_mean(
    n: int,
    rank: int,
    c: float = 1.0,
    basis: ArrayLike | None = None,
    sigma: ArrayLike | None = None,
    tail: float = 1.0,
    floor: float = FLOOR,
    design: Design = "systematic",
) -> Array:
    """E[tr(P)·P], shape (n, n): kept i: c²[Σ_j π_ij/(π_iπ_j) + E[1_i t]/(π_iπ̄)]; tail: c²[Σ_i E[1_i t]/(π_iπ̄) + E[t²]/π̄²]/d."""
    law = _law("spectral.trace_weighted_mean", n, rank, c, basis, sigma, tail, floor, design)
    weight = _inverse(law.pi)
    tail_weight = float(_inverse(np.array(law.pi_tail)))
    with_tail = weight * law.kept_tail * tail_weight
    kept = weight * (law.joint @ weight) + with_tail
    result = (law.Q * kept) @ law.Q.T
    if law.dimension:
        result = result + (with_tail.sum() + law.tail_square * tail_weight**2) / law.dimension * law.complement
    return c**2 * result


def joint_inclusion(pi: ArrayLike, design: Design) -> Array:
    """π_ij = P(i ∈ J and j ∈ J), shape (n, n), of a fixed-size design taking the units in the order given; diagonal π_i.

    Raises ``ValueError`` for π outside [0, 1], a sum that is not an integer, or an unknown design.
    """
    pi = np.asarray(pi, dtype=np.float64)
    if (pi < 0).any() or (pi > 1).any() or abs(pi.sum() - round(pi.sum())) > 1e-9 * pi.size:
        raise ValueError(f"spectral.joint_inclusion: pi must lie in [0, 1] and sum to an integer, got sum {pi.sum():.6g}")
    if design == "systematic":
        return _joint_systematic(pi)
    if design == "pivotal":
        return _joint_pivotal(pi)
    raise ValueError(f"spectral.joint_inclusion(design={design!r}): known designs are 'systematic' and 'pivotal'")


def _joint_systematic(pi: Array) -> Array:
    """Madow: i ∈ J iff some u + integer falls in [C_{i−1}, C_i), C the cumulative sum, u uniform on [0, 1).

    J is constant between the sorted fractional parts of C, so π_ij is the total length of the pieces that hold both.
    """
    upper = np.cumsum(pi)
    upper[-1] = round(upper[-1])
    lower = np.concatenate([[0.0], upper[:-1]])
    cuts = np.unique(np.concatenate([[0.0, 1.0], upper % 1.0]))
    length, middle = np.diff(cuts), (cuts[1:] + cuts[:-1]) / 2
    inside = (np.ceil(upper[:, None] - middle) - np.ceil(lower[:, None] - middle)).astype(np.float64)
    return (inside * length) @ inside.T


def _joint_pivotal(pi: Array) -> Array:
    """Deville–Tillé in the order given: the live unit (value a, identity random) meets unit j, one of the two is decided.

    a is the fractional part of the running sum whatever the duels, and a live unit is selected in the end with probability a. So for i < j:
    π_ij = P(i selected before j)·π_j + [a + π_j ≥ 1]·P(i live before j)·(a + π_j − 1).
    """
    n = pi.size
    joint = np.diag(pi)
    selected, live = np.zeros(n), np.zeros(n)
    live[0], a = 1.0, pi[0]
    for j in range(1, n):
        total = a + pi[j]
        joint[:j, j] = selected[:j] * pi[j]
        if total < 1:
            stays = a / total if total > 0 else 1.0
            live *= stays
            live[j] = 1 - stays
            a = total
        else:
            joint[:j, j] += live[:j] * (total - 1)
            wins = (1 - pi[j]) / (2 - total) if total < 2 else 0.0  # the live unit is selected and j goes on
            selected += live * wins
            selected[j] = 1 - wins
            live *= 1 - wins
            live[j] = wins
            a = total - 1
        joint[j, :j] = joint[:j, j]
    return joint


class _Units(NamedTuple):
    Q: Array  # (n, k)
    complement: Array  # (n, n) projector on the tail, exactly zero at k = n
    pi: Array  # (k,) of the kept directions
    pi_tail: float
    joint: Array  # (k, k)
    kept_tail: Array  # (k,) E[1_i t]
    tail_mean: float  # E[t]
    tail_square: float  # E[t²]
    dimension: int  # n − k


def _law(
    call: str,
    n: int,
    rank: int,
    c: float,
    basis: ArrayLike | None,
    sigma: ArrayLike | None,
    tail: float,
    floor: float,
    design: Design,
) -> _Units:
    check_rank(call, n, rank, c)
    kept = np.zeros(0) if sigma is None else np.asarray(sigma, dtype=np.float64)
    k = kept.size
    Q = np.eye(n)[:, :k] if basis is None else matrix(call, "basis", basis)
    if Q.shape != (n, k):
        raise ValueError(f"{call}(n={n}, r={rank}): basis has shape {Q.shape}, expected {(n, k)} for {k} eigenvalues")
    pi = inclusion_probabilities(np.concatenate([kept, np.full(n - k, float(tail))]), rank, floor)
    joint = joint_inclusion(pi, design)
    complement = np.eye(n) - Q @ Q.T if k < n else np.zeros((n, n))
    return _Units(
        Q=Q,
        complement=complement,
        pi=pi[:k],
        pi_tail=float(pi[-1]) if k < n else 0.0,
        joint=joint[:k, :k],
        kept_tail=joint[:k, k:].sum(axis=1),
        tail_mean=float(pi[k:].sum()),
        tail_square=float(joint[k:, k:].sum()),
        dimension=n - k,
    )


def _inverse(pi: Array) -> Array:
    """1/π where π > 0, else 0: a unit that is never drawn contributes nothing."""
    return np.divide(1.0, pi, out=np.zeros_like(pi), where=pi > 0)
