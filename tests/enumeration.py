"""Exact expectations in tiny dimension: every law as a finite list of (probability, V), by enumeration or by exact quadrature.

Written from the definition of each law and sharing no code with theory/ or estimators/. Quadratures are exact for the degree-4 polynomials
that E[P], E[PMP] and E[tr(P)P] need.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

Atom = tuple[float, np.ndarray]


def gaussian(n: int, rank: int, c: float) -> Iterator[Atom]:
    """Three Gauss–Hermite nodes an entry: exact to degree 5."""
    nodes, weights = np.array([-math.sqrt(3), 0, math.sqrt(3)]), np.array([1 / 6, 2 / 3, 1 / 6])
    for index in itertools.product(range(3), repeat=n * rank):
        yield float(np.prod(weights[list(index)])), math.sqrt(c / rank) * nodes[list(index)].reshape(n, rank)


def sparse_sign(n: int, rank: int, c: float, sparsity: float) -> Iterator[Atom]:
    """All sign patterns with zeros."""
    values = np.array([-1.0, 0.0, 1.0]) * math.sqrt(c * sparsity / rank)
    chance = np.array([1 / (2 * sparsity), 1 - 1 / sparsity, 1 / (2 * sparsity)])
    for index in itertools.product(range(3), repeat=n * rank):
        probability = float(np.prod(chance[list(index)]))
        if probability > 0:
            yield probability, values[list(index)].reshape(n, rank)


def rademacher(n: int, rank: int, c: float) -> Iterator[Atom]:
    """All sign patterns."""
    for signs in itertools.product((-1.0, 1.0), repeat=n * rank):
        yield 2.0 ** -(n * rank), math.sqrt(c / rank) * np.array(signs).reshape(n, rank)


def directions(n: int) -> Iterator[Atom]:
    """Uniform unit vectors (n, 1), n = 1, 2, 3: angles in the plane, Gauss–Legendre × angles on the sphere."""
    if n == 1:
        yield 1.0, np.ones((1, 1))
    elif n == 2:
        for k in range(12):
            angle = 2 * math.pi * k / 12
            yield 1 / 12, np.array([[math.cos(angle)], [math.sin(angle)]])
    else:
        heights, weights = np.polynomial.legendre.leggauss(6)
        for (z, w), k in itertools.product(zip(heights, weights, strict=True), range(12)):
            angle, radius = 2 * math.pi * k / 12, math.sqrt(1 - z * z)
            yield w / 2 / 12, np.array([[radius * math.cos(angle)], [radius * math.sin(angle)], [z]])


def frames(n: int, rank: int) -> Iterator[Atom]:
    """Haar frames up to their right rotation (which VVᵀ does not see): a direction, its complement, or all of space; n ≤ 3."""
    if rank == 0:
        yield 1.0, np.zeros((n, 0))
    elif rank == n:
        yield 1.0, np.eye(n)
    elif rank == 1:
        yield from directions(n)
    elif rank == n - 1:
        for probability, q in directions(n):
            yield probability, np.linalg.svd(q)[0][:, 1:]
    else:
        raise ValueError((n, rank))


def haar_stiefel(n: int, rank: int, c: float) -> Iterator[Atom]:
    """n ≤ 3."""
    for probability, Q in frames(n, rank):
        yield probability, math.sqrt(c * n / rank) * Q


def coordinate(n: int, rank: int, c: float, replacement: bool = False) -> Iterator[Atom]:
    """All subsets, or all tuples."""
    choices = list(itertools.product(range(n), repeat=rank) if replacement else itertools.combinations(range(n), rank))
    for J in choices:
        yield 1 / len(choices), math.sqrt(c * n / rank) * np.eye(n)[:, list(J)]


def subsampled_transform(n: int, rank: int, c: float, C: np.ndarray) -> Iterator[Atom]:
    """All signs × all subsets of the rows of an orthonormal C."""
    subsets = list(itertools.combinations(range(n), rank))
    for signs in itertools.product((-1.0, 1.0), repeat=n):
        for J in subsets:
            yield 2.0**-n / len(subsets), math.sqrt(c * n / rank) * np.diag(signs) @ C.T[:, list(J)]


def systematic(pi: np.ndarray) -> Iterator[tuple[float, tuple[int, ...]]]:
    """(probability, J) of Madow's design, from the definition: walk u through its breakpoints."""
    upper = np.cumsum(pi)
    cuts = sorted({0.0, 1.0, *(float(x % 1.0) for x in upper)})
    for low, high in itertools.pairwise(cuts):
        if high - low > 1e-13:
            u = (low + high) / 2
            points = u + np.arange(round(pi.sum()))
            yield high - low, tuple(int(np.searchsorted(upper, p, side="right")) for p in points)


def pivotal(pi: np.ndarray) -> Iterator[tuple[float, tuple[int, ...]]]:
    """(probability, J) of the ordered pivotal design: the full tree of duels."""

    def duel(j: int, live: int, a: float, chosen: tuple[int, ...]) -> Iterator[tuple[float, tuple[int, ...]]]:
        if j == len(pi):
            yield 1.0, tuple(sorted((*chosen, live) if a > 0.5 else chosen))
            return
        total = a + pi[j]
        if total < 1 - 1e-12:
            outcomes = [(a / total, live, chosen), (pi[j] / total, j, chosen)] if total > 0 else [(1.0, live, chosen)]
            rest = total
        else:
            rest = max(total - 1, 0.0)
            spare = 2 - total
            share = (1 - pi[j]) / spare if spare > 1e-12 else 0.5
            outcomes = [(share, j, (*chosen, live)), (1 - share, live, (*chosen, j))]
        for probability, alive, taken in outcomes:
            if probability > 0:
                for below, J in duel(j + 1, alive, rest, taken):
                    yield probability * below, J

    yield from duel(1, 0, float(pi[0]), ())


def spectral(Q: np.ndarray, pi: np.ndarray, c: float, design: str) -> Iterator[Atom]:
    """Kept directions by the design, tail units as a Haar frame of the complement (of dimension at most 3)."""
    n, k = Q.shape
    complement = np.linalg.svd(Q, full_matrices=True)[0][:, k:] if k else np.eye(n)
    for probability, J in {"systematic": systematic, "pivotal": pivotal}[design](pi):
        kept = [i for i in J if i < k]
        tail = len(J) - len(kept)
        left = Q[:, kept] * np.sqrt(c / pi[kept])
        if tail == 0:
            yield probability, left
        else:
            for inner, F in frames(n - k, tail):
                yield probability * inner, np.hstack([left, complement @ F * math.sqrt(c / pi[-1])])


def expectation(atoms: Iterator[Atom], M: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """(total probability, E[P], E[PMP], E[tr(P)P])."""
    total, mean, second, weighted = 0.0, 0.0, 0.0, 0.0
    for probability, V in atoms:
        P = V @ V.T
        total += probability
        mean = mean + probability * P
        second = second + probability * P @ M @ P
        weighted = weighted + probability * np.trace(P) * P
    return total, np.asarray(mean), np.asarray(second), np.asarray(weighted)
