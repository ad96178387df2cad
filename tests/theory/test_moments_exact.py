"""Rung two: every law's stated moments against exact enumeration of the law in tiny dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tests import enumeration
from theory import moments, optimal, spectral, subsampled_transform

c = 0.7


def random_symmetric(n: int, seed: int = 0) -> np.ndarray:
    raw = np.random.default_rng(seed).standard_normal((n, n))
    return raw + raw.T


def orthonormal(n: int, k: int, seed: int = 1) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, k)))[0]


def hadamard4() -> np.ndarray:
    h = np.array([[1, 1], [1, -1]])
    return np.kron(h, h) / 2


def dct(n: int) -> np.ndarray:
    k, a = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    C = np.sqrt(2 / n) * np.cos(np.pi * (2 * a + 1) * k / (2 * n))
    C[0] /= math.sqrt(2)
    return C


Atoms = Callable[[], Iterator[enumeration.Atom]]

CASES: dict[str, tuple[str, int, int, dict, Atoms]] = {
    "gaussian 2x2": ("gaussian", 2, 2, {}, lambda: enumeration.gaussian(2, 2, c)),
    "gaussian 3x1": ("gaussian", 3, 1, {}, lambda: enumeration.gaussian(3, 1, c)),
    "rademacher 3x2": ("rademacher", 3, 2, {}, lambda: enumeration.rademacher(3, 2, c)),
    "rademacher 2x2": ("rademacher", 2, 2, {}, lambda: enumeration.rademacher(2, 2, c)),
    "sparse_sign 3x2": ("sparse_sign", 3, 2, {}, lambda: enumeration.sparse_sign(3, 2, c, 3.0)),
    "sparse_sign s=5": ("sparse_sign", 3, 1, {"sparsity": 5.0}, lambda: enumeration.sparse_sign(3, 1, c, 5.0)),
    "haar 1x1": ("haar_stiefel", 1, 1, {}, lambda: enumeration.haar_stiefel(1, 1, c)),
    "haar 2x1": ("haar_stiefel", 2, 1, {}, lambda: enumeration.haar_stiefel(2, 1, c)),
    "haar 3x1": ("haar_stiefel", 3, 1, {}, lambda: enumeration.haar_stiefel(3, 1, c)),
    "haar 3x2": ("haar_stiefel", 3, 2, {}, lambda: enumeration.haar_stiefel(3, 2, c)),
    "haar 3x3": ("haar_stiefel", 3, 3, {}, lambda: enumeration.haar_stiefel(3, 3, c)),
    "coordinate 1x1": ("coordinate", 1, 1, {}, lambda: enumeration.coordinate(1, 1, c)),
    "coordinate 5x2": ("coordinate", 5, 2, {}, lambda: enumeration.coordinate(5, 2, c)),
    "coordinate 4x4": ("coordinate", 4, 4, {}, lambda: enumeration.coordinate(4, 4, c)),
    "coordinate replacement 4x3": ("coordinate", 4, 3, {"replacement": True}, lambda: enumeration.coordinate(4, 3, c, True)),
    "dct 4x2": ("subsampled_transform", 4, 2, {}, lambda: enumeration.subsampled_transform(4, 2, c, dct(4))),
    "dct 5x3": ("subsampled_transform", 5, 3, {}, lambda: enumeration.subsampled_transform(5, 3, c, dct(5))),
    "hadamard 4x3": (
        "subsampled_transform", 4, 3, {"transform": "hadamard"}, lambda: enumeration.subsampled_transform(4, 3, c, hadamard4()),
    ),
    "hadamard 6x2": (
        "subsampled_transform", 6, 2, {"transform": "hadamard"},
        lambda: enumeration.subsampled_transform(6, 2, c, np.kron(np.array([[1, 1], [1, -1]]) / math.sqrt(2), dct(3))),
    ),
    "truncated": ("truncated", 4, 2, {"basis": orthonormal(4, 2)}, lambda: iter([(1.0, math.sqrt(c) * orthonormal(4, 2))])),
    "truncated default": ("truncated", 4, 3, {}, lambda: iter([(1.0, math.sqrt(c) * np.eye(4)[:, :3])])),
}  # fmt: skip

SIGMA = np.array([4.0, 1.0, 0.6, 0.3, 0.05])
for design in ("systematic", "pivotal"):
    for keep in (2, 3, 4, 5):
        for rank in (1, 2, 3, 4, 5):
            Q = orthonormal(5, keep)
            tail = float(SIGMA[keep:].mean()) if keep < 5 else 1.0
            pi = optimal.inclusion_probabilities(np.append(SIGMA[:keep], np.full(5 - keep, tail)), rank, 1e-3)
            CASES[f"spectral {design} k={keep} r={rank}"] = (
                "spectral", 5, rank, {"basis": Q, "sigma": SIGMA[:keep], "tail": tail, "design": design},
                lambda Q=Q, pi=pi, design=design: enumeration.spectral(Q, pi, c, design),
            )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_moments_equal_the_enumerated_law(case: str) -> None:
    stem, n, rank, parameters, atoms = CASES[case]
    M = random_symmetric(n)
    total, mean, second, weighted = enumeration.expectation(atoms(), M)
    law = moments(stem, n, rank, c, **parameters)
    assert abs(total - 1) < 1e-12
    np.testing.assert_allclose(law.mean, mean, atol=1e-12)
    np.testing.assert_allclose(law.second_moment(M), second, atol=1e-11)
    np.testing.assert_allclose(law.trace_weighted_mean(), weighted, atol=1e-11)


@pytest.mark.parametrize("design", ["systematic", "pivotal"])
@pytest.mark.parametrize(
    "pi", [[0.9, 0.6, 0.3, 0.1, 0.1], [0.5, 0.5, 0.5, 0.5], [1.0, 0.3, 0.7, 1.0], [0.2, 0.3, 0.5], [1.0, 1.0], [0.0, 1.0, 0.4, 0.6]]
)
def test_joint_inclusion_equals_the_enumerated_design(design: spectral.Design, pi: list[float]) -> None:
    expected = np.zeros((len(pi), len(pi)))
    for probability, J in getattr(enumeration, design)(np.array(pi)):
        inside = np.zeros(len(pi))
        inside[list(J)] = 1
        expected += probability * np.outer(inside, inside)
    np.testing.assert_allclose(spectral.joint_inclusion(pi, design), expected, atol=1e-12)
    np.testing.assert_allclose(np.diag(expected), pi, atol=1e-12)


def test_transforms_are_orthonormal() -> None:
    for n in (1, 2, 6, 8, 12, 15):
        for transform in ("dct", "hadamard"):
            C = subsampled_transform.matrix(n, transform)
            np.testing.assert_allclose(C @ C.T, np.eye(n), atol=1e-12)


@pytest.mark.parametrize("case", [name for name, (_, n, *_) in CASES.items() if n <= 4])
def test_the_trace_weighted_mean_follows_from_the_second_moment_map(case: str) -> None:
    """E[tr(P)P] is a contraction of M ↦ E[PMP]: Σ_a E[P(e_a e_cᵀ + e_c e_aᵀ)P]_ad − E[P²]_cd."""
    stem, n, rank, parameters, _ = CASES[case]
    law = moments(stem, n, rank, c, **parameters)
    e = np.eye(n)
    result = -law.square
    for a in range(n):
        for k in range(n):
            result[k] += law.second_moment(np.outer(e[a], e[k]) + np.outer(e[k], e[a]))[a]
    np.testing.assert_allclose(law.trace_weighted_mean(), result, atol=1e-11)
