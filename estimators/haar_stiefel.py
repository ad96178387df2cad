"""Haar–Stiefel law: V = √(cn/r)·Q with Q uniform on the orthonormal n×r frames.

Unbiased because E[QQᵀ] commutes with every rotation, so it is a multiple of I, and its trace is r.
Variance: theory/haar_stiefel.py, E[P²] = c²(n/r)·I, the least of any law that does not look at the gradient.
Reference: arXiv 2603.20632 (optimality); Mezzadri (2007) for the sign convention of the QR route.

Q is the orthogonal factor of a Gaussian Z = QR with diag(R) > 0. That sign matters: with LAPACK's own signs Q is not Haar, which QQᵀ hides
and E[V] shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from estimators.law import Law, scale

FEW = 128  # rows below which the condition number of a Gaussian is often far from its limit


@dataclass(frozen=True, eq=False)
class HaarStiefel(Law):
    """V = √(cn/r)·Q, Q Haar on the n×r frames: VᵀV = (cn/r)I for every draw, and VVᵀ = cI at r = n."""

    stem: ClassVar[str] = "haar_stiefel"

    def _draw(self, batch: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
        Z = torch.randn(*batch, self.n, self.rank, generator=generator, device=device, dtype=dtype)
        return scale(self.n, self.rank, self.c) * orthonormalize(Z)


def orthonormalize(Z: Float[Tensor, "*batch n r"], dimension: int | None = None) -> Float[Tensor, "*batch n r"]:
    """The orthogonal factor Q of Z = QR with diag(R) > 0: Cholesky where Z is well conditioned, Householder where it may not be.

    ``dimension``: d of the subspace that the Gaussian columns of Z fill, n unless they were projected. The condition number of Z is about
    (1+√(r/d))/(1−√(r/d)): at most 3 with r ≤ d/4, where one pass of Cholesky loses no digit; at most 6 with r ≤ d/2; at r = d about d, too much
    for the Gram matrix in float32. Few rows spread more, whose second pass costs nothing.
    """
    n, rank = Z.shape[-2:]
    d = dimension or n
    if 2 * rank > d:
        return householder_qr(Z)
    return cholesky_qr(Z, passes=1 if 4 * rank <= d and d >= FEW else 2)


def cholesky_qr(Z: Float[Tensor, "*batch n r"], passes: int = 2) -> Float[Tensor, "*batch n r"]:
    """Q = Z·R⁻¹ with ZᵀZ = RᵀR; a second pass takes the error from ε·κ(Z)² to ε."""
    for _ in range(passes):
        R = torch.linalg.cholesky(Z.mT @ Z).mT
        Z = torch.linalg.solve_triangular(R, Z, upper=True, left=False)
    return Z


def householder_qr(Z: Float[Tensor, "*batch n r"]) -> Float[Tensor, "*batch n r"]:
    """The same Q by LAPACK's Householder QR with the signs of diag(R) moved into Q; the oracle of ``cholesky_qr``."""
    Q, R = torch.linalg.qr(Z)
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Z.dtype)
    return Q * sign.unsqueeze(-2)
