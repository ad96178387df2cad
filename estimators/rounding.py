"""Stochastic rounding: x goes to one of its two neighbours in a coarser format, the nearer one with the larger probability.

Unbiased because P(upper) = (x − lower)/(upper − lower), so E[round(x)] = x exactly, also where an update is far below the spacing of the
format and rounding to nearest would lose it every time. Variance: (x − lower)(upper − x).
"""

from __future__ import annotations

import torch
from torch import Tensor

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def stochastic_round(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """x (float32 or float64, any shape) as ``dtype``; infinite, NaN and overflowing entries are cast. Raises ``ValueError`` for other dtypes."""
    if dtype not in SIXTEEN_BIT:
        raise ValueError(f"stochastic_round(dtype={dtype}): only bfloat16 and float16 are rounded stochastically")
    near = x.to(dtype)
    error = x - near.to(x.dtype)
    bits = near.view(torch.int16)  # sign and magnitude: the next integer is the neighbour away from zero
    outward = (x.abs() > near.abs().to(x.dtype)) | (near == 0)
    other = torch.where(outward, bits + 1, bits - 1).view(dtype)
    spacing = (other.to(x.dtype) - near.to(x.dtype)).abs()
    u = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    crosses = (u * spacing < error.abs()) & torch.isfinite(near) & (error != 0)
    return torch.where(crosses, other, near)
