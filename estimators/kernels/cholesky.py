"""Cholesky factors of many small matrices in one launch, A = LLᵀ with r ≤ 64, their inverses, and Cholesky-QR built on them.

A program holds one matrix. Step k takes l = A_{·k}/√A_kk, subtracts llᵀ from A and, from M (at first I), l_i times row k of M, which was
divided by L_kk: after r steps M = L⁻¹. Cholesky-QR of Z (n×r) is ZᵀZ = LLᵀ, Q = ZL⁻ᵀ, R = Lᵀ, done twice: the second pass takes the error
of QᵀQ from ε·κ(Z)² to ε. diag(R) > 0, so Q is the factor that makes a Gaussian Z Haar (estimators/haar_stiefel.py).
A batch of N moves triangles, 3N·r(r+1)/2·4 bytes, and does N(r³/3 + r³/3) operations that are no matrix products; the kernel, which works
on full r×r blocks, does about 6Nr³. Small matrices are bound by the r steps that wait for one another, which a floor of bytes and
operations does not know.
Reference: Yamamoto et al., Roundoff error analysis of the CholeskyQR2 algorithm (2015).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from estimators.kernels import launch
from estimators.kernels.launch import Cost, jit, tl

LARGEST = 64  # r


class Factor(NamedTuple):
    """L (batch, r, r), lower triangular with a positive diagonal, L⁻¹, and ``info`` (batch,): 0, or k for the first leading k×k block that
    is not positive definite, whose L and L⁻¹ say nothing."""

    L: Tensor
    inverse: Tensor
    info: Tensor


def cost(batch: int, r: int) -> Cost:
    """Of ``batch`` factors and inverses in float32: the triangles of A read, of L and L⁻¹ written."""
    return Cost(3 * batch * r * (r + 1) // 2 * 4, 0, round(batch * 2 * r**3 / 3))


def plain(A: Float[Tensor, "batch r r"]) -> Factor:
    """L, L⁻¹ and info by LAPACK or cuSOLVER: the oracle of ``factor``. Only the lower triangle of A is read."""
    L, info = torch.linalg.cholesky_ex(A)
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    return Factor(L, torch.linalg.solve_triangular(L, identity, upper=False), info)


@jit
@no_type_check
def _factor(A, L, M, info, r, a_batch, a_row, a_column, R: tl.constexpr):
    """One matrix of r ≤ R rows, with ones on the diagonal beyond r; L and M are contiguous."""
    batch = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, R)[:, None], tl.arange(0, R)[None, :]
    inside, unit = (i < r) & (j < r), (i == j).to(tl.float32)
    low = tl.where(i >= j, i, j) * a_row + tl.where(i >= j, j, i) * a_column  # the lower triangle, mirrored
    a = tl.where(inside, tl.load(A + batch * a_batch + low, mask=inside, other=0.0), unit)
    lower, inverse, failed = tl.zeros((R, R), tl.float32), unit, 0
    for k in range(r):
        column = tl.sum(tl.where(j == k, a, 0.0), axis=1)[:, None]  # A_{·k}
        pivot = tl.sum(tl.where(i == k, column, 0.0))
        failed = tl.where((failed == 0) & ((pivot > 0.0) == 0), k + 1, failed)  # a NaN is not positive either
        root = tl.sqrt_rn(tl.maximum(pivot, 0.0))
        column = tl.where(i >= k, tl.div_rn(column, root + tl.zeros_like(column)), 0.0)
        row = tl.sum(tl.where(i == j, column, 0.0), axis=0)[None, :]  # the same entries along the other side
        below = tl.where(i > k, column, 0.0)
        scaled = tl.div_rn(tl.sum(tl.where(i == k, inverse, 0.0), axis=0), root + tl.zeros((R,), tl.float32))[None, :]
        inverse = tl.where(i == k, scaled, inverse - below * scaled)
        lower = tl.where(j == k, column, lower)
        a = a - column * row
    place = batch * r * r + i * r + j
    tl.store(L + place, lower, mask=inside)
    tl.store(M + place, inverse, mask=inside)
    tl.store(info + batch, failed)


def factor(A: Float[Tensor, "batch r r"]) -> Factor:
    """L, L⁻¹ and info of every matrix of the batch (float32, r ≤ 64) by the kernel; only the lower triangle of A is read.

    Nothing is raised for a matrix that is not positive definite: ``info`` says so, as from ``torch.linalg.cholesky_ex``, and reading it
    waits for the device. Raises ``ValueError`` for another shape, dtype or device, and ``ImportError`` without Triton.
    """
    call = f"factor(A of shape {tuple(A.shape)})"
    if A.ndim != 3 or A.shape[1] != A.shape[2] or not 1 <= A.shape[1] <= LARGEST:
        raise ValueError(f"{call}: A must be (batch, r, r) with 1 ≤ r ≤ {LARGEST}")
    launch.check(call, {"A": A}, (torch.float32,))
    batch, r, _ = A.shape
    R = max(16, launch.power_of_two(r))
    L, M = torch.empty(batch, r, r, device=A.device), torch.empty(batch, r, r, device=A.device)
    info = torch.zeros(batch, device=A.device, dtype=torch.int32)
    if batch:
        with torch.cuda.device_of(A):
            _factor[(batch,)](A, L, M, info, r, *A.stride(), R=R, num_warps=max(1, R // 8))
    return Factor(L, M, info)


class Orthonormal(NamedTuple):
    """Z = QR: Q (batch, n, r) with QᵀQ = I, R (batch, r, r) upper triangular, diagonal positive, ``info`` (batch,) of the first pass."""

    Q: Tensor
    R: Tensor
    info: Tensor


def cholesky_qr(Z: Float[Tensor, "batch n r"]) -> Orthonormal:
    """The QR factors of every Z (float32, r ≤ min(n, 64)) by the kernel and products of torch, in two passes.

    For Z of condition number up to about 10³: beyond, ZᵀZ is not positive definite in float32 and ``info`` says so. Raises ``ValueError``
    for another shape, dtype or device, and ``ImportError`` without Triton.
    """
    return _twice(f"cholesky_qr(Z of shape {tuple(Z.shape)})", Z, factor)


def plain_qr(Z: Float[Tensor, "batch n r"]) -> Orthonormal:
    """The same with ``plain`` factors: the oracle of ``cholesky_qr``."""
    return _twice(f"plain_qr(Z of shape {tuple(Z.shape)})", Z, plain)


def _twice(call: str, Z: Tensor, factors: Callable[[Tensor], Factor]) -> Orthonormal:
    if Z.ndim != 3 or not 1 <= Z.shape[2] <= Z.shape[1]:
        raise ValueError(f"{call}: Z must be (batch, n, r) with 1 ≤ r ≤ n")
    first = factors(Z.mT @ Z)
    Q = Z @ first.inverse.mT
    second = factors(Q.mT @ Q)
    return Orthonormal(Q @ second.inverse.mT, (first.L @ second.L).mT, first.info)
