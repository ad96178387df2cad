"""Bases that select: a part of the identity, of a fixed orthonormal matrix, or of the matrices themselves. G is (*batch, M, N).

``RandomColumns``, ``RandomEntries``   a uniform part (FRUGAL). ``LargestColumns``, ``SampledColumns``   by their norms, the r largest, or drawn with
probabilities that are proportional to them and paid back (Grass). ``AlignedCosines``   the r columns of the DCT matrix that G has most in
(DCT-AdamW, Trion). ``Turns``   whole matrices by turns (FRUGAL); whole layers: ``sampling``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from estimators import keyed
from estimators.law import uniform_subset
from optimizers.bases import Basis, Draw
from optimizers.frames import Columns, Cosines, Entries, Frame, ScaledColumns, Whole, dct_matrix

Order = Literal["ascending", "descending", "random"]


@dataclass(frozen=True)
class RandomColumns(Basis):
    """A uniform subset of r columns."""

    frame: ClassVar[type[Frame]] = Columns

    def choose(self, G: Tensor, draw: Draw) -> Frame:
        N = G.shape[-1]
        return Columns(draw.each(G, lambda X, g: uniform_subset(N, self.size(N), (), g, X.device)))


@dataclass(frozen=True)
class RandomEntries(Basis):
    """A uniform subset of the entries: ``rank`` is their share, or their number."""

    frame: ClassVar[type[Frame]] = Entries

    def choose(self, G: Tensor, draw: Draw) -> Frame:
        count = G.shape[-2] * G.shape[-1]
        return Entries(draw.each(G, lambda X, g: uniform_subset(count, self.size(count), (), g, X.device)))


@dataclass(frozen=True)
class LargestColumns(Basis):
    """The r columns of largest norm, as they are."""

    frame: ClassVar[type[Frame]] = ScaledColumns

    def choose(self, G: Tensor, draw: Draw) -> Frame:  # noqa: ARG002
        J = largest(column_norms(G), self.size(G.shape[-1]))
        return ScaledColumns(J, torch.ones(J.shape, dtype=G.dtype, device=G.device))


@dataclass(frozen=True)
class SampledColumns(Basis):
    """r independent draws with probabilities q proportional to the norms, scaled by ρ = 1/√(rq): E[VVᵀ] = I."""

    frame: ClassVar[type[Frame]] = ScaledColumns

    def choose(self, G: Tensor, draw: Draw) -> Frame:
        r = self.size(G.shape[-1])

        def sample(X: Tensor, generator: torch.Generator) -> Tensor:
            return probabilities(X).multinomial(r, replacement=True, generator=generator)

        J = draw.each(G, sample)
        return ScaledColumns(J, (r * probabilities(G).gather(-1, J)).rsqrt())


@dataclass(frozen=True)
class AlignedCosines(Basis):
    """The r columns of the orthonormal DCT matrix C whose products with G are largest in the ``norm`` named; by "l2" the least is lost."""

    norm: Literal["l1", "l2"] = "l1"

    frame: ClassVar[type[Frame]] = Cosines

    def choose(self, G: Tensor, draw: Draw) -> Frame:  # noqa: ARG002
        S = G @ dct_matrix(G.shape[-1], G.dtype, G.device)
        J = largest(S.abs().sum(-2) if self.norm == "l1" else column_norms(S), self.size(G.shape[-1]))
        return Cosines(J, product=(G, S))


def column_norms(G: Tensor) -> Tensor:
    """(*batch, N)."""
    return torch.linalg.vector_norm(G, dim=-2)


def probabilities(G: Tensor) -> Tensor:
    """Of every column (*batch, N), proportional to its norm; equal ones for a gradient of zeros."""
    norms = column_norms(G)
    total = norms.sum(-1, keepdim=True)
    return torch.where(total > 0, norms / total.clamp_min(torch.finfo(G.dtype).tiny), 1 / G.shape[-1])


def largest(values: Tensor, r: int) -> Tensor:
    """Places of the r largest of the last dimension, in ascending order: one that the values do not change."""
    return values.topk(r, dim=-1).indices.sort(-1).values


@dataclass(frozen=True)
class Turns(Basis):
    """``rank`` matrices of a group, or that share of them, are active in a period, in the ``order`` given, the others not at all."""

    order: Order = "descending"

    frame: ClassVar[type[Frame]] = Whole
    batched: ClassVar[bool] = False

    def choose(self, G: Tensor, draw: Draw) -> Frame:  # noqa: ARG002
        count = len(draw.group)
        return Whole(int(draw.place in in_turn(count, self.size(count), self.order, draw.seed, draw.turn)))


def in_turn(count: int, size: int, order: Order, seed: int, turn: int, weights: Sequence[float] | None = None) -> set[int]:
    """Which ``size`` of ``count`` have their turn in period ``turn``: the next ones of the order, or a random subset, drawn one after the other
    with probabilities proportional to ``weights``. Raises ``ValueError`` for weights of another number."""
    if order == "random":
        chances = torch.ones(count) if weights is None else torch.tensor(weights)
        if len(chances) != count:
            raise ValueError(f"in_turn(weights={weights}): there are {count} of them")
        if not bool((chances >= 0).all() and chances.isfinite().all()) or int((chances > 0).sum()) < size:
            raise ValueError(f"in_turn(weights={weights}): must be finite and not negative, and {size} of them positive")
        return set(chances.double().multinomial(size, generator=keyed.generator(seed, "turns", turn)).tolist())
    places = {at % count for at in range(turn * size, (turn + 1) * size)}
    return places if order == "ascending" else {count - 1 - place for place in places}
