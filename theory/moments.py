"""A law as theory sees it: the two exact moments of P = VVᵀ, bound to one size, rank, scale and set of parameters.

Everything else in theory/ (mse, optimal, dynamics) takes such a pair and nothing more, so it holds for every law at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np

from theory.arguments import Array

STEMS = (
    "gaussian",
    "rademacher",
    "sparse_sign",
    "haar_stiefel",
    "coordinate",
    "subsampled_transform",
    "spectral",
    "truncated",
)


ISOTROPY = 1e-5  # relative departure of E[P] from cI that a basis orthonormal in float32 may cause


@dataclass(frozen=True, kw_only=True)
class Moments:
    """E[P], the map M ↦ E[PMP] and E[tr(P)P] of one law in dimension n, as float64 arrays."""

    n: int
    rank: int
    c: float
    centred: bool  # E[V] = 0
    mean: Array  # (n, n)
    second_moment: Callable[[Array], Array]  # symmetric (*batch, n, n) → (*batch, n, n)
    trace_weighted_mean: Callable[[], Array]  # → (n, n)

    @cached_property
    def square(self) -> Array:
        """E[P²], shape (n, n)."""
        return self.second_moment(np.eye(self.n))

    @cached_property
    def unbiased(self) -> bool:
        """Whether E[P] = cI, to the rounding of a float32 basis."""
        return bool(np.abs(self.mean - self.c * np.eye(self.n)).max() < ISOTROPY * self.c)


def moments(stem: str, n: int, rank: int, c: float = 1.0, **parameters: Any) -> Moments:
    """The moments of the law whose module in theory/ is ``stem``; ``parameters`` are that module's own keywords.

    >>> float(moments("haar_stiefel", n=8, rank=2).square[0, 0])
    4.0
    """
    if stem not in STEMS:
        raise ValueError(f"moments({stem!r}): known laws are {', '.join(STEMS)}")
    law = import_module(f"theory.{stem}")
    return Moments(
        n=n,
        rank=rank,
        c=c,
        centred=law.CENTRED,
        mean=law.mean(n, rank, c, **parameters),
        second_moment=lambda M: law.second_moment(M, rank, c, **parameters),
        trace_weighted_mean=lambda: law.trace_weighted_mean(n, rank, c, **parameters),
    )
