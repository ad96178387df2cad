"""Second moments of an estimate direction by direction, against enumeration of every draw; their traces are those of theory/mse.py."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests import enumeration
from theory import grams, moments, mse, wta_crs

generator = np.random.default_rng(7)
X, D = generator.standard_normal((3, 4)), generator.standard_normal((3, 2)) * np.array([2.0, 0.3])
G = D.T @ X
LAWS = {
    "coordinate": lambda n: enumeration.coordinate(n, 2, 0.8),
    "rademacher": lambda n: enumeration.rademacher(n, 2, 0.8),
    "gaussian": lambda n: enumeration.gaussian(n, 2, 0.8),
    "truncated": lambda n: iter([(1.0, np.sqrt(0.8) * np.eye(n)[:, :2])]),
}


def brute(atoms, estimate) -> tuple[np.ndarray, np.ndarray]:
    """(E[ĜᵀĜ], E[ĜĜᵀ])."""
    drawn = [(probability, estimate(V @ V.T)) for probability, V in atoms]
    return sum(p * E.T @ E for p, E in drawn), sum(p * E @ E.T for p, E in drawn)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("stem", LAWS)
def test_on_the_features_they_are_those_of_all_draws(stem: str) -> None:
    law = moments(stem, 4, 2, 0.8)
    columns, rows = brute(LAWS[stem](4), lambda P: G @ P)
    np.testing.assert_allclose(grams.features(law, G, "input"), columns, rtol=0, atol=1e-12)
    np.testing.assert_allclose(grams.features(law, G, "output"), rows, rtol=0, atol=1e-12)
    square = mse.ipa(law, np.zeros((4, 4)), G.T @ G).square
    assert np.trace(columns) == pytest.approx(square) and np.trace(rows) == pytest.approx(square)


@pytest.mark.parametrize("stem", LAWS)
def test_on_the_tokens_they_are_those_of_all_draws(stem: str) -> None:
    law = moments(stem, 3, 2, 0.8)
    columns, rows = brute(LAWS[stem](3), lambda P: D.T @ P @ X)
    np.testing.assert_allclose(grams.tokens(law, D, X), columns, rtol=0, atol=1e-12)
    np.testing.assert_allclose(grams.tokens(law, X, D), rows, rtol=0, atol=1e-12)
    assert np.trace(columns) == pytest.approx(mse.tokens(law, D, X).square)


@pytest.mark.parametrize("winners", [0, 1])
def test_of_wta_crs_they_are_those_of_all_draws(winners: int) -> None:
    p, k = np.array([0.5, 0.2, 0.3]), 2
    order = np.argsort(-p)
    rest = order[winners:]
    mass = p[rest].sum()
    columns, rows = np.zeros((4, 4)), np.zeros((2, 2))
    for drawn in itertools.product(rest, repeat=k - winners):
        w = np.zeros(3)
        w[order[:winners]] = 1
        for j in drawn:
            w[j] += mass / ((k - winners) * p[j])
        E, chance = (D * w[:, None]).T @ X, np.prod(p[list(drawn)] / mass)
        columns, rows = columns + chance * E.T @ E, rows + chance * E @ E.T
    np.testing.assert_allclose(wta_crs.second_moment(D, X, p, k, winners), columns, rtol=0, atol=1e-12)
    np.testing.assert_allclose(wta_crs.second_moment(X, D, p, k, winners), rows, rtol=0, atol=1e-12)
    assert np.trace(columns) == pytest.approx(np.sum(G**2) + wta_crs.variance(D, X, p, k, winners))


def test_haar_multiplies_every_output_alike_and_spreads_over_the_inputs() -> None:
    n, rank = 4, 1
    law = moments("haar_stiefel", n, rank)
    np.testing.assert_allclose(grams.features(law, G, "output"), n / rank * G @ G.T, rtol=0, atol=1e-12)
    outside = np.linalg.svd(G)[2][-1]  # a direction in which G has nothing
    beta = rank * (n - rank) / (n * (n - 1) * (n + 2))
    assert outside @ grams.features(law, G, "input") @ outside == pytest.approx((n / rank) ** 2 * beta * np.sum(G**2))


def test_what_is_refused() -> None:
    law = moments("gaussian", 5, 2)
    with pytest.raises(ValueError, match=r"grams.features\(n=5\): gradient \(2, 4\) must have n columns"):
        grams.features(law, G, "input")
    with pytest.raises(ValueError, match=r"grams.tokens\(n=5\): delta \(3, 2\) and inputs \(3, 4\) must have n rows"):
        grams.tokens(law, D, X)
