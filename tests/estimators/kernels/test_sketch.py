"""XV with V made in registers: the V of the plain version whatever the blocks, its law, and generators that must be rejected."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import no_type_check

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from estimators import Coordinate, Gaussian, Law, Rademacher, SparseSign
from estimators.kernels import launch, philox, sketch
from tests.estimators.kernels.device import DEVICE
from tests.monte_carlo import assert_mean
from theory import gaussian, rademacher, sparse_sign

KEY = philox.key(0, "layers.0.q_proj", 3)
LAWS: list[Callable[[int, int], Law]] = [
    lambda n, r: Gaussian(n=n, rank=r),
    lambda n, r: Rademacher(n=n, rank=r, c=0.25),
    lambda n, r: SparseSign(n=n, rank=r),
    lambda n, r: SparseSign(n=n, rank=r, sparsity=1.0),
]
BLOCKS = [(16, 32, 16), (16, 64, 32)]


def made(law: Law, block: tuple[int, int, int] = BLOCKS[0], key: int = KEY) -> Tensor:
    """V as the kernel makes it: the sketch of the identity, whose sums have one term."""
    return sketch.sketch(torch.eye(law.n, device=DEVICE), law, key, block=block).cpu()


# the same V


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("n,r", [(1, 1), (37, 5), (50, 20)])
@pytest.mark.parametrize("which", range(len(LAWS)))
def test_the_kernel_makes_the_plain_v(which: int, n: int, r: int, block: tuple[int, int, int]) -> None:
    law = LAWS[which](n, r)
    V, expected = made(law, block), sketch.basis(law, KEY)
    assert V.shape == expected.shape == (n, r)
    if isinstance(law, Gaussian):
        torch.testing.assert_close(V, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(V, expected)


@pytest.mark.parametrize("dtype", sketch.DTYPES)
@pytest.mark.parametrize("which", range(len(LAWS)))
def test_the_sketch_is_the_plain_one(which: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    """On integers and entries ±1/4 all sums are exact, so it is to the last bit; with Gaussian V to the rounding of the dtype."""
    law = LAWS[which](40, 4)
    X = torch.randint(-3, 4, (21, 40), generator=generator).to(DEVICE, dtype)
    found = sketch.sketch(X, law, KEY, block=BLOCKS[0])
    assert found.dtype == dtype and found.shape == (21, 4)
    if isinstance(law, Rademacher):
        assert torch.equal(found, sketch.plain(X, law, KEY))
    exact = X.double() @ sketch.basis(law, KEY, DEVICE).to(dtype).double()
    torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=40 * 2.0**-20)


def test_strides_do_not_matter(generator: torch.Generator) -> None:
    law = Rademacher(n=40, rank=4)
    X = torch.randint(-3, 4, (80, 60), generator=generator).float().to(DEVICE)
    for view in (X[:40, ::2][:, :30].mT[:, :40], X.mT[:, :40], X[::3, 20:]):
        assert view.shape[1] == 40
        assert torch.equal(sketch.sketch(view, law, KEY, block=BLOCKS[0]), sketch.plain(view, law, KEY))
    assert sketch.sketch(X[:0, :40], law, KEY).shape == (0, 4)


def test_another_key_or_law_is_another_draw() -> None:
    drawn = [
        sketch.basis(law, key) > 0 for law in (Gaussian(n=64, rank=8), Rademacher(n=64, rank=8)) for key in (KEY, KEY + 1, KEY ^ 2**40)
    ]
    for a in range(len(drawn)):
        for b in range(a):
            assert 0.35 < float((drawn[a] == drawn[b]).double().mean()) < 0.65


def test_more_rows_or_columns_leave_the_others_alone() -> None:
    for which in range(len(LAWS)):
        small, large = LAWS[which](33, 5), LAWS[which](90, 11)
        ratio = (11 / 5) ** 0.5
        torch.testing.assert_close(sketch.basis(small, KEY), sketch.basis(large, KEY)[:33, :5] * ratio, rtol=1e-6, atol=0)


# kernels that must be rejected


@triton.jit
@no_type_check
def _words_repeated(key, start, column, STREAM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """The counter begins again in every block of rows."""
    zero = tl.zeros((BN, BR // 4), tl.int32)
    q, rows = column // 4 + tl.arange(0, BR // 4), tl.arange(0, BN)
    return tl.philox(key, zero + q[None, :], zero + rows[:, None], zero + STREAM, zero)


@triton.jit
@no_type_check
def _words_same_columns(key, start, column, STREAM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """The counter begins again in every block of columns."""
    zero = tl.zeros((BN, BR // 4), tl.int32)
    q, rows = tl.arange(0, BR // 4), start + tl.arange(0, BN)
    return tl.philox(key, zero + q[None, :], zero + rows[:, None], zero + STREAM, zero)


@triton.jit
@no_type_check
def _bits_repeated(key, start, column, STREAM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """The words of the first 32 rows in every block."""
    zero = tl.zeros((BN // 32, BR // 4), tl.int32)
    q = column // 4 + tl.arange(0, BR // 4)
    a, b, c, d = tl.philox(key, zero + q[None, :], zero, zero + STREAM, zero)
    words = tl.broadcast_to(philox.interleaved(a, b, c, d)[:, None, :], (BN // 32, 32, BR))
    return (tl.reshape(words, (BN, BR)) >> (tl.arange(0, BN) % 32).to(tl.uint32)[:, None]) & 1


@pytest.mark.skipif(not launch.INTERPRETED, reason="compiled kernels keep the functions they were compiled with")
@pytest.mark.parametrize("which,mutant", [(2, _words_repeated), (2, _words_same_columns), (1, _bits_repeated)])
def test_a_kernel_whose_counter_repeats_is_rejected(which: int, mutant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    law = LAWS[which](50, 20)
    monkeypatch.setattr(sketch, "_bits" if mutant is _bits_repeated else "_words", mutant)
    V, expected = made(law), sketch.basis(law, KEY)
    assert torch.equal(V[:32, :16], expected[:32, :16]) and not torch.equal(V, expected)


# the law of V


GROUP, RANK = 64, 4
EXACT = [gaussian.second_moment, rademacher.second_moment, sparse_sign.second_moment]


def statistics(V: Tensor) -> Tensor:
    """Of groups of 64 rows, V (groups, 64, 4): E[V] and few entries of E[VVᵀ], near and 32 rows apart, and tr(VVᵀ)² of four rows."""
    V = V.double()
    P = V @ V.mT
    few = P[:, :4, :4].square().sum((1, 2))
    apart = [(0, 1), (0, 32), (5, 37), (1, 17)]
    return torch.stack([V[:, 0, 0], V[:, 40, 3], P[:, 0, 0], P[:, 63, 63], *(P[:, a, b] for a, b in apart), few], dim=-1)


def check(which: int, basis: Callable[[Law, int], Tensor], generator: torch.Generator) -> None:
    def draw(size: int, _: torch.Generator) -> Tensor:
        law = LAWS[which](GROUP * size, RANK)
        return statistics(basis(law, KEY).reshape(size, GROUP, RANK))

    law = LAWS[which](GROUP, RANK)
    extra = {"sparsity": law.sparsity} if isinstance(law, SparseSign) else {}
    second = float(EXACT[min(which, 2)](np.eye(4), rank=RANK, c=law.c, **extra).trace())
    expected = torch.tensor([0, 0, law.c, law.c, 0, 0, 0, 0, second])
    assert_mean(draw, expected, draws=4000, resolution=0.16 * second, generator=generator)


@pytest.mark.parametrize("which", range(len(LAWS)))
def test_v_has_the_law_of_the_sampler(which: int, generator: torch.Generator) -> None:
    check(which, sketch.basis, generator)


def rows_repeated(law: Law, key: int) -> Tensor:
    """Every block of 32 rows is the first."""
    return sketch.basis(law, key)[:32].repeat(law.n // 32 + 1, 1)[: law.n]


def one_bit(law: Law, key: int) -> Tensor:
    """Rows 16 apart share a bit."""
    V = sketch.basis(law, key)
    return V[torch.arange(law.n) // 32 * 32 + torch.arange(law.n) % 16]


def wrong_scale(law: Law, key: int) -> Tensor:
    return sketch.basis(law, key) * 1.15


@pytest.mark.parametrize("mutant", [rows_repeated, one_bit, wrong_scale])
@pytest.mark.parametrize("which", range(len(LAWS)))
def test_another_law_is_rejected(which: int, mutant: Callable[[Law, int], Tensor], generator: torch.Generator) -> None:
    with pytest.raises(AssertionError, match=r"z = |8 SE"):
        check(which, mutant, generator)


@pytest.mark.parametrize("sparsity", [1.0, 2.0, 3.0, 7.3, 1e4])
@pytest.mark.parametrize("c", [1.0, 0.3])
def test_sparse_entries_have_the_variance_exactly(sparsity: float, c: float) -> None:
    """Over all 2³² words: as many give +a as −a, and their share times a² is c/r, whatever s is."""
    law = SparseSign(n=8, rank=5, c=c, sparsity=sparsity)
    _, size, bound = sketch.entries(law)
    share = Fraction(2 * (2**31 - bound), 2**32)
    assert abs(float(share) * sparsity - 1) < sparsity * 2**-32 * 2
    assert float(share) * size**2 == pytest.approx(c / 5, rel=1e-15)
    for word, sign in ((bound, 1), (bound - 1, 0 if bound else -1), (-bound - 1, -1), (-bound, 0 if bound else 1)):
        assert (word >= bound) - (word < -bound) == sign


def test_all_sign_matrices_are_equally_likely_and_their_mean_is_the_identity() -> None:
    """By hand for n = 2, r = 1: the four sign vectors, E[VVᵀ] = c·I; the bits of 2¹⁶ words show each a quarter of the time."""
    law = Rademacher(n=2 * 2**14, rank=1)
    pairs = sketch.basis(law, KEY).reshape(-1, 2)
    patterns, counts = pairs.unique(dim=0, return_counts=True)
    assert torch.equal((patterns.mT @ patterns) / 4, torch.eye(2))
    z = (counts.double() - len(pairs) / 4) / (len(pairs) * 3 / 16) ** 0.5
    assert len(counts) == 4 and float(z.abs().max()) < 5


# what is refused


@pytest.mark.usefixtures("unchecked")
def test_wrong_input_is_refused() -> None:
    law, X = Gaussian(n=8, rank=2), torch.zeros(3, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"cannot"):
        sketch.sketch(X, Coordinate(n=8, rank=2), KEY)
    with pytest.raises(ValueError, match=r"density"):
        sketch.basis(SparseSign(n=8, rank=2, sparsity=2.0**40), KEY)
    with pytest.raises(ValueError, match=r"sketch\(Gaussian\(n=8, r=2, c=1\)\): X must be \(T, n=8\), got shape \(3, 7\)"):
        sketch.sketch(X[:, :7], law, KEY)
    with pytest.raises(ValueError, match=r"key=-1 must be in"):
        sketch.sketch(X, law, -1)
    with pytest.raises(ValueError, match=r"X is torch.float64, the kernel knows torch.float32"):
        sketch.sketch(X.double(), law, KEY)
    with pytest.raises(ValueError, match=r"block=\(16, 16, 16\)"):
        sketch.sketch(X, law, KEY, block=(16, 16, 16))
    with pytest.raises(ValueError, match=r"requires a gradient"):
        sketch.sketch(X.clone().requires_grad_(), law, KEY)
    with torch.no_grad():
        assert sketch.sketch(X.clone().requires_grad_(), law, KEY).shape == (3, 2)


def test_the_two_numbers() -> None:
    law = Rademacher(n=1024, rank=128)
    moved, products, others = sketch.cost(8192, 1024, law, 2)
    assert (moved, products) == ((8192 * 1024 + 8192 * 128) * 2, 2 * 8192 * 1024 * 128)
    assert sketch.cost(8192, 1024, law, 2, block=128).others == 64 * others
    assert sketch.cost(64, 1024, Gaussian(n=1024, rank=128), 4).others == 1024 * 128 * 45
