"""Bases that select: a part of the identity, of a fixed orthonormal matrix, or of the matrices themselves. G is (*batch, M, N).

``RandomColumns``, ``RandomEntries``   a uniform part (FRUGAL). ``LargestColumns``, ``SampledColumns``   by their norms, the r largest, or drawn with
probabilities that are proportional to them and paid back (Grass). ``AlignedCosines``   the r columns of the DCT matrix that G has most in
(DCT-AdamW, Trion). ``Turns``   whole matrices, or whole layers, by turns (FRUGAL, BAdam, LISA).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from estimators import keyed
from estimators.law import uniform_subset
from optimizers.bases import Basis, Draw
from optimizers.frames import Columns, Cosines, Entries, Frame, ScaledColumns, Whole, dct_matrix


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
        return Cosines(largest(S.abs().sum(-2) if self.norm == "l1" else column_norms(S), self.size(G.shape[-1])))


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
    """``rank`` units of a group, or that share of them, are active in a period, in the ``order`` given, the others not at all. A unit is a
    matrix, or with ``layers`` all that belong to one layer. ``weights``: of the units in a random order, in the order of their appearance."""

    order: Literal["ascending", "descending", "random"] = "descending"
    layers: bool = False
    weights: tuple[float, ...] | None = None

    frame: ClassVar[type[Frame]] = Whole
    batched: ClassVar[bool] = False

    def choose(self, G: Tensor, draw: Draw) -> Frame:  # noqa: ARG002
        return Whole(int(self.active(draw.group, draw.seed, draw.turn)[draw.place]))

    def active(self, group: tuple[str, ...], seed: int, turn: int) -> list[bool]:
        """Which of the matrices called ``group`` have their turn in period ``turn``."""
        of = units(group) if self.layers else list(range(len(group)))
        count = max(of) + 1
        size = self.size(count)
        if self.order == "random":
            generator = keyed.generator(seed, "turns", turn)
            weights = torch.ones(count) if self.weights is None else torch.tensor(self.weights)
            if len(weights) != count:
                raise ValueError(f"Turns(weights={self.weights}): {count} layers or matrices have turns")
            chosen = set(weights.double().multinomial(size, generator=generator).tolist())
        else:
            places = {at % count for at in range(turn * size, (turn + 1) * size)}
            chosen = places if self.order == "ascending" else {count - 1 - place for place in places}
        return [unit in chosen for unit in of]


def units(group: tuple[str, ...]) -> list[int]:
    """The layer of every parameter by its name: numbered by first appearance of what stands before and at the first number in the name
    (``model.layers.3.mlp.up_proj.weight`` and ``model.layers.3.self_attn.q_proj.weight`` are one); a name without a number is its own."""
    stems = []
    for name in group:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        stems.append(name if number is None else ".".join(parts[: number + 1]))
    order = {stem: place for place, stem in enumerate(dict.fromkeys(stems))}
    return [order[stem] for stem in stems]
