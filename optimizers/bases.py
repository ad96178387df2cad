"""How a frame is chosen at a refresh. G is (*batch, M, N), oriented so that N is the dimension that is projected.

``TopSingular``   the r leading right singular vectors, exactly or by power iteration from the last ones (GaLore).
``FromLaw``       V of a law of ``estimators``, which does not look at G (Flora, GoLore, APOLLO).
``Spectral``      directions of G drawn with the spectral law, and their importance weights (PLUMAGE, SpectralAdam).
``PowerIteration``one block power iteration on momentum and gradient, from the last V (LDAdam).
``Identity``      all of G. Parts of it, and columns of a fixed orthonormal matrix: ``selections``.
``Switch``        one basis before a step of training, another from it on (GoLore).

Draws are pure functions of (seed, name of the parameter, number of the draw), as everywhere here: equal on all ranks and after a resume.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from estimators import directions, keyed
from estimators.haar_stiefel import HaarStiefel
from estimators.law import Law
from estimators.selection import rank_of
from estimators.spectral import SpectralSampling
from optimizers.frames import Balanced, Dense, Everything, Frame, TwoSided, Weighted


@dataclass(frozen=True)
class Draw:
    """What a choice may depend on beside G.

    ``names``: one a matrix of the batch; ``index``: number of the draw; ``clock``: steps made before this one; ``turn``: periods before this
    one, the same for all parameters of the group; ``place`` of the first matrix in ``group``, the names of all; ``flipped``: whether
    G is transposed; ``previous``: the last frame; ``moment``: the first moment in it, and ``mean``: the lift of that, bias-corrected, if the basis
    asked for them.
    """

    names: tuple[str, ...]
    seed: int
    index: int
    clock: int
    turn: int
    place: int
    group: tuple[str, ...]
    flipped: bool = False
    previous: Frame | None = None
    moment: Tensor | None = None
    mean: Tensor | None = None

    def each(self, G: Tensor, draw: Callable[[Tensor, torch.Generator], Tensor]) -> Tensor:
        """``draw(G, generator)`` for every matrix of the batch with a generator of its own, stacked as G is."""
        key = lambda name: keyed.generator(self.seed, name, self.index, G.device)  # noqa: E731
        if G.ndim == 2:
            return draw(G, key(self.names[0]))
        return torch.stack([draw(matrix, key(name)) for matrix, name in zip(G, self.names, strict=True)])


@dataclass(frozen=True)
class Basis(abc.ABC):
    """Base. ``rank``: r, or as a fraction in (0, 1) of N; never more than N."""

    rank: int | float = 1.0

    frame: ClassVar[type[Frame]]
    batched: ClassVar[bool] = True  # matrices of one shape can be chosen for together
    needs_mean: ClassVar[bool] = False  # of the gradients, lifted from the moments, when a frame is chosen
    follows: ClassVar[bool] = False  # whether ``follow`` changes anything

    def size(self, N: int) -> int:
        """r for a projected dimension N."""
        return min(N, rank_of(N, self.rank))

    @abc.abstractmethod
    def choose(self, G: Tensor, draw: Draw) -> Frame:
        """The frame for the coming period."""

    def due(self, state: dict[str, Any], clock: int, every: int | None) -> bool:  # noqa: ARG002
        """Whether a new frame is chosen ``clock`` steps after the first."""
        return every is not None and clock % every == 0

    def follow(self, G: Tensor, B: Tensor, frame: Frame, state: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """What changes in the state after a step with ``frame``, in which B is the sketch of G: the frame of the next, where a basis learns at every
        step."""
        return {}


@dataclass(frozen=True)
class Identity(Basis):
    """All of G."""

    frame: ClassVar[type[Frame]] = Everything

    def choose(self, G: Tensor, draw: Draw) -> Frame:  # noqa: ARG002
        return Everything()


@dataclass(frozen=True)
class TopSingular(Basis):
    """``method``: "exact" (SVD), or "randomized": two power iterations from the last V, or from a Gaussian matrix the first time."""

    method: Literal["exact", "randomized"] = "exact"

    frame: ClassVar[type[Frame]] = Dense

    def choose(self, G: Tensor, draw: Draw) -> Frame:
        r = self.size(min(G.shape[-2:]))
        if self.method == "exact":
            return Dense(top_right_singular(G, r))
        if isinstance(draw.previous, Dense):
            start = draw.previous.V
        else:
            start = draw.each(G, lambda X, g: torch.randn(X.shape[-1], r, generator=g, device=X.device, dtype=X.dtype))
        return Dense(directions.power(G, start, steps=2))


@dataclass(frozen=True)
class TwoSingular(Basis):
    """The r leading singular vectors of both sides."""

    frame: ClassVar[type[Frame]] = TwoSided

    def choose(self, G: Tensor, draw: Draw) -> Frame:  # noqa: ARG002
        r = self.size(min(G.shape[-2:]))
        U, _, V = directions.svd(G)
        sign = _sign(V[..., :r])
        return TwoSided((U[..., :r] * sign).contiguous(), (V[..., :r] * sign).contiguous())


def top_right_singular(G: Float[Tensor, "*batch M N"], r: int) -> Float[Tensor, "*batch N r"]:
    """The r leading right singular vectors, each with its entry of largest magnitude positive: a sign that rounding does not change."""
    V = directions.svd(G)[2][..., :r]
    return (V * _sign(V)).contiguous()


def _sign(V: Float[Tensor, "*batch N r"]) -> Float[Tensor, "*batch 1 r"]:
    return torch.where(V.gather(-2, V.abs().argmax(-2, keepdim=True)) < 0, -1.0, 1.0).to(V.dtype)


@dataclass(frozen=True)
class FromLaw(Basis):
    """V from ``law``; ``orthonormal``: c = r/N, which gives laws on the Stiefel manifold orthonormal columns; otherwise E[VVᵀ] = I."""

    law: type[Law] = HaarStiefel
    orthonormal: bool = False

    frame: ClassVar[type[Frame]] = Dense

    def choose(self, G: Tensor, draw: Draw) -> Frame:
        N = G.shape[-1]
        r = self.size(N)
        law = self.law(n=N, rank=r, c=r / N if self.orthonormal else 1.0)
        return Dense(draw.each(G, lambda X, g: law.sample(generator=g, device=X.device, dtype=X.dtype)))


@dataclass(frozen=True)
class Spectral(Basis):
    """r directions drawn among the ``keep`` leading ones of G (None: all; a float: a multiple of r) and a Haar frame of the rest."""

    keep: float | None = 2.0
    floor: float = 0.1
    frame: type[Weighted] = Balanced  # pyright: ignore[reportIncompatibleVariableOverride]  # or Weighted: all of 1/π at the lift

    def choose(self, G: Tensor, draw: Draw) -> Frame:
        N = G.shape[-1]
        r = self.size(N)

        def sample(X: Tensor, generator: torch.Generator) -> Tensor:
            k = min(*X.shape, N if self.keep is None else max(r, round(self.keep * r)))
            known = directions.of_gradient(X, k, generator)
            if not bool(known.sigma[0] > 0):  # a gradient of zeros prefers no direction
                return HaarStiefel(n=N, rank=r).sample(generator=generator, device=X.device, dtype=X.dtype)
            law = SpectralSampling.from_basis(known.Q, known.sigma, known.tail, r, floor=self.floor)
            return law.sample(generator=generator, device=X.device, dtype=X.dtype)

        V = draw.each(G, sample)  # orthogonal columns of squared length 1/π
        length = torch.linalg.vector_norm(V, dim=-2)
        return self.frame(V / length.unsqueeze(-2), length.square())


WEIGHTS: dict[str, type[Weighted]] = {
    "both": Balanced,
    "lift": Weighted,
}  # where 1/π enters: half at sketch and lift each, or all at the lift


@dataclass(frozen=True)
class PowerIteration(Basis):
    """V = orth(bᵀb·V) with b = ρ·mean + (1−ρ)·G; singular vectors of G the first time. ``exact``: the singular vectors of b every time."""

    rho: float = 0.908
    exact: bool = False

    frame: ClassVar[type[Frame]] = Dense
    needs_mean: ClassVar[bool] = True

    def choose(self, G: Tensor, draw: Draw) -> Frame:
        r = self.size(min(G.shape[-2:]))
        if not isinstance(draw.previous, Dense) or draw.mean is None:
            return Dense(top_right_singular(G, r))
        b = self.rho * draw.mean + (1 - self.rho) * G
        return Dense(top_right_singular(b, r) if self.exact else directions.power(b, draw.previous.V))


@dataclass(frozen=True)
class Switch(Basis):
    """``first`` until step ``at`` of training, ``then`` from it on; both must have one kind of frame."""

    first: Basis = TopSingular()
    then: Basis = FromLaw(orthonormal=True)
    at: int = 0

    frame: ClassVar[type[Frame]] = Dense

    def choose(self, G: Tensor, draw: Draw) -> Frame:
        return (self.then if draw.clock >= self.at else self.first).choose(G, draw)
