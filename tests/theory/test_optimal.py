"""The optimum against a general-purpose optimiser, its bounds, and its edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from theory import moments, mse, optimal

spectra = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12)


@settings(deadline=None)
@given(sigma=spectra, rank=st.integers(1, 12), floor=st.sampled_from([0.0, 1e-3, 0.1, 1.0]))
def test_probabilities_are_feasible_and_satisfy_the_optimality_conditions(sigma: list[float], rank: int, floor: float) -> None:
    rank = min(rank, len(sigma))
    root = np.sqrt(sigma)
    pi = optimal.inclusion_probabilities(sigma, rank, floor)
    lowest = floor * rank / len(sigma)
    assert pi.sum() == pytest.approx(rank, rel=1e-10)
    assert (pi >= lowest * (1 - 1e-9)).all() and (pi <= 1).all()
    free = (pi > lowest * (1 + 1e-9)) & (pi < 1 - 1e-9)
    if free.any():
        multiplier = (pi[free] / root[free]).mean()  # π = λ√σ inside, at least that at the floor, at most that when saturated
        np.testing.assert_allclose(pi[free], multiplier * root[free], rtol=1e-8)
        assert (multiplier * root[pi >= 1 - 1e-9] >= 1 - 1e-6).all()
        assert (multiplier * root[pi <= lowest * (1 + 1e-9)] <= lowest * (1 + 1e-6)).all()


def test_a_general_optimiser_finds_nothing_better() -> None:
    sigma, rank = np.array([9.0, 3.0, 1.0, 0.4, 0.1]), 3
    found = minimize(
        lambda pi: np.sum(sigma / pi),
        np.full(5, rank / 5),
        bounds=[(1e-6, 1.0)] * 5,
        constraints={"type": "eq", "fun": lambda pi: pi.sum() - rank},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert optimal.optimal_value(sigma, rank) == pytest.approx(found.fun, rel=1e-7)
    np.testing.assert_allclose(optimal.inclusion_probabilities(sigma, rank), found.x, atol=1e-4)


@settings(deadline=None)
@given(sigma=spectra, rank=st.integers(1, 12), c=st.floats(0.2, 2.0))
def test_the_spectral_law_attains_the_lower_bound_and_no_law_is_below(sigma: list[float], rank: int, c: float) -> None:
    n, rank = len(sigma), min(rank, len(sigma))
    S = np.diag(sigma)
    value, bound = optimal.optimal_value(sigma, rank, c), optimal.lower_bound(sigma, rank, c)
    assert value == pytest.approx(bound, rel=1e-9)
    assert bound >= (c * np.sqrt(sigma).sum()) ** 2 / rank * (1 - 1e-9)  # the nuclear-norm form
    spectral = moments("spectral", n, rank, c, sigma=sigma, floor=0.0)
    assert np.sum(spectral.square * S) == pytest.approx(value, rel=1e-9)
    for stem in ("gaussian", "rademacher", "haar_stiefel", "coordinate"):
        assert np.sum(moments(stem, n, rank, c).square * S) >= bound * (1 - 1e-9)


def test_a_few_known_directions_come_close_to_the_optimum() -> None:
    """n = 12, r = 5, k = 4 on a decaying spectrum scaled to 358 for Haar: the sketch is within 5 % of the optimum, far below Haar."""
    sigma = 1 / np.arange(1, 13.0) ** 2
    sigma *= 358 * 5 / 12 / sigma.sum()
    S = np.diag(sigma)
    cost = {
        "sketch": np.sum(moments("spectral", 12, 5, sigma=sigma[:4], tail=sigma[4:].mean(), floor=0.0).square * S),
        "optimum": optimal.optimal_value(sigma, 5),
        "haar": np.sum(moments("haar_stiefel", 12, 5).square * S),
        "gaussian": np.sum(moments("gaussian", 12, 5).square * S),
    }
    assert cost["haar"] == pytest.approx(358) and cost["gaussian"] == pytest.approx(358 * 18 / 12)
    assert cost["optimum"] <= cost["sketch"] < 1.05 * cost["optimum"] < cost["haar"] < cost["gaussian"]


def test_zeros_in_the_spectrum() -> None:
    np.testing.assert_allclose(optimal.inclusion_probabilities([4, 1, 0, 0], 2), [1, 1, 0, 0])
    np.testing.assert_allclose(optimal.inclusion_probabilities([4, 0, 0], 2), [1, 0.5, 0.5])  # what is left costs nothing
    np.testing.assert_allclose(optimal.inclusion_probabilities([4, 1, 1, 0], 1), [0.5, 0.25, 0.25, 0])
    assert optimal.optimal_value([4, 0, 0], 2) == pytest.approx(4)
    floored = optimal.inclusion_probabilities([4, 1, 0, 0], 2, floor=0.1)
    np.testing.assert_allclose(floored, [1, 0.9, 0.05, 0.05])
    law = moments("spectral", 4, 2, sigma=[4, 1, 0, 0], floor=0.0)
    np.testing.assert_allclose(law.mean, np.diag([1.0, 1, 0, 0]))  # unbiased on the range of S only
    assert not law.unbiased


def test_best_scale_minimises_the_error() -> None:
    noise, signal = np.diag([1.0, 2, 3, 4]), np.diag([4.0, 3, 2, 0])
    best = optimal.best_scale(moments("gaussian", 4, 2).square, signal, noise + signal)
    errors = [mse.ipa(moments("gaussian", 4, 2, c), noise, signal).total for c in (0.99 * best, best, 1.01 * best)]
    assert errors[1] == min(errors)
    haar = optimal.best_scale(moments("haar_stiefel", 4, 2).square, signal, noise + signal)
    assert haar == pytest.approx(2 / 4 * 9 / 19)


def test_ranks_of_a_spectrum() -> None:
    assert optimal.effective_rank([1, 1, 1, 0]) == pytest.approx(3)
    assert optimal.stable_rank([4, 2, 2]) == pytest.approx(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optimal.inclusion_probabilities([0, 0], 1), "all zero"),
        (lambda: optimal.inclusion_probabilities([], 1), "non-empty"),
        (lambda: optimal.inclusion_probabilities([1, -1], 1), "not be negative"),
        (lambda: optimal.inclusion_probabilities([1, np.nan], 1), "NaN or infinite"),
        (lambda: optimal.inclusion_probabilities([1, 1], 3), r"n=2, r=3"),
        (lambda: optimal.inclusion_probabilities([1, 1], 1, floor=2), "floor=2"),
        (lambda: optimal.best_scale(np.eye(2), np.zeros((2, 2)), np.zeros((2, 2))), "is zero"),
        (lambda: optimal.instance_independent_floor(4, 5), "rank must be at most n"),
        (lambda: moments("gaussian", 8, np.nan), "must be an integer"),  # pyright: ignore[reportArgumentType]
        (lambda: mse.ipa(moments("gaussian", 2, 1), -np.eye(2), np.eye(2)), "negative diagonal"),
        (lambda: moments("haar_stiefel", 4, 0), "rank must be at least 1"),
        (lambda: moments("haar_stiefel", 4, 2, c=0.0), "c must be positive"),
        (lambda: moments("sparse_sign", 4, 2, sparsity=0.5), "sparsity=0.5"),
        (lambda: moments("subsampled_transform", 4, 2, transform="fft").square, "known transforms"),
        (lambda: moments("truncated", 4, 2, basis=np.ones((4, 3))), "expected"),
        (lambda: moments("spectral", 4, 2, basis=np.eye(4), sigma=[1, 2]), "for 2 eigenvalues"),
        (lambda: moments("spectral", 4, 2, design="multinomial"), "known designs"),
        (lambda: __import__("theory.spectral").spectral.joint_inclusion([0.5, 0.2], "systematic"), "sum to an integer"),
    ],
)
def test_wrong_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
