"""The fast Walsh–Hadamard transform: the plain one to the last bit, Sylvester's matrix, and its own inverse."""

from __future__ import annotations

from typing import no_type_check

import pytest
import torch
import triton
import triton.language as tl

from estimators.kernels import hadamard, launch
from estimators.subsampled_transform import hadamard_rows
from tests.estimators.kernels.device import DEVICE


@pytest.mark.parametrize("n", [1, 2, 16, 128])
def test_plain_is_sylvesters_matrix(n: int, generator: torch.Generator) -> None:
    X = torch.randn(5, n, generator=generator)
    H = hadamard_rows(n, torch.arange(n), torch.float64)
    torch.testing.assert_close(hadamard.plain(X).double(), X.double() @ H, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", hadamard.DTYPES)
@pytest.mark.parametrize("T,n", [(3, 1), (5, 2), (1, 32), (300, 16), (7, 1024), (2, 8192)])
def test_the_kernel_is_the_plain_one(T: int, n: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    X = torch.randn(T, n, generator=generator).to(DEVICE, dtype)
    found = hadamard.transform(X)
    assert found.dtype == dtype and torch.equal(found, hadamard.plain(X))


def test_twice_is_the_identity(generator: torch.Generator) -> None:
    X = torch.randint(-8, 9, (9, 256), generator=generator).float().to(DEVICE)
    assert torch.equal(hadamard.transform(hadamard.transform(X)), X)  # 1/√256 is exact
    Y = torch.randn(9, 128, generator=generator).to(DEVICE)
    torch.testing.assert_close(hadamard.transform(hadamard.transform(Y)), Y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hadamard.transform(Y).square().sum(1), Y.square().sum(1), rtol=1e-5, atol=0)


def test_strides_do_not_matter(generator: torch.Generator) -> None:
    X = torch.randn(64, 40, generator=generator).to(DEVICE)
    for view in (X.mT, X[:, 4:36], X[::2, :16]):
        assert torch.equal(hadamard.transform(view), hadamard.plain(view))
    assert hadamard.transform(X[:0, :8]).shape == (0, 8)


@triton.jit
@no_type_check
def _stage_without_sign(x, BT: tl.constexpr, N: tl.constexpr, H: tl.constexpr):
    """The difference the wrong way round in one stage: still orthonormal, and still of the right size."""
    a, b = tl.split(tl.permute(tl.reshape(x, (BT, N // (2 * H), 2, H)), (0, 1, 3, 2)))
    return tl.reshape(tl.permute(tl.join(a + b, b - a if H == 4 else a - b), (0, 1, 3, 2)), (BT, N))


@pytest.mark.skipif(not launch.INTERPRETED, reason="compiled kernels keep the functions they were compiled with")
def test_a_wrong_stage_is_rejected(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    X = torch.randn(3, 16, generator=generator)
    monkeypatch.setattr(hadamard, "_stage", _stage_without_sign)
    assert not torch.allclose(hadamard.transform(X), hadamard.plain(X))


@pytest.mark.usefixtures("unchecked")
def test_wrong_input_is_refused() -> None:
    X = torch.zeros(3, 12, device=DEVICE)
    with pytest.raises(ValueError, match=r"transform\(X of shape \(3, 12\)\): the transform exists for n a power of two"):
        hadamard.transform(X)
    with pytest.raises(ValueError, match="power of two"):
        hadamard.plain(X)
    with pytest.raises(ValueError, match=r"X must be \(T, n\)"):
        hadamard.transform(X[0])
    with pytest.raises(ValueError, match="more than 32768 entries"):
        hadamard.transform(X.new_zeros(1, 2**16))
    with pytest.raises(ValueError, match=r"X is torch.int64"):
        hadamard.transform(X[:, :8].long())


def test_the_two_numbers() -> None:
    assert hadamard.cost(8192, 1024, 2) == (2 * 8192 * 1024 * 2, 0, 8192 * 1024 * 11)
