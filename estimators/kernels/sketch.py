"""The sketch XV (T×r) of X (T×n) with V made in registers from a key: V is neither stored nor read.

Entry (i, j) of V is a function of the key, i and j alone, so any block of any grid makes the same V, and so does ``basis``. With the words
w₀ … w₃ of the counter (⌊j/4⌋, i, stream, 0), entry (i, j) is, for w = w_{j mod 4}: Gaussian, √(c/r) times the normal of w; sparse sign,
+a, −a or 0 as the signed w lies above h, below −h or between, where P(±a) = p/2 with p the nearest to 1/s in 2³¹ steps and a = √(c/(rp)).
Rademacher needs one bit an entry: bit i mod 32 of w_{j mod 4} of the counter (⌊j/4⌋, ⌊i/32⌋, stream, 0), a = √(c/r).
Unbiased because entries are independent, centred and of variance c/r: E[VVᵀ] = cI, as for the laws of the same names.

Moves (Tn + Tr)·itemsize bytes and does 2Tnr operations in products. Making V once is nr·g operations, g = 45 for Gaussian, 28 for sparse
and about 5 for plain signs; a row of blocks makes all of V again, so a launch does ⌈T/128⌉·nr·g of them. That is Tnr·g/128: beside tensor
cores, which are some 30 times faster than 32-bit arithmetic, it dominates for Gaussian V, and the gain is then memory (nr numbers).
Reference: Philox as in estimators/kernels/philox.py; laws of estimators/gaussian.py, rademacher.py, sparse_sign.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from estimators.gaussian import Gaussian
from estimators.kernels import launch, philox
from estimators.kernels.launch import Cost, dot, jit, narrowed, tl
from estimators.kernels.philox import Stream, interleaved
from estimators.law import Law
from estimators.rademacher import Rademacher
from estimators.sparse_sign import SparseSign

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = (128, 32, 64)  # of tokens, of n (a multiple of 32, the bits of a word), of r; float32: half the tokens, or registers spill
WARPS = 8


class Entries(NamedTuple):
    """How an entry is made of its word: the ``stream``, the size ``a`` of an entry, and the bound h in signed words for sparse signs."""

    stream: Stream
    size: float
    bound: int = 0


def entries(law: Law) -> Entries:
    """Of Gaussian, Rademacher and sparse-sign laws. Raises ``ValueError`` for others, and for a density below 2⁻³¹."""
    if isinstance(law, Gaussian):
        return Entries(Stream.GAUSSIAN, math.sqrt(law.c / law.rank))
    if isinstance(law, Rademacher):
        return Entries(Stream.SIGNS, math.sqrt(law.c / law.rank))
    if isinstance(law, SparseSign):
        half = round(2**31 / law.sparsity)  # words that give +a; as many give −a
        if half < 1:
            raise ValueError(f"{law}: the density 1/{law.sparsity:g} is below 2⁻³¹, the step of a word")
        return Entries(Stream.SPARSE_SIGNS, math.sqrt(law.c / law.rank / (half / 2**31)), 2**31 - half)
    raise ValueError(f"{law}: entries of Gaussian, Rademacher and SparseSign can be made from a counter, those of this law cannot")


def cost(T: int, n: int, law: Law, itemsize: int, block: int | None = None) -> Cost:
    """Of one sketch of T rows in a dtype of ``itemsize`` bytes; ``block``: V is made again for so many rows, only once if None."""
    generated = {
        Stream.GAUSSIAN: philox.CALL / 4 + philox.NORMAL,
        Stream.SIGNS: philox.CALL / 128 + 4,
        Stream.SPARSE_SIGNS: philox.CALL / 4 + 3,
    }
    times = 1 if block is None else math.ceil(T / block)
    others = times * n * law.rank * generated[entries(law).stream]
    return Cost((T * n + T * law.rank) * itemsize, 2 * T * n * law.rank, round(others))


def basis(law: Law, key: int, device: torch.device | str = "cpu") -> Float[Tensor, "n r"]:
    """The V (n×r, float32) of ``law`` that belongs to ``key``, 0 ≤ key < 2⁶³."""
    stream, size, bound = entries(law)
    rows = torch.arange(law.n, device=device).unsqueeze(-1)
    columns = torch.arange(-(-law.rank // 4), device=device)
    if stream is Stream.SIGNS:
        made = philox.words(key, columns, rows[: -(-law.n // 32)], stream).flatten(-2)
        made = made.repeat_interleave(32, dim=0)[: law.n]
        values = (2 * ((made >> rows % 32) & 1) - 1).float()
    else:
        made = philox.words(key, columns, rows, stream)
        if stream is Stream.GAUSSIAN:
            values = philox.normals(made).flatten(-2)
        else:
            w = philox.signed(made).flatten(-2)
            values = (w >= bound).float() - (w < -bound).float()
    return values[:, : law.rank].contiguous() * size


def plain(X: Float[Tensor, "T n"], law: Law, key: int) -> Float[Tensor, "T r"]:
    """XV with V stored, in the dtype of X: the oracle of ``sketch``."""
    return X @ basis(law, key, X.device).to(X.dtype)


@jit
@no_type_check
def _bits(key, start, column, STREAM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """One bit an entry of a BN×BR tile of V."""
    zero = tl.zeros((BN // 32, BR // 4), tl.int32)
    q, group = column // 4 + tl.arange(0, BR // 4), start // 32 + tl.arange(0, BN // 32)
    a, b, c, d = tl.philox(key, zero + q[None, :], zero + group[:, None], zero + STREAM, zero)
    made = tl.broadcast_to(interleaved(a, b, c, d)[:, None, :], (BN // 32, 32, BR))
    return (tl.reshape(made, (BN, BR)) >> (tl.arange(0, BN) % 32).to(tl.uint32)[:, None]) & 1


@jit
@no_type_check
def _words(key, start, column, STREAM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """Four words of BN×BR/4 calls: those of columns 4q, 4q + 1, 4q + 2, 4q + 3 of a tile of V."""
    zero = tl.zeros((BN, BR // 4), tl.int32)
    q, rows = column // 4 + tl.arange(0, BR // 4), start + tl.arange(0, BN)
    return tl.philox(key, zero + q[None, :], zero + rows[:, None], zero + STREAM, zero)


@jit
@no_type_check
def _tile(key, start, column, size, bound, STREAM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """Rows start … start + BN and columns column … column + BR of V, float32; ``start`` and ``column`` are multiples of BN and BR."""
    if STREAM == 1:  # numbers of ``Stream``
        v = (2 * _bits(key, start, column, STREAM, BN, BR).to(tl.int32) - 1).to(tl.float32)
    else:
        a, b, c, d = _words(key, start, column, STREAM, BN, BR)
        if STREAM == 0:
            n1, n2 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(a), tl.uint_to_uniform_float(b))
            n3, n4 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(c), tl.uint_to_uniform_float(d))
            v = interleaved(n1, n2, n3, n4)
        else:
            word = interleaved(a, b, c, d).to(tl.int32, bitcast=True)
            v = (word >= bound).to(tl.float32) - (word < -bound).to(tl.float32)
    return v * size


@jit(do_not_specialize=["key"])
@no_type_check
def _sketch(
    X,
    Y,
    key,
    T,
    n,
    r,
    size,
    bound,
    x_row,
    x_column,
    y_row,
    STREAM: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """Y[block of BT rows, block of BR columns] = Σ over blocks of BN of X·V."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    column = tl.program_id(1) * BR
    total = tl.zeros((BT, BR), tl.float32)
    for start in range(0, n, BN):
        i = start + tl.arange(0, BN)
        x = tl.load(X + t[:, None] * x_row + i[None, :] * x_column, mask=(t[:, None] < T) & (i[None, :] < n), other=0.0)
        total = dot(x, narrowed(_tile(key, start, column, size, bound, STREAM, BN, BR), X.dtype.element_ty), total)
    j = column + tl.arange(0, BR)
    tl.store(Y + t[:, None] * y_row + j[None, :], narrowed(total, Y.dtype.element_ty), mask=(t[:, None] < T) & (j[None, :] < r))


