"""What a law is: the distribution of a random n×r matrix V whose P = VVᵀ has mean E[P] = cI (unless the law says it is biased).

A law is a frozen dataclass; its fields beyond (n, rank, c) are the keyword arguments of the module of the same ``stem`` in
theory/, which states its exact moments. Nothing here or in a subclass touches the global random state.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

SYMMETRY = 1e-4  # relative asymmetry (float32 accumulations) above which a second moment is rejected
INDEFINITE = 1e-5  # relative size of a negative eigenvalue that is still rounding

Constant = float | Literal["r/n"]  # isotropy constant of a layer


class Spectrum(NamedTuple):
    """A second moment by its eigenvalues (*layers, n), largest first and not negative, and eigenvectors (*layers, n, n)."""

    sigma: Tensor
    Q: Tensor


@dataclass(frozen=True, eq=False)
class Law(abc.ABC):
    """Base of all laws.

    ``n``: dimension that is projected (columns of the gradient); ``rank``: r, columns of V, 1 ≤ r ≤ n; ``c``: isotropy constant,
    E[VVᵀ] = cI, 1 for strong unbiasedness. Raises ``ValueError`` naming the call for other values.
    """

    n: int
    rank: int  # r
    c: float = 1.0

    stem: ClassVar[str]  # the module of this law here and in theory/
    unbiased: ClassVar[bool] = True  # E[VVᵀ] = cI
    fitted: ClassVar[bool] = False  # drawn from known directions of the gradient: has ``from_basis(Q, sigma, tail, rank, c)``

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or not isinstance(self.n, int):
            raise ValueError(f"{self}: n and rank must be integers")
        if self.rank < 1:
            raise ValueError(f"{self}: rank must be at least 1")
        if self.rank > self.n:
            raise ValueError(f"{self}: rank must be at most n")
        if not (self.c > 0 and math.isfinite(self.c)):
            raise ValueError(f"{self}: c must be positive and finite")

    def __str__(self) -> str:
        extra = "".join(f", {f.name}={v}" for f in fields(self)[3:] if isinstance(v := getattr(self, f.name), bool | float | str))
        return f"{type(self).__name__}(n={self.n}, r={self.rank}, c={self.c:g}{extra})"

    def sample(
        self,
        *batch: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Independent draws V of shape (*batch, n, r).

        ``generator`` is the only source of randomness; ``device`` defaults to the generator's and must be of its kind. Arithmetic is in
        float32 or better and the result is then cast to ``dtype``.
        """
        device = generator.device if device is None else torch.device(device)
        exact = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        return self._draw(batch, generator, device, exact).to(dtype)

    @abc.abstractmethod
    def _draw(self, batch: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
        """V of shape (*batch, n, r) in ``dtype``, float32 or float64."""

    @classmethod
    def from_second_moment(cls, S: Float[Tensor, "*layers n n"] | Spectrum, rank: int, c: float = 1.0, **options: Any) -> Self:
        """The law of this family for gradients with second moment S = E[ĜᵀĜ] (or its ``Spectrum``); most look at its size only."""
        if not isinstance(S, Spectrum):
            check_second_moment(f"{cls.__name__}.from_second_moment", S)
        return cls(n=(S.Q if isinstance(S, Spectrum) else S).shape[-1], rank=rank, c=c, **options)

    def reference(self) -> Float[Tensor, "*batch n n"] | None:
        """The second moment this law was fitted to, as the law remembers it, or None for a law that fits every gradient alike."""
        return None


def constant(c: Constant, n: int, rank: int) -> float:
    """c of a layer; of "r/n" its own r/n, at which a column of V has length 1 at any rank (its square on average, n·c/r = 1)."""
    return rank / n if c == "r/n" else c


def scale(n: int, rank: int, c: float) -> float:
    """√(cn/r), the factor that gives r orthonormal columns, uniform over directions, E[VVᵀ] = cI. It appears only here."""
    return math.sqrt(c * n / rank)


def uniform_subset(n: int, rank: int, batch: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Int[Tensor, "*batch r"]:
    """Uniform r-subsets of {0 … n−1} in uniform random order: the r largest of n independent uniforms."""
    keys = torch.rand(*batch, n, generator=generator, device=device, dtype=torch.float64)
    return keys.topk(rank, dim=-1).indices


def check_finite(call: str, name: str, value: Tensor) -> None:
    """Raise ``ValueError`` if ``value`` has a NaN or infinite entry."""
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{call}: {name} of shape {tuple(value.shape)} has NaN or infinite entries")


def check_second_moment(call: str, S: Tensor) -> None:
    """Raise ``ValueError`` unless S (*batch, n, n) is finite, square and symmetric up to float32 accumulation."""
    if S.ndim < 2 or S.shape[-1] != S.shape[-2] or S.numel() == 0:
        raise ValueError(f"{call}: the second moment must be a non-empty square matrix, got shape {tuple(S.shape)}")
    check_finite(call, "the second moment", S)
    defect = float((S - S.mT).abs().max())
    if defect > SYMMETRY * float(S.abs().max()):
        raise ValueError(f"{call}: the second moment must be symmetric, largest |S - Sᵀ| is {defect:.3g}")
    smallest = float(S.diagonal(dim1=-2, dim2=-1).min())
    if smallest < -INDEFINITE * float(S.abs().max()):
        raise ValueError(f"{call}: the second moment is indefinite, smallest diagonal entry {smallest:.3g}")


def eigenbasis(call: str, S: Tensor | Spectrum) -> Spectrum:
    """The spectrum of a second moment, in float64; one that is already known is passed through.

    Raises ``ValueError`` for a matrix that is not symmetric, indefinite beyond rounding, or zero.
    """
    if isinstance(S, Spectrum):
        return S
    check_second_moment(call, S)
    sigma, Q = torch.linalg.eigh(S.double())
    largest = sigma[..., -1]
    if bool((largest <= 0).any()):
        raise ValueError(f"{call}: the second moment has no positive eigenvalue (largest {float(largest.min()):.3g})")
    if bool((sigma[..., 0] < -INDEFINITE * largest).any()):
        raise ValueError(f"{call}: the second moment is indefinite, smallest eigenvalue {float(sigma.min()):.3g}")
    return Spectrum(sigma.clamp_min(0).flip(-1), Q.flip(-1))
