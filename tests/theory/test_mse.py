"""Mean squared errors against enumeration of every random ingredient."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import enumeration
from theory import moments, mse

generator = np.random.default_rng(5)
GRADIENTS = generator.standard_normal((3, 2, 4)) * np.array([3, 1, 0.3, 0.1])
G, NOISE, SIGNAL = mse.gradient_moments(GRADIENTS)


def brute(atoms, gradients, estimate):
    """(E‖X − g‖², E[X]) over equally likely gradients and the atoms of a law."""
    g, total, mean = gradients.mean(0), 0.0, np.zeros_like(gradients[0])
    for probability, V in atoms:
        for gradient in gradients:
            X = estimate(gradient, V)
            total += probability * np.sum((X - g) ** 2) / len(gradients)
            mean += probability * X / len(gradients)
    return total, mean


@pytest.mark.parametrize("c", [1.0, 0.4])
@pytest.mark.parametrize(
    ("stem", "atoms"),
    [
        ("coordinate", lambda c: enumeration.coordinate(4, 2, c)),
        ("rademacher", lambda c: enumeration.rademacher(4, 2, c)),
        ("truncated", lambda c: iter([(1.0, np.sqrt(c) * np.eye(4)[:, :2])])),
    ],
)
def test_ipa_equals_enumeration(stem: str, atoms, c: float) -> None:
    predicted = mse.ipa(moments(stem, 4, 2, c), NOISE, SIGNAL)
    total, mean = brute(atoms(c), GRADIENTS, lambda gradient, V: gradient @ V @ V.T)
    assert predicted.total == pytest.approx(total, abs=1e-12)
    assert predicted.bias == pytest.approx(np.sum((mean - G) ** 2), abs=1e-12)
    assert predicted.inner == pytest.approx(np.sum(mean * G), abs=1e-12)
    assert min(predicted.projection, predicted.noise, predicted.bias) > -1e-12


def test_the_decomposition_of_a_weakly_unbiased_law() -> None:
    c, n, rank = 0.6, 4, 2
    parts = mse.ipa(moments("gaussian", n, rank, c), NOISE, SIGNAL)
    second = np.trace(NOISE + SIGNAL)
    assert parts.noise == pytest.approx(c**2 * np.trace(NOISE))
    assert parts.bias == pytest.approx((1 - c) ** 2 * np.trace(SIGNAL))
    assert parts.projection == pytest.approx(c**2 * ((n + rank + 1) / rank - 1) * second)
    assert parts.alignment == pytest.approx(c)
    assert parts.square == pytest.approx(c**2 * (n + rank + 1) / rank * second)


@settings(deadline=None)
@given(n=st.integers(2, 12), rank=st.integers(1, 12), m=st.integers(1, 5))
def test_relative_error_without_noise(n: int, rank: int, m: int) -> None:
    rank = min(rank, n)
    signal = np.diag(np.arange(1.0, n + 1))
    haar = mse.ipa(moments("haar_stiefel", n, rank), np.zeros((n, n)), signal)
    gaussian = mse.ipa(moments("gaussian", n, rank), np.zeros((n, n)), signal)
    assert haar.total / haar.signal == pytest.approx(n / rank - 1, abs=1e-9)
    assert gaussian.total / gaussian.signal == pytest.approx((n + 1) / rank)
    # zeroth order at c = 1
    norm = np.trace(signal)
    assert mse.lr(moments("haar_stiefel", n, rank), m, 0 * signal, signal).square == pytest.approx(n / rank * (m * rank + 2) * norm)
    expected = (m * (n + 2 / rank) + 2 * (n + rank + 1) / rank) * norm
    assert mse.lr(moments("gaussian", n, rank), m, 0 * signal, signal).square == pytest.approx(expected)
    assert mse.lr(moments("haar_stiefel", n, n), m, 0 * signal, signal).square == pytest.approx((m * n + 2) * norm)  # MeZO


def test_lr_equals_enumeration_over_z_and_v() -> None:
    m, n, rank, c = 1, 3, 2, 0.8
    gradients = GRADIENTS[:, :1, :n]
    _, noise, signal = mse.gradient_moments(gradients)
    z_atoms = [(p, Z * np.sqrt(rank)) for p, Z in enumeration.gaussian(m, rank, 1.0)]  # N(0, 1) entries

    def atoms():
        for pv, V in enumeration.sparse_sign(n, rank, c, 3.0):
            for pz, Z in z_atoms:
                yield pv * pz, Z @ V.T

    total, _ = brute(atoms(), gradients, lambda gradient, D: np.sum(gradient * D) * D)
    law = moments("sparse_sign", n, rank, c)
    assert mse.lr(law, m, noise, signal).total == pytest.approx(total, rel=1e-12)
    ipa = mse.ipa(law, noise, signal).total
    assert mse.lr(law, m, noise, signal, queries=10**9).total == pytest.approx(ipa, rel=1e-6)


def test_two_queries_share_their_subspace() -> None:
    m, n, rank, c = 1, 2, 1, 1.0
    gradients = GRADIENTS[:, :1, :n]
    _, noise, signal = mse.gradient_moments(gradients)
    z_atoms = [(p, Z) for p, Z in enumeration.gaussian(m, rank, 1.0)]

    def atoms():
        for pv, V in enumeration.haar_stiefel(n, rank, c):
            for p1, Z1 in z_atoms:
                for p2, Z2 in z_atoms:
                    yield pv * p1 * p2, np.stack([Z1 @ V.T, Z2 @ V.T])

    total, _ = brute(atoms(), gradients, lambda gradient, D: sum(np.sum(gradient * d) * d for d in D) / 2)
    assert mse.lr(moments("haar_stiefel", n, rank, c), m, noise, signal, queries=2).total == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("queries", [2, 3])
def test_leave_one_out_and_other_parameters_equal_enumeration(queries: int) -> None:
    """Every V, every Z of every query, and ±1 with the weight of what another parameter adds to each slope."""
    m, n, rank, c = 1, 2, 1, 1.0
    gradients = GRADIENTS[:, :1, :n]
    _, noise, signal = mse.gradient_moments(gradients)
    z_atoms = [(p / 2, Z, b) for p, Z in enumeration.gaussian(m, rank, 1.0) for b in (-1.3, 1.3)]

    def atoms():
        for pv, V in enumeration.sparse_sign(n, rank, c, 2.0):
            for some in itertools.product(z_atoms, repeat=queries):
                yield pv * np.prod([p for p, _, _ in some]), (np.stack([Z @ V.T for _, Z, _ in some]), np.array([b for _, _, b in some]))

    def estimate(gradient, drawn):
        D, b = drawn
        a = np.array([np.sum(gradient * d) for d in D]) + b
        return np.einsum("q,qmn->mn", a - (a.sum() - a) / (queries - 1), D) / queries

    total, _ = brute(atoms(), gradients, estimate)
    law = moments("sparse_sign", n, rank, c, sparsity=2.0)
    found = mse.lr(law, m, noise, signal, queries, leave_one_out=True, elsewhere=1.3**2)
    assert found.total == pytest.approx(total, rel=1e-12)
    assert mse.lr(law, m, noise, signal, queries, elsewhere=1.3**2).total < total


def test_slope_is_the_squared_slope() -> None:
    m, n, rank = 1, 3, 2
    gradients = GRADIENTS[:, :1, :n]
    _, noise, signal = mse.gradient_moments(gradients)
    law = moments("sparse_sign", n, rank, 0.8, sparsity=3.0)
    expected = (
        sum(
            pv * pz * np.mean([np.sum(G * (Z @ V.T)) ** 2 for G in gradients])
            for pv, V in enumeration.sparse_sign(n, rank, 0.8, 3.0)
            for pz, Z in enumeration.gaussian(m, rank, 1.0)
        )
        * rank
    )  # entries of N(0, 1)
    assert mse.slope(law, noise, signal) == pytest.approx(expected, rel=1e-12)


def test_two_sided_zeroth_order_equals_enumeration() -> None:
    gradients = GRADIENTS[:, :2, :2]
    z_atoms = [(p, Z) for p, Z in enumeration.gaussian(1, 1, 1.0)]

    def atoms():
        for pu, U in enumeration.haar_stiefel(2, 1, 1.0):
            for pv, V in enumeration.sparse_sign(2, 1, 0.7, 3.0):
                for pz, Z in z_atoms:
                    yield pu * pv * pz, U @ Z @ V.T

    total, _ = brute(atoms(), gradients, lambda gradient, D: np.sum(gradient * D) * D)
    left, right = moments("haar_stiefel", 2, 1), moments("sparse_sign", 2, 1, 0.7, sparsity=3.0)
    assert mse.lr_two_sided(left, right, gradients).total == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("replacement", [False, True])
def test_token_axis_equals_enumeration(replacement: bool) -> None:
    delta, inputs = generator.standard_normal((4, 2)), generator.standard_normal((4, 3))
    predicted = mse.tokens(moments("coordinate", 4, 2, replacement=replacement), delta, inputs)
    exact = (delta.T @ inputs)[None]
    total, _ = brute(enumeration.coordinate(4, 2, 1.0, replacement), exact, lambda _, V: delta.T @ V @ V.T @ inputs)
    assert predicted.total == pytest.approx(total, rel=1e-12)
    assert predicted.bias == pytest.approx(0, abs=1e-12)


def test_two_sided_equals_enumeration() -> None:
    def atoms():
        for pu, U in enumeration.haar_stiefel(2, 1, 0.9):
            for pv, V in enumeration.coordinate(4, 3, 1.2):
                yield pu * pv, (U, V)

    left, right = moments("haar_stiefel", 2, 1, 0.9), moments("coordinate", 4, 3, 1.2)
    predicted = mse.two_sided(left, right, GRADIENTS)
    total, mean = brute(atoms(), GRADIENTS, lambda gradient, UV: UV[0] @ UV[0].T @ gradient @ UV[1] @ UV[1].T)
    assert predicted.total == pytest.approx(total, rel=1e-12)
    assert predicted.inner == pytest.approx(np.sum(mean * G), rel=1e-12)
    identity = moments("haar_stiefel", 2, 2)
    one_sided = mse.ipa(right, NOISE, SIGNAL)
    assert mse.two_sided(identity, right, GRADIENTS).total == pytest.approx(one_sided.total, rel=1e-12)


def test_wrong_input_is_named() -> None:
    law = moments("haar_stiefel", 4, 2)
    with pytest.raises(ValueError, match=r"mse.ipa: noise has shape \(3, 3\), the law has n=4"):
        mse.ipa(law, np.eye(3), np.eye(4))
    with pytest.raises(ValueError, match="must be symmetric"):
        mse.ipa(law, np.triu(np.ones((4, 4))), np.eye(4))
    with pytest.raises(ValueError, match="NaN or infinite"):
        mse.ipa(law, np.full((4, 4), np.nan), np.eye(4))
    with pytest.raises(ValueError, match="queries=0"):
        mse.lr(law, 2, np.eye(4), np.eye(4), queries=0)
    with pytest.raises(ValueError, match="must have n rows"):
        mse.tokens(law, np.ones((3, 2)), np.ones((4, 2)))
    with pytest.raises(ValueError, match="do not fit"):
        mse.two_sided(law, law, np.ones((2, 3, 4)))
    with pytest.raises(ValueError, match=r"must be \(N, m, n\)"):
        mse.gradient_moments(np.ones((3, 4)))
    with pytest.raises(ValueError, match="must be a matrix"):
        mse.gradient_moments(np.ones(3))
    with pytest.raises(ValueError, match="must be square"):
        law.second_moment(np.ones((3, 4)))