def sketch(X: Float[Tensor, "T n"], law: Law, key: int, *, block: tuple[int, int, int] | None = None) -> Float[Tensor, "T r"]:
    """XV by the kernel, with sums in float32, in the dtype of X (float32, bfloat16 or float16); V is that of ``basis``, rounded to it.

    ``block``: tokens, n and r a program works on, powers of two of at least 16, that of n at least 32; ``BLOCK`` if None. Raises
    ``ValueError`` for another law, shape, dtype or device, and ``ImportError`` without Triton.
    """
    call = f"sketch({law})"
    stream, size, bound = entries(law)
    philox.check_key(call, key)
    if X.ndim != 2 or X.shape[1] != law.n:
        raise ValueError(f"{call}: X must be (T, n={law.n}), got shape {tuple(X.shape)}")
    block = block or (BLOCK[0] // (2 if X.dtype == torch.float32 else 1), *BLOCK[1:])
    BT, BN, BR = block
    if min(block) < 16 or BN < 32 or any(side != launch.power_of_two(side) for side in block):
        raise ValueError(f"{call}: block={block} must be powers of two, at least (16, 32, 16)")
    launch.check(call, {"X": X}, DTYPES)
    Y = torch.empty(len(X), law.rank, device=X.device, dtype=X.dtype)
    BR = max(16, min(BR, launch.power_of_two(law.rank)))
    grid = (-(-len(X) // BT), -(-law.rank // BR))
    if len(X):
        with torch.cuda.device_of(X):
            options = {"STREAM": int(stream), "BT": BT, "BN": BN, "BR": BR, "num_warps": WARPS}
            _sketch[grid](X, Y, key, len(X), law.n, law.rank, size, bound, *X.stride(), Y.stride(0), **options)
    return Y
