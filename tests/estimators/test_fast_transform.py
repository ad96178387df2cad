"""XV and BVᵀ by the factors of V: scipy's transforms, the dense V of the same draw, and orthonormality, for lengths of every kind."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from estimators import fast_transform
from estimators.subsampled_transform import Hadamard, SubsampledTransform, dct_rows, hadamard_rows

LENGTHS = (1, 2, 3, 7, 8, 12, 20, 64, 96, 256, 1376)


@pytest.mark.parametrize("n", LENGTHS)
def test_transforms_are_those_of_scipy(n: int, generator: torch.Generator) -> None:
    X = torch.randn(3, 2, n, generator=generator, dtype=torch.float64)
    np.testing.assert_allclose(fast_transform.dct(X), np.asarray(scipy.fft.dct(X.numpy(), norm="ortho")), atol=1e-12)
    power, odd = fast_transform.split(n)
    C = np.kron(scipy.linalg.hadamard(power) / math.sqrt(power), np.asarray(scipy.fft.dct(np.eye(odd), norm="ortho", axis=0)))
    np.testing.assert_allclose(fast_transform.hadamard(X), X.numpy() @ C.T, atol=1e-12)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", ["dct", "hadamard"])
def test_the_transposed_is_the_inverse(name: str, n: int, generator: torch.Generator) -> None:
    X = torch.randn(4, n, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(fast_transform.BACKWARD[name](fast_transform.FORWARD[name](X)), X, rtol=0, atol=1e-12)
    torch.testing.assert_close(fast_transform.FORWARD[name](fast_transform.BACKWARD[name](X)), X, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", LENGTHS)
def test_rows_are_those_of_the_transform(n: int) -> None:
    J = torch.arange(n).flip(0)
    eye = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(hadamard_rows(n, J, torch.float64), fast_transform.hadamard(eye).mT[J], rtol=0, atol=1e-12)
    torch.testing.assert_close(dct_rows(n, J, torch.float64), fast_transform.dct(eye).mT[J], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [SubsampledTransform, Hadamard])
@pytest.mark.parametrize(("n", "rank"), [(20, 5), (64, 64), (96, 1), (1376, 172)])
def test_a_frame_is_the_draw_of_an_equal_generator(kind: type[SubsampledTransform], n: int, rank: int, generator: torch.Generator) -> None:
    law = kind(n=n, rank=rank, c=0.7)
    frame = law.frame(generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    V = law.sample(generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    X, B = (torch.randn(2, 3, k, generator=generator, dtype=torch.float64) for k in (n, rank))
    torch.testing.assert_close(frame.sketch(X), X @ V, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(frame.lift(B), B @ V.mT, rtol=1e-10, atol=1e-11)
    assert frame.bytes() == 8 * n + 8 * rank


@pytest.mark.parametrize("kind", [SubsampledTransform, Hadamard])
def test_gradients_pass_through(kind: type[SubsampledTransform]) -> None:
    frame = kind(n=12, rank=3).frame(generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X = torch.randn(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(frame.sketch, (X,)) and torch.autograd.gradcheck(
        frame.lift, (frame.sketch(X).detach().requires_grad_(),)
    )


@pytest.mark.parametrize("kind", [SubsampledTransform, Hadamard])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_the_rounded_product(kind: type[SubsampledTransform], dtype: torch.dtype, generator: torch.Generator) -> None:
    law = kind(n=48, rank=6)
    frame = law.frame(generator=torch.Generator().manual_seed(3))
    V = law.sample(generator=torch.Generator().manual_seed(3))
    X, B = torch.randn(5, 48, generator=generator).to(dtype), torch.randn(5, 6, generator=generator).to(dtype)
    for ours, plain in ((frame.sketch(X), X.float() @ V), (frame.lift(B), B.float() @ V.mT)):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), plain, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert frame.sketch(X[:0]).shape == (0, 6) and frame.lift(B[:0]).shape == (0, 48)


def test_fake_tensors_leave_nothing_behind() -> None:
    """A draw of shapes alone, then a real one."""
    with FakeTensorMode():
        Hadamard(n=16, rank=2).sample(generator=torch.Generator().manual_seed(0))
    assert Hadamard(n=16, rank=2).sample(generator=torch.Generator().manual_seed(0)).abs().sum() > 0
