"""GUM's coin: its mean and variance over both outcomes, the share of least variance, and its edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from theory import coin

pytestmark = pytest.mark.check("a", "gum")
sizes = st.floats(1e-6, 1e6)
shares = st.floats(0.01, 0.99)


def parts(leading: float, rest: float, cosine: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A and B with these squared norms and ⟨A, B⟩ = cosine·‖A‖‖B‖."""
    U, V = np.linalg.qr(np.random.default_rng(3).standard_normal((12, 2)))[0].T
    return math.sqrt(leading) * U, math.sqrt(rest) * (cosine * U + math.sqrt(1 - cosine**2) * V)


def outcomes(A: np.ndarray, B: np.ndarray, share: float) -> tuple[np.ndarray, float]:
    """E[X] and E‖X − A − B‖² over both sides of the coin."""
    both = ((1 - share, A / (1 - share)), (share, B / share))
    return sum(p * X for p, X in both), sum(p * np.sum((X - A - B) ** 2) for p, X in both)  # pyright: ignore[reportReturnType]


@given(leading=sizes, rest=sizes, share=shares)
def test_mean_and_variance_are_those_of_both_outcomes(leading: float, rest: float, share: float) -> None:
    A, B = parts(leading, rest)
    mean, variance = outcomes(A, B, share)
    np.testing.assert_allclose(mean, A + B, rtol=1e-12, atol=1e-12 * math.sqrt(leading + rest))
    assert coin.variance(leading, rest, share) == pytest.approx(variance, rel=1e-9)


@given(share=shares, cosine=st.floats(-1, 1))
def test_parts_that_are_not_orthogonal_differ_by_twice_their_product(share: float, cosine: float) -> None:
    """E‖X − G‖² = ‖√(q/(1−q))·A − √((1−q)/q)·B‖²: the formula is for orthogonal parts, as projection makes them."""
    A, B = parts(4.0, 1.0, cosine)
    assert outcomes(A, B, share)[1] == pytest.approx(coin.variance(4.0, 1.0, share) - 2 * float(A @ B), rel=1e-9, abs=1e-9)


@given(leading=sizes, rest=sizes)
def test_the_best_share_is_the_minimum_and_twice_the_product_of_norms(leading: float, rest: float) -> None:
    best = coin.best_share(leading, rest)
    least = coin.variance(leading, rest, best)
    assert least == pytest.approx(2 * math.sqrt(leading * rest), rel=1e-9)
    assert best / (1 - best) == pytest.approx(math.sqrt(rest / leading), rel=1e-9)
    assert all(coin.variance(leading, rest, share) >= least * (1 - 1e-9) for share in np.linspace(0.001, 0.999, 999))
    for near in (best * 0.99, best * 1.01):
        if near < 1:
            assert coin.variance(leading, rest, near) > least


@given(leading=sizes, rest=sizes, share=shares, factor=sizes)
def test_parts_may_change_places_and_scale(leading: float, rest: float, share: float, factor: float) -> None:
    value = coin.variance(leading, rest, share)
    assert coin.variance(rest, leading, 1 - share) == pytest.approx(value, rel=1e-9)
    assert coin.variance(factor * leading, factor * rest, share) == pytest.approx(factor * value, rel=1e-9)
    assert coin.best_share(rest, leading) == pytest.approx(1 - coin.best_share(leading, rest), rel=1e-9, abs=1e-12)


def test_edges() -> None:
    """Without a rest there is nothing to toss for, and without leading directions nothing to keep."""
    assert coin.best_share(4.0, 0.0) == 0 and coin.best_share(0.0, 4.0) == 1 and coin.best_share(1.0, 1.0) == 0.5
    assert coin.variance(0.0, 0.0, 0.3) == 0
    wrong: tuple[tuple[Callable[[], float], str], ...] = (
        (lambda: coin.variance(1.0, 1.0, 0.0), r"variance\(share=0.0\): must be in \(0, 1\)"),
        (lambda: coin.variance(1.0, 1.0, 1.0), r"variance\(share=1.0\)"),
        (lambda: coin.variance(1.0, 1.0, math.nan), r"variance\(share=nan\)"),
        (lambda: coin.variance(-1.0, 1.0, 0.5), r"variance\(leading=-1.0, rest=1.0\): must be finite and not negative"),
        (lambda: coin.variance(math.nan, 1.0, 0.5), "must be finite and not negative"),
        (lambda: coin.best_share(1.0, math.inf), r"best_share\(leading=1.0, rest=inf\)"),
        (lambda: coin.best_share(0.0, math.nan), "must be finite and not negative"),
        (lambda: coin.best_share(0.0, 0.0), "any share will do"),
    )
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
