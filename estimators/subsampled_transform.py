"""Subsampled orthonormal transform: V = √(cn/r)·D Cᵀ E_J, D random signs, C the DCT or Hadamard matrix, J a uniform r-set.

Unbiased because given D the frame DCᵀ is orthonormal and the coordinate law is unbiased in any orthonormal basis.
Variance: theory/subsampled_transform.py; VᵀV = (cn/r)I, so E[P²] = c²(n/r)I, the floor of Haar–Stiefel, without a factorisation.
Reference: Ailon & Chazelle (2006); Tropp (2011). Only the r rows of C in J are formed, never C itself; ``frame``: not even those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from estimators.fast_transform import Transform, TransformFrame, split, sylvester
from estimators.law import Law, scale, uniform_subset


@dataclass(frozen=True, eq=False)
class SubsampledTransform(Law):
    """Signed, subsampled rows of an orthonormal ``transform``: "dct" (DCT-II) or "hadamard".

    The Hadamard transform exists for n a power of two; for n = 2^a·b with b odd it is taken in Kronecker product with the DCT of order b.
    """

    transform: Transform = "dct"

    stem: ClassVar[str] = "subsampled_transform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transform not in ("dct", "hadamard"):
            raise ValueError(f"{self}: unknown transform {self.transform!r}, known are 'dct' and 'hadamard'")

    def frame(
        self, *, generator: torch.Generator, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> TransformFrame:
        """A draw by its factors, for XV and BVᵀ in O(n log n): the V that ``sample`` draws from an equal generator, not formed."""
        where = generator.device if device is None else torch.device(device)
        exact = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        J, sign = self._factors((), generator, where, exact)
        return TransformFrame(self.transform, sign[:, 0], J, scale(self.n, self.rank, self.c))

    def _factors(
        self, batch: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype
    ) -> tuple[Int[Tensor, "*batch r"], Float[Tensor, "*batch n 1"]]:
        J = uniform_subset(self.n, self.rank, batch, generator, device)
        return J, torch.randint(0, 2, (*batch, self.n, 1), generator=generator, device=device, dtype=dtype) * 2 - 1

    def _draw(self, batch: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
        J, sign = self._factors(batch, generator, device, dtype)
        rows = dct_rows(self.n, J, dtype) if self.transform == "dct" else hadamard_rows(self.n, J, dtype)
        return scale(self.n, self.rank, self.c) * sign * rows.mT


@dataclass(frozen=True, eq=False)
class Hadamard(SubsampledTransform):
    """``SubsampledTransform`` with the Hadamard transform by default."""

    transform: Transform = "hadamard"


def dct_rows(n: int, J: Int[Tensor, "*batch r"], dtype: torch.dtype) -> Float[Tensor, "*batch r n"]:
    """Rows J of the orthonormal DCT-II matrix: C_ka = √(2/n)·cos(π(2a+1)k/(2n)), √(1/n) at k = 0."""
    a = torch.arange(n, device=J.device)
    turns = (J.unsqueeze(-1) * (2 * a + 1)) % (4 * n)  # exact: the angle is reduced in integers
    table = torch.cos(torch.arange(4 * n, device=J.device, dtype=torch.float64) * (math.pi / (2 * n)))
    amplitude = torch.full(J.shape, math.sqrt(2 / n), dtype=dtype, device=J.device).masked_fill(J == 0, math.sqrt(1 / n))
    return table.to(dtype)[turns] * amplitude.unsqueeze(-1)


def hadamard_rows(n: int, J: Int[Tensor, "*batch r"], dtype: torch.dtype) -> Float[Tensor, "*batch r n"]:
    """Rows J of H_{2^a} ⊗ DCT_b for n = 2^a·b, b odd: the Kronecker product of rows of two small Sylvester matrices and of the DCT."""
    power, odd = split(n)
    low = 1 << (power.bit_length() - 1) // 2
    k = J // odd
    high_rows = sylvester(power // low, dtype, J.device)[k // low]
    low_rows = sylvester(low, dtype, J.device)[k % low] / math.sqrt(power)
    rows = (high_rows.unsqueeze(-1) * low_rows.unsqueeze(-2)).flatten(-2)
    return rows if odd == 1 else (rows.unsqueeze(-1) * dct_rows(odd, J % odd, dtype).unsqueeze(-2)).flatten(-2)
