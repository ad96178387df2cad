"""Many small Cholesky factors and Cholesky-QR beside LAPACK."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from estimators.haar_stiefel import householder_qr
from estimators.kernels import cholesky, launch
from tests.estimators.kernels.device import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy, which interprets the kernel


def grams(batch: int, r: int, generator: torch.Generator) -> Tensor:
    Z = torch.randn(batch, 3 * r + 2, r, generator=generator)
    lower = (Z.mT @ Z).tril()
    return (lower + lower.tril(-1).mT).to(DEVICE)  # symmetric to the last bit


@pytest.mark.parametrize("batch,r", [(3, 1), (2, 5), (1, 16), (1, 17), (1, 64)])
def test_the_kernel_is_the_plain_factor(batch: int, r: int, generator: torch.Generator) -> None:
    A = grams(batch, r, generator)
    found, its = cholesky.factor(A), cholesky.plain(A)
    torch.testing.assert_close(found.L, its.L, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.inverse, its.inverse, rtol=1e-3, atol=1e-6)
    assert found.info.tolist() == its.info.tolist() == [0] * batch
    exact = A.double()
    error = (found.L.double() @ found.L.double().mT - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
    assert float(error.max()) < 1e-6
    identity = torch.eye(r, device=DEVICE).expand_as(A)
    torch.testing.assert_close(found.L @ found.inverse, identity, rtol=0, atol=2e-5)
    for lower in (found.L, found.inverse):
        assert not bool(lower.triu(1).any()) and bool((lower.diagonal(dim1=1, dim2=2) > 0).all())


def test_only_the_lower_triangle_is_read_whatever_the_strides(generator: torch.Generator) -> None:
    A = grams(2, 6, generator)
    broken = A + torch.full_like(A, torch.nan).triu(1)
    assert torch.equal(cholesky.factor(broken).L, cholesky.factor(A).L)
    wide = torch.zeros(2, 12, 7, device=DEVICE)
    wide[:, ::2, :6] = A
    view = wide[:, ::2, :6]
    assert torch.equal(cholesky.factor(view).inverse, cholesky.factor(A).inverse)
    assert torch.equal(cholesky.factor(A.mT).L, cholesky.factor(A).L)
    assert cholesky.factor(A[:0]).L.shape == (0, 6, 6)


def test_a_matrix_that_is_not_positive_definite_is_told_by_info(generator: torch.Generator) -> None:
    A = grams(5, 7, generator)
    A[1, 3, 3] = -1.0
    A[2] = 0.0
    A[3, 6, 6] -= 1e4
    A[4, 2, 2] = torch.nan
    assert cholesky.factor(A).info.tolist() == cholesky.plain(A).info.tolist() == [0, 4, 1, 7, 3]


@pytest.mark.parametrize("batch,n,r", [(2, 1, 1), (2, 40, 9), (1, 50, 16), (1, 60, 20)])
def test_cholesky_qr(batch: int, n: int, r: int, generator: torch.Generator) -> None:
    Z = torch.randn(batch, n, r, generator=generator).to(DEVICE)
    Q, R, info = cholesky.cholesky_qr(Z)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(r, device=DEVICE).expand(batch, r, r), rtol=0, atol=3e-6)
    torch.testing.assert_close(Q @ R, Z, rtol=0, atol=1e-5)
    assert bool((R.diagonal(dim1=1, dim2=2) > 0).all()) and not bool(R.tril(-1).any()) and not bool(info.any())
    torch.testing.assert_close(Q, householder_qr(Z), rtol=0, atol=1e-5)
    for mine, its in zip(cholesky.cholesky_qr(Z), cholesky.plain_qr(Z), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


def test_one_pass_is_not_enough(generator: torch.Generator) -> None:
    """At a condition number of 300 a single pass leaves QᵀQ wrong by what two do not."""
    Z = (torch.randn(1, 40, 8, generator=generator) * torch.logspace(0, -2.5, 8)).to(DEVICE)
    Z = Z @ torch.linalg.qr(torch.randn(8, 8, generator=generator).to(DEVICE)).Q
    identity = torch.eye(8, device=DEVICE)
    once = Z @ cholesky.factor(Z.mT @ Z).inverse.mT
    assert float((once.mT @ once - identity).abs().max()) > 1e-4
    Q = cholesky.cholesky_qr(Z).Q
    assert float((Q.mT @ Q - identity).abs().max()) < 3e-6


@pytest.mark.usefixtures("unchecked")
def test_wrong_input_is_refused() -> None:
    A = torch.eye(70, device=DEVICE).expand(2, 70, 70)
    for wrong in (A, A[0], A[:, :5, :6]):
        with pytest.raises(ValueError, match=r"factor\(A of shape .*\): A must be \(batch, r, r\) with 1 ≤ r ≤ 64"):
            cholesky.factor(wrong)
    with pytest.raises(ValueError, match=r"A is torch.float64"):
        cholesky.factor(A[:, :5, :5].double())
    with pytest.raises(ValueError, match=r"cholesky_qr\(Z of shape \(2, 5, 6\)\): Z must be \(batch, n, r\) with 1 ≤ r ≤ n"):
        cholesky.cholesky_qr(A[:, :5, :6])


def test_the_two_numbers() -> None:
    assert cholesky.cost(168, 64) == (3 * 168 * (64 * 65 // 2) * 4, 0, round(168 * 2 * 64**3 / 3))
    assert launch.Cost(100, 20, 3).floor(10.0, 100.0, 1.0) == 10.0
