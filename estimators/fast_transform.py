"""V of a subsampled transform by its factors: XV and BVᵀ in O(n log n) a row, with V never formed.

    V = s·D·Cᵀ·E_J:   XV = s·(XD)Cᵀ restricted to J;   BVᵀ = s·(B put on J)·C·D

D random signs, C the orthonormal DCT-II or H_{2^a} ⊗ DCT_b. The frame keeps n signs and r integers in the place of n·r numbers.
Reference: Makhoul (1980), DCT by one FFT of the same length; Yates (1937), fast Hadamard transform, here by RADIX in one product:
n·RADIX·log(n)/log(RADIX) operations a row, as many as a matrix product does quickly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import scipy.linalg
import torch
from jaxtyping import Float, Int
from torch import Tensor

Transform = Literal["dct", "hadamard"]
RADIX = 64  # six bits at a time: one product with a 64×64 matrix moves the numbers once


@dataclass(frozen=True, eq=False)
class TransformFrame:
    """One drawn V (n, r). ``sign``: (n,) of ±1; ``J``: (r,) places; ``scale``: s."""

    transform: Transform
    sign: Float[Tensor, " n"]
    J: Int[Tensor, " r"]
    scale: float

    def sketch(self, X: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch r"]:
        """XV, in float32 or better and then in the dtype of X."""
        exact = X.to(torch.promote_types(X.dtype, torch.float32))
        return (FORWARD[self.transform](exact * self.sign.to(exact))[..., self.J] * self.scale).to(X.dtype)

    def lift(self, B: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch n"]:
        """BVᵀ, likewise."""
        exact = B.to(torch.promote_types(B.dtype, torch.float32))
        full = exact.new_zeros(*B.shape[:-1], len(self.sign))
        full[..., self.J] = exact
        return (BACKWARD[self.transform](full) * (self.sign.to(exact) * self.scale)).to(B.dtype)

    def bytes(self) -> int:
        """Of what is kept."""
        return sum(t.numel() * t.element_size() for t in (self.sign, self.J))


def dct(X: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """XCᵀ with C the orthonormal DCT-II: the transform of every row."""
    n = X.shape[-1]
    if X.numel() == 0:
        return X
    order = torch.cat([X[..., ::2], X[..., 1::2].flip(-1)], dim=-1)
    turned = torch.view_as_real(torch.fft.fft(order)) * _turns(n, X.dtype, X.device)
    return turned.sum(-1)


def dct_transposed(Y: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """YC, the inverse of ``dct``."""
    n = Y.shape[-1]
    if Y.numel() == 0:
        return Y
    spectrum = torch.view_as_complex((Y.unsqueeze(-1) * _turns(n, Y.dtype, Y.device)).contiguous())
    order = torch.fft.ifft(spectrum, norm="forward").real  # without 1/n
    X = torch.empty_like(order)
    half = (n + 1) // 2
    X[..., ::2], X[..., 1::2] = order[..., :half], order[..., half:].flip(-1)
    return X


def hadamard(X: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """XCᵀ with C = H_{2^a} ⊗ DCT_b, n = 2^a·b, b odd."""
    power, odd = split(X.shape[-1])
    if odd > 1:
        X = dct(X.unflatten(-1, (power, odd))).flatten(-2)
    return _walsh(X, power, odd)


def hadamard_transposed(Y: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """YC, the inverse of ``hadamard``."""
    power, odd = split(Y.shape[-1])
    Y = _walsh(Y, power, odd)
    return Y if odd == 1 else dct_transposed(Y.unflatten(-1, (power, odd))).flatten(-2)


FORWARD = {"dct": dct, "hadamard": hadamard}
BACKWARD = {"dct": dct_transposed, "hadamard": hadamard_transposed}


def split(n: int) -> tuple[int, int]:
    """(2^a, b) with n = 2^a·b and b odd."""
    return n & -n, n // (n & -n)


def sylvester(size: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "k k"]:
    """Sylvester's Hadamard matrix of ±1; ``size`` is a power of two."""
    return torch.as_tensor(_signs(size), dtype=dtype, device=device)


_signs = cache(scipy.linalg.hadamard)


def _walsh(X: Tensor, power: int, odd: int) -> Tensor:
    """H_{2^a} ⊗ I_b on every row, orthonormal: one product a digit to the base RADIX, the lowest last."""
    shape, left, right = X.shape, 1, power * odd
    X = X.reshape(-1, power * odd)
    rows = len(X)
    while left < power:
        digit = min(RADIX, power // left)
        right //= digit
        H = sylvester(digit, X.dtype, X.device)
        X = X.view(-1, digit) @ H if right == 1 else H @ X.view(rows * left, digit, right)
        left *= digit
    return X.reshape(shape) / math.sqrt(power)


def _turns(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n, 2): √(2/n)·(cos, sin)(πk/2n), √(1/n) at k = 0: turns the FFT of the reordered row into its DCT."""
    angle = torch.arange(n, device=device, dtype=torch.float64) * (math.pi / (2 * n))
    size = torch.full_like(angle, math.sqrt(2 / n)).index_fill(0, torch.zeros(1, dtype=torch.long, device=device), math.sqrt(1 / n))
    return (torch.stack([angle.cos(), angle.sin()], dim=-1) * size.unsqueeze(-1)).to(dtype)
