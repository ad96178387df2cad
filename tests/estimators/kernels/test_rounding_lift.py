"""W += BVᵀ in bfloat16: exact probabilities, the plain lift to the last bit, and roundings that must be rejected."""

from __future__ import annotations

from collections.abc import Callable
from typing import no_type_check

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from estimators.kernels import launch, philox, rounding_lift
from tests.estimators.kernels.device import DEVICE
from tests.estimators.test_rounding import neighbours, values
from tests.monte_carlo import assert_mean

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy, which interprets the kernel
KEY = philox.key(0, "layers.0.q_proj.lift", 7)
BLOCK = (16, 16, 16)
EVERY = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)


# the rounding


def test_the_probability_of_each_neighbour_is_exact() -> None:
    """Over all 2¹⁶ numbers u: the two neighbours come out as often as E[round(x)] = x asks for, to the last one."""
    x = values(torch.bfloat16).float()
    lower, upper = neighbours(x.double(), torch.bfloat16)
    u = torch.arange(2**16).unsqueeze(-1)
    out = rounding_lift.rounded(x.expand(2**16, -1).contiguous(), u.expand(-1, len(x))).double()
    assert bool(((out == lower) | (out == upper)).all())
    assert torch.equal((out == upper).double().mean(0), (x.double() - lower) / (upper - lower))
    mean = lower + (out == upper).double().mean(0) * (upper - lower)
    assert torch.equal(mean, x.double())


