"""Spectral sampling: draw r of the directions of S = E[ĜᵀĜ] with the probabilities that minimise the variance.

Unbiased because, given the basis, E[VVᵀ] = Σ_i π_i·(c/π_i)q_iq_iᵀ + (c/π̄)·(E[t]/(n−k))(I − QQᵀ) = cI for any orthonormal basis and any
π > 0; also for a basis computed from the very gradient that is projected. A stale or poor basis costs variance, never bias.
Variance: theory/spectral.py; k = n reaches the bound of theory/optimal.py, k = 0 is Haar–Stiefel.
Reference: arXiv 2603.20632; for one matrix arXiv 2505.09647.

S is the second moment, signal plus noise: noise alone gives a law worse than Haar. With k < n the other n−k directions are exchangeable
units of mean eigenvalue ``tail``; those drawn become a Haar frame on the complement, so memory is n(k+r) and no n×n matrix appears.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from estimators.designs import DESIGNS, inclusion_probabilities
from estimators.haar_stiefel import orthonormalize
from estimators.law import Law, Spectrum, check_finite, eigenbasis
from estimators.truncated import check_basis

ESTIMATED_FLOOR = (
    0.1  # share of r/n that every unit keeps where S is estimated: columns at most √10 times those of Haar, 1/9 more variance at worst
)


@dataclass(frozen=True, eq=False)
class SpectralSampling(Law):
    """V = [q_i√(c/π_i) for the kept directions drawn; F√(c/π̄) for the tail units drawn], always r columns.

    ``basis``: Q, (*layers, n, k) with orthonormal columns, None for k = 0; ``sigma``: (*layers, k) eigenvalues, not negative; ``tail``: mean
    eigenvalue of the other directions, one number or (*layers); ``floor``: share of r/n that every unit keeps, so that σ = 0 stays unbiased;
    ``design``: "systematic" or "pivotal". With a batch of layers, ``sample(*batch)`` has shape (*batch, *layers, n, r).
    """

    basis: Float[Tensor, "*layers n k"] | None = None
    sigma: Float[Tensor, "*layers k"] | None = None
    tail: float | Float[Tensor, "*layers"] = 1.0
    floor: float = 1e-3
    design: Literal["systematic", "pivotal"] = "systematic"

    stem: ClassVar[str] = "spectral"
    fitted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.design not in DESIGNS:
            raise ValueError(f"{self}: unknown design {self.design!r}, known are {', '.join(map(repr, DESIGNS))}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"{self}: floor={self.floor} is a share of r/n and must be in [0, 1]")
        if (self.basis is None) != (self.sigma is None):
            raise ValueError(f"{self}: basis and sigma come together")
        if self.basis is not None and self.sigma is not None:
            if self.sigma.ndim < 1:
                raise ValueError(f"{self}: sigma must be a vector of eigenvalues, got a number")
            check_basis(str(self), self.n, self.sigma.shape[-1], self.basis)
            if self.sigma.shape[:-1] != self.basis.shape[:-2]:
                raise ValueError(f"{self}: sigma {tuple(self.sigma.shape)} and basis {tuple(self.basis.shape)} differ in layers")
            check_finite(str(self), "sigma", self.sigma)
        tail = torch.as_tensor(self.tail)
        check_finite(str(self), "tail", tail)
        layers = () if self.sigma is None else self.sigma.shape[:-1]
        if tail.ndim and tail.shape != layers:
            raise ValueError(f"{self}: tail has shape {tuple(tail.shape)}, expected one number or {tuple(layers)}")
        units = self._units()
        if bool((units < 0).any()):
            raise ValueError(f"{self}: eigenvalues must not be negative, smallest is {float(units.min()):.3g}")
        if bool((units.amax(-1) <= 0).any()):
            raise ValueError(f"{self}: the spectrum is all zero (k={self.keep})")

    @classmethod
    def from_second_moment(
        cls, S: Float[Tensor, "*layers n n"] | Spectrum, rank: int, c: float = 1.0, *, keep: int | None = None, **options: Any
    ) -> Self:
        """The law of the ``keep`` = k leading eigenvectors of S (default all n), the rest as an isotropic tail of the same trace."""
        call = f"{cls.__name__}.from_second_moment"
        sigma, Q = eigenbasis(call, S)
        n = Q.shape[-1]
        k = n if keep is None else keep
        if not 0 <= k <= n:
            raise ValueError(f"{call}(n={n}, keep={keep}): keep must be between 0 and n")
        tail = sigma[..., k:].mean(-1) if k < n else torch.ones_like(sigma[..., 0])
        return cls(n=n, rank=rank, c=c, basis=Q[..., :k], sigma=sigma[..., :k], tail=tail, **options)

    @classmethod
    def from_basis(
        cls,
        Q: Float[Tensor, "*layers n k"],
        sigma: Float[Tensor, "*layers k"],
        tail: float | Float[Tensor, "*layers"],
        rank: int,
        c: float = 1.0,
        *,
        floor: float = ESTIMATED_FLOOR,
        **options: Any,
    ) -> Self:
        """The law of any orthonormal directions Q with weights σ; what makes it unbiased does not depend on how good they are.

        Meant for estimates, hence a larger ``floor`` than for a known S: one mini-batch shows no energy at all in most directions when m < n,
        and a direction believed empty would come rarely with a column of norm √(cn/(r·floor)).
        """
        if Q.ndim < 2:
            raise ValueError(f"{cls.__name__}.from_basis: Q must be (*layers, n, k), got shape {tuple(Q.shape)}")
        return cls(n=Q.shape[-2], rank=rank, c=c, basis=Q, sigma=sigma, tail=tail, floor=floor, **options)

    @property
    def keep(self) -> int:
        """k, the number of directions known one by one."""
        return 0 if self.sigma is None else self.sigma.shape[-1]

    @cached_property
    def inclusion(self) -> Float[Tensor, "*layers n"]:
        """π in float64: the k kept directions, then the n−k equal tail units."""
        return inclusion_probabilities(self._units(), self.rank, self.floor)

    @cached_property
    def tail_columns(self) -> int:
        """The largest number of tail units a draw can hold: both designs round the sum of a suffix up or down."""
        if self.keep == self.n:
            return 0
        expected = float(self.inclusion[..., self.keep :].sum(-1).max())
        return min(self.rank, self.n - self.keep, int(-(-(expected - 1e-9) // 1)))

    def reference(self) -> Float[Tensor, "*layers n n"] | None:
        """Q diag(σ) Qᵀ + tail·(I − QQᵀ), the second moment as the law remembers it; None at k = 0."""
        if self.basis is None or self.sigma is None or not self.keep:
            return None
        Q = self.basis.double()
        known = (Q * self.sigma.double().unsqueeze(-2)) @ Q.mT
        if self.keep == self.n:
            return known
        outside = torch.eye(self.n, dtype=torch.float64, device=Q.device) - Q @ Q.mT
        tail = torch.as_tensor(self.tail, dtype=torch.float64, device=Q.device)[..., None, None]
        return known + tail * outside

    def _units(self) -> Tensor:
        """Eigenvalues of all n units, (*layers, n), float64."""
        kept = torch.zeros(0, dtype=torch.float64) if self.sigma is None else self.sigma.double()
        tail = torch.as_tensor(self.tail, dtype=torch.float64, device=kept.device)
        return torch.cat([kept, tail.unsqueeze(-1).expand(*kept.shape[:-1], self.n - self.keep)], dim=-1)

    def _draw(self, batch: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
        pi = self.inclusion.to(device)
        J = DESIGNS[self.design](pi, self.rank, batch, generator)
        shape = (*J.shape[:-1], self.n, self.rank)
        weight = (self.c / pi.expand(*J.shape[:-1], self.n).gather(-1, J)).sqrt().to(dtype)
        V = torch.zeros(shape, device=device, dtype=dtype)
        Q = V.new_zeros(self.n, 0) if self.basis is None else self.basis.to(device=device, dtype=dtype)
        if self.keep:  # J ascends, so kept directions fill the leading columns and tail units the trailing ones
            column = J.clamp_max(self.keep - 1).unsqueeze(-2).expand(shape)
            V = Q.expand(*J.shape[:-1], self.n, self.keep).gather(-1, column)
        if self.tail_columns:
            Z = torch.randn(*shape[:-1], self.tail_columns, generator=generator, device=device, dtype=dtype)
            F = complement_frame(Q, Z)
            is_tail = (J[..., -self.tail_columns :] >= self.keep).unsqueeze(-2)
            V[..., -self.tail_columns :] = torch.where(is_tail, F, V[..., -self.tail_columns :])
        return V * weight.unsqueeze(-2)


def complement_frame(Q: Float[Tensor, "*layers n k"], Z: Float[Tensor, "*draws n t"]) -> Float[Tensor, "*draws n t"]:
    """A Haar frame of t columns on the complement of span(Q), from Gaussian Z; t ≤ n−k. Projected twice, against rounding."""
    for _ in range(2):
        Z = orthonormalize(Z - Q @ (Q.mT @ Z), dimension=Z.shape[-2] - Q.shape[-1])
    return Z
