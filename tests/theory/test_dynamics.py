"""The recursion against enumeration of two steps, and its level, boundary and special cases against each other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests import enumeration
from theory import dynamics, feedback, moments

H = np.array([[1.0, 0.2, 0.0], [0.2, 0.5, 0.1], [0.0, 0.1, 0.3]])
START = np.array([[1.0, -2.0, 0.5], [0.3, 0.0, 1.0]])
NONE = np.zeros((3, 3))


def atoms_of(stem: str) -> list[enumeration.Atom]:
    if stem == "coordinate":
        return list(enumeration.coordinate(3, 2, 0.9))
    if stem == "rademacher":
        return list(enumeration.rademacher(3, 2, 0.9))
    return [(1.0, np.sqrt(0.9) * np.eye(3)[:, :2])]


@pytest.mark.parametrize("stem", ["coordinate", "rademacher", "truncated"])
def test_two_steps_equal_enumeration(stem: str) -> None:
    """Noise: rows ±a, each row its own sign, so C = aaᵀ."""
    a, eta = np.array([0.3, -0.1, 0.2]), 0.4
    noises = [(0.25, np.array([[s], [t]]) * a) for s, t in itertools.product((-1, 1), repeat=2)]
    states = [(1.0, START)]
    for _ in range(2):
        states = [(p * q * w, theta - eta * (theta @ H + N) @ V @ V.T) for p, theta in states for q, V in atoms_of(stem) for w, N in noises]
    expected = sum(p * 0.5 * np.trace(theta @ H @ theta.T) for p, theta in states)
    losses = dynamics.expected_loss(moments(stem, 3, 2, 0.9), H, np.outer(a, a), START.T @ START, eta, 2, rows=2)
    assert losses[0] == pytest.approx(0.5 * np.trace(START @ H @ START.T))
    assert losses[2] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("stem", ["gaussian", "rademacher", "haar_stiefel", "coordinate", "subsampled_transform"])
@pytest.mark.parametrize(("n", "rank"), [(3, 1), (3, 3), (7, 2)])
def test_boundary_and_level(stem: str, n: int, rank: int) -> None:
    Q = np.linalg.qr(np.random.default_rng(n).standard_normal((n, n)))[0]
    hessian = (Q * np.geomspace(1, 0.1, n)) @ Q.T
    hessian = (hessian + hessian.T) / 2
    law = moments(stem, n, rank, 0.8)
    limit = dynamics.largest_stable_step(law, hessian)
    assert dynamics.growth_factor(law, hessian, limit) == pytest.approx(1, abs=1e-8)
    assert dynamics.growth_factor(law, hessian, 0.99 * limit) < 1 < dynamics.growth_factor(law, hessian, 1.01 * limit)
    noise = np.diag(np.linspace(1, 2, n))
    level = dynamics.stationary(law, hessian, noise, 0.5 * limit, rows=2)
    path = dynamics.second_moment_path(law, hessian, noise, level, 0.5 * limit, 3, rows=2)
    np.testing.assert_allclose(path, np.stack([level] * 4), atol=1e-9 * np.trace(level))
    assert np.linalg.eigvalsh(level)[0] > 0


def test_full_rank_is_gradient_descent() -> None:
    law = moments("haar_stiefel", 3, 3)
    assert dynamics.largest_stable_step(law, H) == pytest.approx(2 / np.linalg.eigvalsh(H)[-1])


def test_isotropic_hessian_agrees_with_the_lazy_contraction() -> None:
    n, rank, c, h, eta = 6, 2, 0.7, 1.3, 0.1
    path = dynamics.second_moment_path(moments("haar_stiefel", n, rank, c), h * np.eye(n), np.zeros((n, n)), np.eye(n), eta, 1, rows=1)
    assert np.trace(path[1]) / n == pytest.approx(dynamics.lazy_contraction(n, rank, eta, h, 1, c))
    enumerated = sum(
        p * np.sum((np.linalg.matrix_power(np.eye(4) - 0.2 * V @ V.T, 3)) ** 2) / 4 for p, V in enumeration.coordinate(4, 2, 1.0)
    )
    assert dynamics.lazy_contraction(4, 2, 0.2, 1.0, 3) == pytest.approx(enumerated)


def test_what_has_no_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="the law is biased"):
        dynamics.largest_stable_step(moments("truncated", 3, 2), H)
    with pytest.raises(ValueError, match="positive definite"):
        dynamics.largest_stable_step(moments("haar_stiefel", 3, 2), NONE)
    with pytest.raises(ValueError, match="stationary level exists"):
        dynamics.stationary(moments("haar_stiefel", 3, 2), H, np.eye(3), 10.0, rows=1)
    with pytest.raises(ValueError, match="must be"):
        dynamics.expected_loss(moments("haar_stiefel", 4, 2), H, NONE, NONE, 0.1, 1, rows=1)


# Error feedback


def test_contraction_factors_equal_enumeration() -> None:
    x = np.array([[1.0, -2.0, 0.4]])
    kept = sum(p * np.sum((x @ Q @ Q.T - x) ** 2) for p, Q in enumeration.frames(3, 2)) / np.sum(x**2)
    assert 1 - kept == pytest.approx(feedback.contraction_one_sided(3, 2))
    X = np.array([[1.0, 2.0, 0.0], [0.5, -1.0, 3.0]])
    lost = sum(p * q * np.sum((U @ U.T @ X @ Q @ Q.T - X) ** 2) for p, U in enumeration.frames(2, 1) for q, Q in enumeration.frames(3, 1))
    assert 1 - lost / np.sum(X**2) == pytest.approx(feedback.contraction_two_sided(2, 3, 1))
    s = np.linalg.svd(np.diag([1.0, 1.0, 1.0])[:2], compute_uv=False)
    assert s[0] ** 2 / np.sum(s**2) == pytest.approx(feedback.contraction_top_svd(2, 3, 1))


def test_variance_factors() -> None:
    for stem, expected in (("haar_stiefel", 8 / 3 - 1), ("gaussian", 9 / 3), ("rademacher", 7 / 3)):
        assert feedback.variance_factor(moments(stem, 8, 3)) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"E\[P\] = I only"):
        feedback.variance_factor(moments("haar_stiefel", 8, 3, 0.5))


@pytest.mark.parametrize("kept", [0.0, 0.2, 0.49, 0.5, 0.51, 0.8, 0.99])
@pytest.mark.parametrize("step", [1e-3, 0.1, 1.0, 1.9, 3.9, 5.0])
def test_the_divergence_condition_is_that_of_the_eigenvalues(kept: float, step: float) -> None:
    modulus = np.abs(np.linalg.eigvals(feedback.literal_matrix(step, 1.0, kept))).max()
    assert feedback.literal_diverges(step, 1.0, kept) == (modulus > 1 + 1e-12)
    assert np.linalg.det(feedback.literal_matrix(step, 1.0, kept)) == pytest.approx(1 + step * (1 - 2 * kept))
    if kept == 0:
        assert modulus == pytest.approx(feedback.literal_modulus(step, 1.0))


def test_ef14_and_ef21_converge_where_the_literal_form_does_not() -> None:
    for kept in (0.1, 0.3, 0.49):
        for matrix in (feedback.ef14_matrix, feedback.ef21_matrix):
            assert np.abs(np.linalg.eigvals(matrix(0.1, 1.0, kept))).max() < 1
        assert feedback.literal_diverges(0.1, 1.0, kept)
    with pytest.raises(ValueError, match="kept=2"):
        feedback.literal_diverges(0.1, 1.0, 2)


def test_the_map_of_ef21_is_its_recursion() -> None:
    eta, curvature, kept, x, h = 0.2, 1.5, 0.3, 0.7, -0.4
    then = h + kept * (curvature * x - h)
    assert feedback.ef21_matrix(eta, curvature, kept) @ [x, h] == pytest.approx([x - eta * then, then])
