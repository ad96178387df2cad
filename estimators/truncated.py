"""Truncation: V = √c·Q for one fixed orthonormal basis Q, the same for every draw.

Biased: E[VVᵀ] = c·QQᵀ, so what lies outside span(Q) is lost at every draw and no average brings it back.
Error: theory/truncated.py; all of it is bias, ‖G(I − QQᵀ)‖² at c = 1.
Reference: top-r SVD is the projector of GaLore (arXiv 2403.03507), taken there from the current minibatch gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from estimators.law import Law, Spectrum, check_finite, eigenbasis

ORTHONORMAL = 1e-4  # largest |QᵀQ − I| of a basis accepted as orthonormal (float32 factorisations reach 1e-6)


def check_basis(call: str, n: int, columns: int, basis: Tensor) -> None:
    """Raise ``ValueError`` unless ``basis`` is finite, of shape (*batch, n, columns), with orthonormal columns."""
    if basis.ndim < 2 or tuple(basis.shape[-2:]) != (n, columns):
        raise ValueError(f"{call}: basis has shape {tuple(basis.shape)}, expected (*, {n}, {columns})")
    check_finite(call, "basis", basis)
    gram = basis.double().mT @ basis.double()
    defect = float((gram - torch.eye(columns, dtype=torch.float64, device=basis.device)).abs().max()) if columns else 0.0
    if defect > ORTHONORMAL:
        raise ValueError(f"{call}: basis must have orthonormal columns, largest |QᵀQ - I| is {defect:.3g}")


@dataclass(frozen=True, eq=False)
class FixedBasis(Law):
    """V = √c·Q. ``basis``: Q of shape (*layers, n, r) with orthonormal columns; None means the leading r coordinates.

    With a batch of layers, ``sample(*batch)`` has shape (*batch, *layers, n, r).
    """

    basis: Float[Tensor, "*layers n r"] | None = None

    stem: ClassVar[str] = "truncated"
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.basis is not None:
            check_basis(str(self), self.n, self.rank, self.basis)

    def _draw(self, batch: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
        del generator  # nothing is random
        Q = torch.eye(self.n, self.rank, dtype=torch.float64) if self.basis is None else self.basis
        V = (self.c**0.5 * Q).to(device=device, dtype=dtype)
        return V.expand(*batch, *V.shape).clone()


@dataclass(frozen=True, eq=False)
class TopSVD(FixedBasis):
    """V = √c·Q with Q the top-r right singular vectors of a gradient: ``from_matrix(G, rank)`` or ``from_second_moment(S, rank)``."""

    fitted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.basis is None:
            raise ValueError(f"{self}: needs the basis of a gradient, use TopSVD.from_matrix or TopSVD.from_second_moment")

    @classmethod
    def from_basis(
        cls,
        Q: Float[Tensor, "n k"],
        sigma: Tensor,
        tail: float | Tensor,
        rank: int,
        c: float = 1.0,
    ) -> Self:
        """The law of the leading ``rank`` of k ≥ r known directions; σ and tail, which the spectral law needs as well, are not looked at."""
        del sigma, tail
        return cls(n=Q.shape[-2], rank=rank, c=c, basis=Q[..., :rank])

    @classmethod
    def from_matrix(cls, G: Float[Tensor, "m n"], rank: int, c: float = 1.0) -> Self:
        """The law of one gradient matrix G (m×n). Raises ``ValueError`` for NaN or infinite entries or an all-zero G."""
        check_finite(f"{cls.__name__}.from_matrix", "G", G)
        return cls.from_second_moment(G.double().mT @ G.double(), rank, c)

    @classmethod
    def from_second_moment(cls, S: Float[Tensor, "*layers n n"] | Spectrum, rank: int, c: float = 1.0, **options: Any) -> Self:
        """The leading r eigenvectors of S = E[ĜᵀĜ], (*layers, n, n)."""
        _, Q = eigenbasis(f"{cls.__name__}.from_second_moment", S)
        return cls(n=Q.shape[-1], rank=rank, c=c, basis=Q[..., :rank], **options)