def test_what_the_format_holds_and_what_is_beyond_it_is_a_cast() -> None:
    largest = torch.finfo(torch.bfloat16).max
    beyond = torch.tensor([largest * (1 + 2.0**-12), -largest * (1 + 2.0**-12), 3.4e38, torch.inf, -torch.inf, torch.nan])
    for u in (0, 1, 2**15, 2**16 - 1):
        full = rounding_lift.rounded(EVERY.float(), torch.full((2**16,), u))
        number = ~torch.isnan(EVERY)
        assert torch.equal(full[number].view(torch.int16), EVERY[number].view(torch.int16)) and bool(torch.isnan(full[~number]).all())
        torch.testing.assert_close(rounding_lift.rounded(beyond, torch.full((6,), u)), beyond.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_the_numbers_are_uniform_and_independent(generator: torch.Generator) -> None:
    def draw(size: int, _: torch.Generator) -> Tensor:
        u = rounding_lift.halves(KEY, 64 * size, 16).reshape(size, 64, 16).double() / 2**16 + 2.0**-17
        v = u - 0.5
        pairs = [v[:, 0, 0] * v[:, 0, 1], v[:, 0, 0] * v[:, 0, 8], v[:, 0, 3] * v[:, 32, 3], v[:, 1, 2] * v[:, 17, 2]]
        return torch.stack([u[:, 0, 0], u[:, 63, 15], v[:, 0, 0].square(), *pairs], dim=-1)

    expected = torch.tensor([0.5, 0.5, (1 - 2.0**-32) / 12, 0, 0, 0, 0], dtype=torch.float64)
    assert_mean(draw, expected, draws=3000, resolution=0.05, generator=generator)


# the lift


def integers(m: int, n: int, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """W in bfloat16 and B, V whose products are exact in any order, far below the spacing of W."""
    W = torch.randn(m, n, generator=generator).bfloat16()
    B, V = torch.randint(-7, 8, (m, r), generator=generator), torch.randint(-7, 8, (n, r), generator=generator)
    return W.to(DEVICE), B.float().to(DEVICE), (V.float() / 2**14).to(DEVICE)


@pytest.mark.parametrize("dtype", rounding_lift.FACTORS)
@pytest.mark.parametrize("m,n,r", [(1, 1, 1), (37, 50, 5), (20, 35, 33)])
def test_the_kernel_is_the_plain_lift(m: int, n: int, r: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    W, B, V = integers(m, n, r, generator)
    mine, its = W.clone(), W.clone()
    assert rounding_lift.lift(mine, B.to(dtype), V.to(dtype), KEY, block=BLOCK) is mine
    rounding_lift.plain(its, B, V, KEY)
    assert torch.equal(mine, its)
    nearest = (W.float() + B @ V.mT).bfloat16()
    assert m == 1 or not torch.equal(mine, nearest)


def test_other_blocks_and_strides_round_alike(generator: torch.Generator) -> None:
    W, B, V = integers(20, 70, 6, generator)
    its = rounding_lift.plain(W.clone(), B, V, KEY)
    for block in ((16, 64, 16), (32, 16, 16)):
        assert torch.equal(rounding_lift.lift(W.clone(), B, V, KEY, block=block), its)
    wide = torch.zeros(70, 40, dtype=torch.bfloat16, device=DEVICE)
    view = wide[:, ::2].mT
    view.copy_(W)
    assert torch.equal(rounding_lift.lift(view, B.mT.contiguous().mT, V, KEY, block=BLOCK), its)
    assert not bool(wide[:, 1::2].any())
    assert not torch.equal(rounding_lift.plain(W.clone(), B, V, KEY + 1), its)
    assert rounding_lift.lift(W[:0], B[:0], V, KEY).shape == (0, 70)


def test_sums_in_another_order_differ_by_one_spacing_at_most(generator: torch.Generator) -> None:
    W = torch.randn(48, 48, generator=generator).bfloat16().to(DEVICE)
    B, V = (torch.randn(48, 40, generator=generator).to(DEVICE) for _ in range(2))
    mine, its = rounding_lift.lift(W.clone(), B, V, KEY, block=BLOCK), rounding_lift.plain(W.clone(), B, V, KEY)
    moved = mine != its
    assert float(moved.double().mean()) < 0.01
    assert bool(((mine.view(torch.int16).int() - its.view(torch.int16).int()).abs() <= 1)[moved].all())


def test_what_is_not_moved_stays() -> None:
    """Every pattern of bfloat16 plus zero."""
    W, zero = EVERY.reshape(256, 256).clone().to(DEVICE), torch.zeros(256, 1, device=DEVICE)
    out = rounding_lift.lift(W.clone(), zero, zero, KEY, block=(64, 256, 16))
    torch.testing.assert_close(out, W, rtol=0, atol=0, equal_nan=True)


def lifted(size: int, rounding: Callable[[Tensor, Tensor], Tensor], key: int = KEY) -> Tensor:
    """How often the upper neighbour came out, for values a fixed part between two."""
    x = values(torch.bfloat16).float().expand(size, -1).contiguous()
    lower, upper = neighbours(x[0].double(), torch.bfloat16)
    return (rounding(x, rounding_lift.halves(key, size, x.shape[1])).double() - lower) / (upper - lower)


def check(rounding: Callable[[Tensor, Tensor], Tensor], generator: torch.Generator) -> None:
    x = values(torch.bfloat16).float().double()
    lower, upper = neighbours(x, torch.bfloat16)
    assert_mean(lambda size, _: lifted(size, rounding), (x - lower) / (upper - lower), draws=20_000, resolution=0.03, generator=generator)


def test_it_is_unbiased(generator: torch.Generator) -> None:
    check(rounding_lift.rounded, generator)


def to_nearest(x: Tensor, u: Tensor) -> Tensor:
    del u
    return x.bfloat16()


def half_as_often(x: Tensor, u: Tensor) -> Tensor:
    return rounding_lift.rounded(x, u // 2)


def towards_zero(x: Tensor, u: Tensor) -> Tensor:
    return rounding_lift.rounded(x, torch.zeros_like(u))


@pytest.mark.parametrize("mutant", [to_nearest, half_as_often, towards_zero])
def test_a_wrong_rounding_is_rejected(mutant: Callable[[Tensor, Tensor], Tensor], generator: torch.Generator) -> None:
    with pytest.raises(AssertionError, match="z = "):
        check(mutant, generator)


@triton.jit
@no_type_check
def _halves_repeated(key, i, column, BM: tl.constexpr, BN: tl.constexpr):
    """The counter begins again in every block of columns."""
    q = tl.arange(0, BN // 8)
    zero = tl.zeros((BM, BN // 8), tl.int32)
    a, b, c, d = tl.philox(key, zero + q[None, :], zero + i[:, None], zero + 3, zero)
    words = philox.interleaved(a, b, c, d)
    return tl.interleave(words & 0xFFFF, words >> 16)


@pytest.mark.skipif(not launch.INTERPRETED, reason="compiled kernels keep the functions they were compiled with")
def test_a_kernel_whose_counter_repeats_is_rejected(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    W, B, V = integers(20, 35, 5, generator)
    monkeypatch.setattr(rounding_lift, "_halves", _halves_repeated)
    mine, its = rounding_lift.lift(W.clone(), B, V, KEY, block=BLOCK), rounding_lift.plain(W.clone(), B, V, KEY)
    assert torch.equal(mine[:, :16], its[:, :16]) and not torch.equal(mine, its)


@pytest.mark.usefixtures("unchecked")
def test_wrong_input_is_refused() -> None:
    W, B, V = torch.zeros(4, 6, dtype=torch.bfloat16, device=DEVICE), torch.zeros(4, 2, device=DEVICE), torch.zeros(6, 2, device=DEVICE)
    with pytest.raises(ValueError, match=r"lift\(W \(4, 6\), B \(6, 2\), V \(6, 2\)\): shapes must be \(m, n\), \(m, r\) and \(n, r\)"):
        rounding_lift.lift(W, V, V, KEY)
    with pytest.raises(ValueError, match=r"W is torch.float16, the kernel knows torch.bfloat16"):
        rounding_lift.lift(W.half(), B, V, KEY)
    with pytest.raises(ValueError, match=r"B is torch.float64"):
        rounding_lift.lift(W, B.double(), V, KEY)
    with pytest.raises(ValueError, match="one dtype"):
        rounding_lift.lift(W, B, V.bfloat16(), KEY)
    with pytest.raises(ValueError, match="must be in"):
        rounding_lift.lift(W, B, V, 2**63)
    with pytest.raises(ValueError, match="powers of two"):
        rounding_lift.lift(W, B, V, KEY, block=(16, 24, 16))


def test_the_two_numbers() -> None:
    assert rounding_lift.cost(2048, 5461, 256, 4)[:2] == (4 * 2048 * 5461 + 256 * (2048 + 5461) * 4, 2 * 2048 * 5461 * 256)
