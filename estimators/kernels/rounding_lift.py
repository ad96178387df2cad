"""The lift W ← round(W + BVᵀ) of a bfloat16 W (m×n), rounded stochastically, without a float32 copy of W.

With x the float32 value of W + BVᵀ and u a uniform 16-bit number, the result is the upper half of the bits of x + u, u added to the bits:
the lower half of x carries into the upper with probability (lower half)/2¹⁶ = (|x| − inner)/(outer − inner) of its two neighbours.
Unbiased because that is the probability that makes E[round(x)] = x: exactly, not up to the resolution of a float uniform, since x has only
16 bits below bfloat16. What the format holds has a lower half of zeros and stays; infinite and NaN entries, and those beyond the largest
finite number, are cast as by estimators/rounding.py. Variance: (x − lower)(upper − x).
u is half e mod 2 of word ⌊e/2⌋, e = j mod 8, of the Philox counter (⌊j/8⌋, i, ROUNDING, 0): a function of key, i and j alone.

Moves 4mn + r(m + n)·itemsize bytes, does 2mnr operations in products and about 20mn in making and adding u. A float32 copy of W and of
the product, as the plain version has them, are some 20mn bytes more. Reference: estimators/writing.py, lift="stochastic".
"""

from __future__ import annotations

from typing import no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor

from estimators.kernels import launch, philox
from estimators.kernels.launch import Cost, dot, jit, nearest, tl
from estimators.kernels.philox import Stream, interleaved

FACTORS = (torch.float32, torch.bfloat16)
BLOCK = (64, 64, 32)  # of m, of n (a multiple of 8, the halves of a call), of r


def cost(m: int, n: int, r: int, itemsize: int) -> Cost:
    """Of one lift of an m×n matrix with B and V in a dtype of ``itemsize`` bytes."""
    return Cost(4 * m * n + r * (m + n) * itemsize, 2 * m * n * r, round(m * n * (philox.CALL / 8 + 8)))


def halves(key: int, m: int, n: int, device: torch.device | str = "cpu") -> Int[Tensor, "m n"]:
    """The 16-bit numbers u of ``key``, as int64 in [0, 2¹⁶)."""
    columns, rows = torch.arange(-(-n // 8), device=device), torch.arange(m, device=device).unsqueeze(-1)
    words = philox.words(key, columns, rows, Stream.ROUNDING)
    return torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(-3)[:, :n]


def rounded(x: Float[Tensor, "*shape"], u: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x (float32) rounded to bfloat16 with the 16-bit numbers ``u``."""
    drawn = ((x.view(torch.int32).long() + u) >> 16).to(torch.int16).view(torch.bfloat16)  # arithmetic shift: the sign stays
    return torch.where(x.abs() <= torch.finfo(torch.bfloat16).max, drawn, x.bfloat16())


def plain(W: Float[Tensor, "m n"], B: Float[Tensor, "m r"], V: Float[Tensor, "n r"], key: int) -> Float[Tensor, "m n"]:
    """W + BVᵀ in float32, rounded stochastically, written to W (bfloat16), which is returned: the oracle of ``lift``."""
    m, n = W.shape
    exact = W.float().addmm_(B.float(), V.float().mT)
    return W.copy_(rounded(exact, halves(key, m, n, W.device)))


@jit
@no_type_check
def _halves(key, i, column, BM: tl.constexpr, BN: tl.constexpr):
    """u for rows ``i`` (BM,) and columns column … column + BN, uint32; ``column`` is a multiple of 8."""
    q = column // 8 + tl.arange(0, BN // 8)
    zero = tl.zeros((BM, BN // 8), tl.int32)
    a, b, c, d = tl.philox(key, zero + q[None, :], zero + i[:, None], zero + 3, zero)  # Stream.ROUNDING
    words = interleaved(a, b, c, d)
    return tl.interleave(words & 0xFFFF, words >> 16)


@jit
@no_type_check
def _rounded(x, u):
    """As ``rounded``, on the bits; they wrap beyond 2³² for NaN only."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    cast = tl.where(size > 0x7F800000, (bits >> 16) | 0x40, nearest(bits))  # a NaN stays one
    return tl.where(size > 0x7F7F0000, cast, (bits + u) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@jit(do_not_specialize=["key"])
@no_type_check
def _lift(
    W,
    B,
    V,
    key,
    m,
    n,
    r,
    w_row,
    w_column,
    b_row,
    b_column,
    v_row,
    v_column,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """One BM×BN block of W."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN
    j = column + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, r, BR):
        k = start + tl.arange(0, BR)
        b = tl.load(B + i[:, None].to(tl.int64) * b_row + k[None, :] * b_column, mask=(i[:, None] < m) & (k[None, :] < r), other=0.0)
        v = tl.load(V + j[None, :].to(tl.int64) * v_row + k[:, None] * v_column, mask=(j[None, :] < n) & (k[:, None] < r), other=0.0)
        total = dot(b, v, total)
    inside = (i[:, None] < m) & (j[None, :] < n)
    place = W + i[:, None].to(tl.int64) * w_row + j[None, :].to(tl.int64) * w_column
    held = tl.load(place, mask=inside, other=0.0).to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    exact = held.to(tl.float32, bitcast=True) + total
    tl.store(place, _rounded(exact, _halves(key, i, column, BM, BN)), mask=inside)


def lift(
    W: Float[Tensor, "m n"], B: Float[Tensor, "m r"], V: Float[Tensor, "n r"], key: int, *, block: tuple[int, int, int] = BLOCK
) -> Float[Tensor, "m n"]:
    """W ← round(W + BVᵀ) by the kernel, in place, with sums in float32; returns W. B and V: both float32, or both bfloat16.

    ``block``: m, n and r a program works on, powers of two of at least 16. Raises ``ValueError`` for other shapes, dtypes, devices or keys,
    and ``ImportError`` without Triton.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in (("W", W), ("B", B), ("V", V))}
    call = f"lift({', '.join(f'{name} {shape}' for name, shape in shapes.items())})"
    philox.check_key(call, key)
    if not (W.ndim == B.ndim == V.ndim == 2) or B.shape != (W.shape[0], V.shape[1]) or len(V) != W.shape[1]:
        raise ValueError(f"{call}: shapes must be (m, n), (m, r) and (n, r)")
    if min(block) < 16 or any(side != launch.power_of_two(side) for side in block):
        raise ValueError(f"{call}: block={block} must be powers of two of at least 16")
    launch.check(call, {"W": W}, (torch.bfloat16,))
    launch.check(call, {"B": B, "V": V}, FACTORS)
    if B.dtype != V.dtype or B.device != W.device:
        raise ValueError(f"{call}: B and V must have one dtype and be where W is, got {B.dtype} and {V.dtype}, {B.device} and {W.device}")
    (m, n), r, (BM, BN, BR) = W.shape, V.shape[1], block
    if W.numel():
        with torch.cuda.device_of(W):
            options = {"BM": BM, "BN": BN, "BR": BR}
            _lift[(-(-m // BM), -(-n // BN))](W, B, V, key, m, n, r, *W.stride(), *B.stride(), *V.stride(), **options)
    return W
