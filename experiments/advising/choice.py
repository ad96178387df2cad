"""The Pareto set of error, peak bytes and seconds, the recommendation, and a rank for every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from estimators import Estimate
from experiments.advising.errors import Layer, over_noise
from theory import allocation

AXES = ("error", "peak_bytes", "seconds")
GRID = 24  # ranks tried in a layer


def pareto(rows: Sequence[dict[str, Any]]) -> list[bool]:
    """Whether no other row is at least as good on all AXES and better on one."""
    points = np.array([[row[axis] for axis in AXES] for row in rows], dtype=np.float64)
    return [not bool(((points <= p).all(1) & (points < p).any(1)).any()) for p in points]


def recommend(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the unbiased ones that fit the budget that of the least error × seconds: what a step's error, averaged over steps, costs in time
    (work-normalised variance, Glynn & Whitt 1992). None if none fits."""
    possible = [row for row in rows if row["unbiased"] and row["fits"]]
    return min(possible, key=lambda row: row["error"] * row["seconds"], default=None)


def growing_bytes(layer: Layer, tokens: int) -> int:
    """What a unit of rank costs: B, its gradient and two moments, V, and XV of the tokens of a step, in float32."""
    return 4 * (4 * layer.m + layer.n + tokens)


def ranks(layers: Sequence[Layer], law: str, uniform: dict[str, int], tokens: int) -> dict[str, int]:
    """A rank for every layer at the bytes of ``uniform``, name → r: the least error all layers together (theory/allocation.py)."""
    mine = [layer for layer in layers if layer.name in uniform]
    choices = [np.unique(np.geomspace(1, layer.largest, GRID).round().astype(int)) for layer in mine]
    choices = [np.union1d(r, [uniform[layer.name]]) for r, layer in zip(choices, mine, strict=True)]
    errors = [np.array([layer.error(law, int(r))[0] for r in possible]) for layer, possible in zip(mine, choices, strict=True)]
    costs = [growing_bytes(layer, tokens) for layer in mine]
    budget = sum(uniform[layer.name] * cost for layer, cost in zip(mine, costs, strict=True))
    return dict(zip([layer.name for layer in mine], allocation.ranks(errors, choices, costs, budget), strict=True))


def error(layers: Sequence[Layer], law: str, ranks: Mapping[str, int]) -> Estimate:
    """Of the layers that ``ranks`` names, together, over that of their mini-batch gradient."""
    mine = [layer for layer in layers if layer.name in ranks]
    return over_noise([layer.error(law, ranks[layer.name]) for layer in mine], [layer.sums.noise for layer in mine])
