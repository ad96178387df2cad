"""Variance of WTA-CRS against its definition, all sequences of draws enumerated; the best number of winners; what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from theory import coordinate, mse, wta_crs
from theory.moments import Moments

PROBABILITIES = [[1, 1, 1, 1], [1, 8, 2, 3], [0, 5, 1, 3], [1e-6, 3, 2, 1e-6], [1, 0, 0, 3]]


def problem(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    delta, inputs = generator.standard_normal((len(p), 2)), generator.standard_normal((len(p), 3))
    inputs[p == 0] = 0
    return delta, inputs


@pytest.mark.parametrize("values", PROBABILITIES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_variance_is_that_of_all_draws(values: list[float], k: int) -> None:
    p = np.array(values) / sum(values)
    delta, inputs = problem(p)
    order = np.argsort(-p, kind="stable")
    for winners in range(k):
        rest = [j for j in order[winners:] if p[j] > 0]
        mass = sum(p[j] for j in rest)
        mean, square = 0.0, 0.0
        for drawn in itertools.product(rest, repeat=k - winners):
            chance = np.prod([p[j] / mass for j in drawn])
            w = np.zeros(len(p))
            w[order[:winners]] = 1
            for j in drawn:
                w[j] += mass / ((k - winners) * p[j])
            estimate = (delta * w[:, None]).T @ inputs
            mean, square = mean + chance * estimate, square + chance * np.sum((estimate - delta.T @ inputs) ** 2)
        if rest:
            np.testing.assert_allclose(mean, delta.T @ inputs, rtol=0, atol=1e-12)
            assert wta_crs.variance(delta, inputs, p, k, winners) == pytest.approx(square, rel=1e-9, abs=1e-12)
        else:
            assert wta_crs.variance(delta, inputs, p, k, winners) == 0


def test_without_winners_it_is_column_row_sampling() -> None:
    p = np.array([0.1, 0.4, 0.2, 0.3])
    delta, inputs = problem(p)
    for q in (p, np.full(4, 0.25)):
        law = Moments(
            n=4, rank=3, c=1.0, centred=False, mean=np.eye(4), trace_weighted_mean=lambda: np.eye(4),
            second_moment=lambda M, q=q: coordinate.weighted_second_moment(M, 3, q),
        )  # fmt: skip
        assert wta_crs.variance(delta, inputs, q, 3, 0) == pytest.approx(mse.tokens(law, delta, inputs).total, rel=1e-12)


def test_the_best_number_of_winners_is_that_of_the_bound() -> None:
    """Of a_j = p_j·(orthonormal) the first term of the variance is the bound, and ‖R‖² is small beside it."""
    for values in ([1.0] * 6, [20, 15, 1, 1, 1, 1], [30, 1, 1, 1, 1, 1]):
        p = np.array(values) / sum(values)
        bounds = [np.sort(p)[::-1][c:].sum() ** 2 / (4 - c) for c in range(4)]
        assert wta_crs.optimal_winners(p, 4) == int(np.argmin(bounds))
        assert wta_crs.optimal_winners(p, 4, 1) <= wta_crs.optimal_winners(p, 4)
    assert wta_crs.optimal_winners(np.array([0.5, 0.5, 0.0]), 3) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5, 0.5], 2, 2), r"wta_crs.variance\(k=2, winners=2\): there must be at least one draw"),
        (([0.5, 0.5], 3, 0), r"\(k=3\): must be between 1 and the number of tokens, 2"),
        (([0.5, 0.4], 1, 0), "with sum 1"),
        (([1.5, -0.5], 1, 0), "not negative"),
        (([1.0, 0.0], 1, 0), "has probability 0"),
        (([1.0], 1, 0), "must have 1 rows"),
    ],
)
def test_what_is_refused(arguments: tuple[list[float], int, int], message: str) -> None:
    p, k, winners = arguments
    with pytest.raises(ValueError, match=message):
        wta_crs.variance(np.ones((2, 2)), np.ones((2, 3)), p, k, winners)
