"""The fast Walsh–Hadamard transform of rows: Y = XH/√n, H_kl = (−1)^popcount(k & l), n a power of two.

log₂n stages; in the one of half-width h the entries k and k + h of a block of 2h become their sum and their difference. H/√n is symmetric
and orthonormal, so applying it twice gives X back. A program holds its rows in registers from the first stage to the last.
Moves 2Tn·itemsize bytes, does Tn·log₂n additions and Tn products with 1/√n; sums are in float32, in the order of ``plain``, so the two
agree to the last bit. Reference: Fino & Algazi (1976); the transform of estimators/subsampled_transform.py.
"""

from __future__ import annotations

import math
from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from estimators.kernels import launch
from estimators.kernels.launch import Cost, jit, narrowed, tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 2**15  # entries that a program can hold
HELD = 2**12  # entries a program holds where rows are shorter than that


def cost(T: int, n: int, itemsize: int) -> Cost:
    """Of T rows in a dtype of ``itemsize`` bytes; its additions are no matrix products."""
    return Cost(2 * T * n * itemsize, 0, T * n * (n.bit_length() - 1) + T * n)


def plain(X: Float[Tensor, "T n"]) -> Float[Tensor, "T n"]:
    """XH/√n stage by stage, with sums in float32, in the dtype of X: the oracle of ``transform``. Raises ``ValueError`` for other n."""
    T, n = X.shape
    _check(f"plain(T={T}, n={n})", n)
    Y, half = X.float(), 1
    while half < n:
        a, b = Y.reshape(T, -1, 2, half).unbind(2)
        Y = torch.stack([a + b, a - b], dim=2)
        half *= 2
    return (Y.reshape(T, n) * (1 / math.sqrt(n))).to(X.dtype)


@jit
@no_type_check
def _stage(x, BT: tl.constexpr, N: tl.constexpr, H: tl.constexpr):
    """Sums and differences of entries H apart, for x of shape (BT, N)."""
    a, b = tl.split(tl.permute(tl.reshape(x, (BT, N // (2 * H), 2, H)), (0, 1, 3, 2)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (BT, N))


@jit
@no_type_check
def _transform(X, Y, T, scale, x_row, x_column, y_row, N: tl.constexpr, STAGES: tl.constexpr, BT: tl.constexpr):
    """BT rows, from the first stage to the last."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    j = tl.arange(0, N)[None, :]
    x = tl.load(X + t * x_row + j * x_column, mask=t < T, other=0.0).to(tl.float32)
    for k in tl.static_range(STAGES):
        x = _stage(x, BT, N, 1 << k)
    tl.store(Y + t * y_row + j, narrowed(x * scale, Y.dtype.element_ty), mask=t < T)


def transform(X: Float[Tensor, "T n"]) -> Float[Tensor, "T n"]:
    """XH/√n by the kernel, in the dtype of X (float32, bfloat16 or float16).

    Raises ``ValueError`` unless n is a power of two of at most 2¹⁵, for another shape, dtype or device, and ``ImportError`` without Triton.
    """
    call = f"transform(X of shape {tuple(X.shape)})"
    if X.ndim != 2:
        raise ValueError(f"{call}: X must be (T, n)")
    T, n = X.shape
    _check(call, n)
    if n > LARGEST:
        raise ValueError(f"{call}: rows of more than {LARGEST} entries do not fit the registers of a program")
    launch.check(call, {"X": X}, DTYPES)
    Y = torch.empty(T, n, device=X.device, dtype=X.dtype)
    rows = max(1, min(HELD // n, launch.power_of_two(max(T, 1))))
    if T:
        with torch.cuda.device_of(X):
            _transform[(-(-T // rows),)](
                X,
                Y,
                T,
                1 / math.sqrt(n),
                *X.stride(),
                Y.stride(0),
                N=n,
                STAGES=n.bit_length() - 1,
                BT=rows,
                num_warps=4 if n <= HELD else 16,
            )
    return Y


def _check(call: str, n: int) -> None:
    if n < 1 or n & (n - 1):
        raise ValueError(f"{call}: the transform exists for n a power of two")
