"""Identities of the exact moments, for all sizes and matrices that hypothesis thinks of."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory import STEMS, Moments, moments, optimal
from theory.haar_stiefel import frame_coefficients

UNBIASED = [stem for stem in STEMS if stem != "truncated"]
sizes = st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))
scales = st.floats(0.1, 3.0)
seeds = st.integers(0, 2**16)


def matrix(n: int, seed: int) -> np.ndarray:
    raw = np.random.default_rng(seed).standard_normal((n, n))
    return raw + raw.T


def law_of(stem: str, n: int, rank: int, c: float, seed: int) -> Moments:
    if stem != "spectral":
        return moments(stem, n, rank, c)
    generator = np.random.default_rng(seed)
    k = int(generator.integers(0, n + 1))
    Q = np.linalg.qr(generator.standard_normal((n, n)))[0][:, :k]
    design = ("systematic", "pivotal")[seed % 2]
    return moments(stem, n, rank, c, basis=Q, sigma=generator.exponential(size=k), tail=float(generator.exponential()), design=design)


@pytest.mark.parametrize("stem", UNBIASED)
@settings(max_examples=40, deadline=None)
@given(size=sizes, c=scales, seed=seeds)
def test_weak_unbiasedness_and_the_floor(stem: str, size: tuple[int, int], c: float, seed: int) -> None:
    n, rank = size
    law = law_of(stem, n, rank, c, seed)
    np.testing.assert_allclose(law.mean, c * np.eye(n), atol=1e-9)
    assert law.unbiased
    assert np.trace(law.square) >= optimal.instance_independent_floor(n, rank, c) * (1 - 1e-9)
    assert np.linalg.eigvalsh(law.square - law.mean @ law.mean)[0] > -1e-9 * np.trace(law.square)  # variance is not negative


@pytest.mark.parametrize("stem", STEMS)
@settings(max_examples=25, deadline=None)
@given(size=sizes, c=scales, seed=seeds)
def test_the_map_is_linear_symmetric_positive_and_scales(stem: str, size: tuple[int, int], c: float, seed: int) -> None:
    n, rank = size
    law, unit = law_of(stem, n, rank, c, seed), law_of(stem, n, rank, 1.0, seed)
    A, B = matrix(n, seed), matrix(n, seed + 1)
    batched = law.second_moment(np.stack([A, B]))
    np.testing.assert_allclose(batched[0], law.second_moment(A), atol=1e-9)
    np.testing.assert_allclose(law.second_moment(A + 2 * B), batched[0] + 2 * batched[1], atol=1e-8)
    np.testing.assert_allclose(batched, batched.swapaxes(-1, -2), atol=1e-9)
    np.testing.assert_allclose(batched[0], c**2 * unit.second_moment(A), atol=1e-8)
    assert np.linalg.eigvalsh(law.second_moment(A @ A))[0] > -1e-8 * np.trace(A @ A) * c**2 * n**2
    # tr E[PAP] = ⟨E[P²], A⟩, and ⟨B, 𝓣(A)⟩ = ⟨𝓣(B), A⟩
    np.testing.assert_allclose(np.trace(batched[0]), np.sum(law.square * A), atol=1e-7)
    np.testing.assert_allclose(np.sum(B * batched[0]), np.sum(batched[1] * A), atol=1e-7)


TABLE = {  # E[P²]/c², as published or derived in the docstrings
    "gaussian": lambda n, r: (n + r + 1) / r,
    "rademacher": lambda n, r: (n + r - 1) / r,
    "sparse_sign": lambda n, r: (n + r + 1) / r,
    "haar_stiefel": lambda n, r: n / r,
    "coordinate": lambda n, r: n / r,
    "subsampled_transform": lambda n, r: n / r,
}


@pytest.mark.parametrize("stem", TABLE)
@given(size=sizes)
def test_the_table_of_squares(stem: str, size: tuple[int, int]) -> None:
    n, rank = size
    np.testing.assert_allclose(moments(stem, n, rank, 0.5).square, 0.25 * TABLE[stem](n, rank) * np.eye(n), rtol=1e-12, atol=1e-12)


@given(size=sizes, seed=seeds)
def test_relations_between_laws(size: tuple[int, int], seed: int) -> None:
    n, rank = size
    M = matrix(n, seed)
    same = lambda a, b: np.testing.assert_allclose(a.second_moment(M), b.second_moment(M), atol=1e-9)  # noqa: E731
    same(moments("sparse_sign", n, rank, sparsity=3.0), moments("gaussian", n, rank))
    same(moments("sparse_sign", n, rank, sparsity=1.0), moments("rademacher", n, rank))
    same(moments("spectral", n, rank), moments("haar_stiefel", n, rank))  # k = 0
    same(moments("spectral", n, rank, sigma=np.ones(n), design="systematic"), moments("spectral", n, rank, sigma=np.full(n, 7.0)))
    for stem in ("haar_stiefel", "coordinate", "subsampled_transform", "spectral"):  # r = n: P = cI always
        np.testing.assert_allclose(moments(stem, n, n, 0.5).second_moment(M), 0.25 * M, atol=1e-9)
    np.testing.assert_allclose(moments("coordinate", n, 1).second_moment(M), moments("coordinate", n, 1, replacement=True).second_moment(M))


@given(n=st.integers(2, 12), rank=st.integers(0, 12))
def test_frame_coefficients_solve_their_two_equations(n: int, rank: int) -> None:
    rank = min(rank, n)
    alpha, beta = frame_coefficients(n, rank, rank**2)
    assert alpha + n * beta == pytest.approx(rank / n)
    assert alpha * n * (n + 1) / 2 + beta * n == pytest.approx((rank**2 + rank) / 2)


def test_unknown_law_is_named() -> None:
    with pytest.raises(ValueError, match=r"moments\('haar'\): known laws are gaussian"):
        moments("haar", 4, 2)
