"""Rung three: the sampler of every law against its exact moments, by the verdict of experiments/validation/checks.py."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from estimators import LAWS, HaarStiefel, SpectralSampling
from estimators.haar_stiefel import cholesky_qr, householder_qr, orthonormalize
from experiments.validate import Verdict, check_estimator, check_law
from tests.estimators.test_contract import make, second_moment
from tests.monte_carlo import assert_mean

VARIANTS = {
    "spectral k=2": {"keep": 2},
    "spectral k=0": {"keep": 0},
    "spectral pivotal": {"design": "pivotal"},
    "spectral k=2 pivotal": {"keep": 2, "design": "pivotal"},
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize(("n", "rank"), [(1, 1), (6, 1), (6, 6), (9, 4)])
def test_moments(name: str, n: int, rank: int) -> None:
    check = check_law(make(name, n, rank), resolution=0.02)
    assert check.holds, check
    assert check.resolution <= 0.5  # the coarsest contrast, tr P of a fitted law


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_moments_of_spectral_variants(variant: str, rank: int) -> None:
    law = SpectralSampling.from_second_moment(second_moment(6), rank, 0.8, **VARIANTS[variant])
    check = check_law(law, resolution=0.02)
    assert check.holds, check


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("m", [2, 11])
def test_error_of_the_estimate(name: str, m: int, generator: torch.Generator) -> None:
    G = torch.randn(5, m, 8, generator=generator, dtype=torch.float64) * torch.logspace(0, -1.5, 8, dtype=torch.float64)
    law = LAWS[name].from_second_moment((G.mT @ G).mean(0), 3, 0.8)
    check = check_estimator(law, G, resolution=0.02)
    assert check.holds, check


@pytest.mark.parametrize("name", ["gaussian", "haar_stiefel", "spectral"])
def test_error_of_the_zeroth_order_estimate(name: str, generator: torch.Generator) -> None:
    G = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    check = check_estimator(LAWS[name].from_second_moment((G.mT @ G).mean(0), 2), G, estimator="lr", resolution=0.05)
    assert check.holds, check


def test_a_stale_basis_costs_variance_and_no_bias(generator: torch.Generator) -> None:
    """Fitted to another gradient, even to the very one that is projected: E[P] = cI still."""
    G = torch.randn(4, 6, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, 6, dtype=torch.float64)
    own = SpectralSampling.from_second_moment(G.mT @ G + 1e-3 * torch.eye(6), 2)
    stale = SpectralSampling.from_second_moment(second_moment(6), 2)
    fresh, old = (check_estimator(law, G, resolution=0.05) for law in (own, stale))
    assert fresh.holds and old.holds, (fresh, old)
    assert old.verdicts[1].theory > 1.5 * fresh.verdicts[1].theory


@pytest.mark.parametrize("name", [name for name in LAWS if name in ("haar_stiefel", "coordinate", "dct", "spectral", "top_svd")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_error_of_exactly_zero_holds(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """r = n, and the top-r SVD of a matrix of rank r: nothing is lost, and rounding is not a defect."""
    G = torch.randn(4, 8, generator=generator, dtype=dtype)
    law = LAWS[name].from_second_moment((G.mT @ G).double(), 4 if name == "top_svd" else 8)
    check = check_estimator(law, G)
    assert check.holds and check.verdicts[1].theory < 1e-9, check


def test_pure_noise_has_no_alignment_to_check(generator: torch.Generator) -> None:
    G = torch.randn(1, 3, 6, generator=generator, dtype=torch.float64)
    check = check_estimator(HaarStiefel(n=6, rank=2), torch.cat([G, -G]), resolution=0.05)
    assert check.holds and [v.name for v in check.verdicts] == ["E‖estimate − g‖²"], check


def test_a_check_says_what_it_would_have_seen() -> None:
    check = check_law(HaarStiefel(n=8, rank=3))
    assert all(v.resolution <= v.required for v in check.verdicts)
    assert {"tr P", "aᵀPa", "(aᵀPa)²", "‖Pa‖²", "E[V]"} == {v.name for v in check.verdicts}
    assert "would have seen" in str(check)
    short = check_law(HaarStiefel(n=8, rank=3), max_draws=5000)
    assert not short.holds and not short.decisive.resolved and "UNRESOLVED" in str(short)
    assert (check.estimate, check.standard_error, check.theory, check.z) == (
        check.decisive.estimate, check.decisive.standard_error, check.decisive.theory, check.decisive.z,
    )  # fmt: skip
    with pytest.raises(ValueError, match="resolution=0"):
        check_law(HaarStiefel(n=8, rank=3), resolution=0.0)
    with pytest.raises(ValueError, match=r"check_estimator\(HaarStiefel\(n=8, r=3, c=1\)\): gradients must be"):
        check_estimator(HaarStiefel(n=8, rank=3), torch.ones(2, 7))
    with pytest.raises(ValueError, match="are all zero"):
        check_estimator(HaarStiefel(n=8, rank=3), torch.zeros(2, 8))
    with pytest.raises(ValueError, match="known estimators"):
        check_estimator(HaarStiefel(n=8, rank=3), torch.ones(2, 8).double(), estimator="spsa")  # pyright: ignore[reportArgumentType]


def test_few_draws_are_judged_by_students_distribution() -> None:
    """The score keeps the probability: P(|t₁₅| > 5) = 1.6e-4 is a normal score of 3.78, not of 5."""
    few, many = (Verdict(name="", estimate=6.0, standard_error=1.0, theory=1.0, scale=1.0, required=math.inf, draws=n) for n in (16, 10**6))
    assert many.z == 5.0
    assert math.isclose(2 * stats.norm.sf(few.z), 2 * stats.t.sf(5.0, 15), rel_tol=1e-9)


# The Haar law beyond its two moments


def test_cholesky_and_householder_give_the_same_frame(generator: torch.Generator) -> None:
    for n, rank in [(5, 1), (12, 6), (40, 10)]:
        Z = torch.randn(100, n, rank, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(cholesky_qr(Z), householder_qr(Z), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("n", "rank"), [(128, 32), (512, 64), (512, 128), (100, 25), (64, 32), (64, 33)])
def test_orthonormal_columns_are_as_good_as_householders(n: int, rank: int, generator: torch.Generator) -> None:
    """By one pass, two passes or Householder: in float32 to twice what Householder leaves, and the same frame in float64."""
    Z = torch.randn(200, n, rank, generator=generator)
    defects = [float((Q.mT @ Q - torch.eye(rank)).abs().max()) for Q in (orthonormalize(Z), householder_qr(Z))]
    assert defects[0] <= 2 * defects[1]
    torch.testing.assert_close(orthonormalize(Z.double()), householder_qr(Z.double()), rtol=0, atol=1e-12)


def test_one_coordinate_has_its_marginal(generator: torch.Generator) -> None:
    """q₁₁² ~ Beta(1/2, (n−1)/2): E q⁴ = 3/(n(n+2)), E q⁶ = 15/(n(n+2)(n+4)), and q₁₁ is symmetric."""
    n = 6

    def draw(size: int, generator: torch.Generator) -> torch.Tensor:
        q = HaarStiefel(n=n, rank=3, c=3 / n).sample(size, generator=generator, dtype=torch.float64)[:, 0, 0]
        return torch.stack([q, q**2, q**4, q**6], dim=1)

    expected = torch.tensor([0.0, 1 / n, 3 / (n * (n + 2)), 15 / (n * (n + 2) * (n + 4))], dtype=torch.float64)
    assert_mean(draw, expected, draws=200_000, resolution=0.01, generator=generator)


def test_rotation_invariance(generator: torch.Generator) -> None:
    """E[(aᵀPb)²] = (n/r)²β for every orthonormal pair: E[PaaᵀP] = (n/r)²(αaaᵀ + βI)."""
    n, r = 5, 2
    law, expected = HaarStiefel(n=n, rank=r), (n / r) ** 2 * r * (n - r) / (n * (n - 1) * (n + 2))
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    I = torch.eye(n, dtype=torch.float64)
    for a, b in [(I[0], I[1]), (Q[:, 0], Q[:, 1])]:

        def draw(size: int, generator: torch.Generator, a: torch.Tensor = a, b: torch.Tensor = b) -> torch.Tensor:
            V = law.sample(size, generator=generator, dtype=torch.float64)
            return ((a @ V) * (b @ V)).sum(-1).square()

        assert_mean(draw, expected, draws=200_000, resolution=0.02, generator=generator)
