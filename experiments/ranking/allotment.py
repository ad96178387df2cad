"""A rank for every layer at one budget: uniform, by the spectra of the weights, or by the error of the gradient estimate.

For training a unit of rank costs the bytes that grow with it (``choice.growing_bytes``), and the budget is what uniform ranks cost:

    uniform     r of every layer, or the same fraction of every n
    weights     one threshold on the normalised singular values of the weights (theory/truncation.py)
    gradients   the least error E‖ĜVVᵀ − g‖² of all layers together (theory/allocation.py)

For export it costs m + n numbers, and the third choice is ``least_error``, of the least ‖W − W_r‖² together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from estimators.selection import rank_of
from experiments.advising import choice
from experiments.ranking.spectra import Moment
from theory import allocation, truncation

Ranks = dict[str, int]
TRAINING = ("uniform", "weights", "gradients")
EXPORT = ("uniform", "weights", "least_error")


def for_training(now: Moment, law: str, rank: int | float, tokens: int) -> dict[str, Ranks]:
    """Choice → layer → r, at the bytes of ``rank`` in every layer. ``tokens``: of a step. Raises ``ValueError`` where a layer cannot have it."""
    uniform = {layer.name: rank_of(layer.n, rank) for layer in now.layers}
    for layer in now.layers:
        if uniform[layer.name] >= layer.smaller:
            raise ValueError(f"rank={rank} is not below min(m, n)={layer.smaller} of {layer.name}")
    costs = [choice.growing_bytes(layer, tokens) for layer in now.layers]
    budget = float(sum(uniform[layer.name] * cost for layer, cost in zip(now.layers, costs, strict=True)))
    largest = [layer.smaller - 1 for layer in now.layers]
    weights = truncation.ranks([now.weights[layer.name] for layer in now.layers], costs, budget, largest)
    gradients = choice.ranks(now.layers, law, uniform, tokens)
    return {"uniform": uniform, "weights": dict(zip(uniform, weights, strict=True)), "gradients": gradients}


def budget_rows(task: str, now: Moment, law: str, found: Mapping[str, Ranks], tokens: int) -> list[dict[str, Any]]:
    """``budget``: bytes and predicted error of every choice, over that of the mini-batch gradient; ``rank``: its r, layer by layer."""
    rows: list[dict[str, Any]] = []
    for by, ranks in found.items():
        error = choice.error(now.layers, law, ranks)
        spent = sum(ranks[layer.name] * choice.growing_bytes(layer, tokens) for layer in now.layers)
        rows.append({"kind": "budget", "task": task, "by": by, "bytes": spent, "error": error.value, "error_se": error.standard_error})
    for name, (m, n) in now.shapes.items():
        rows.append({"kind": "rank", "task": task, "layer": name, "m": m, "n": n} | {by: ranks[name] for by, ranks in found.items()})
    return rows


def for_export(singular: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, int]], reduction: float) -> dict[str, Ranks]:
    """Choice → layer → r, at the numbers Σ r(m+n) of the ranks (1 − ``reduction``)·min(m, n). ``singular``: of the weights."""
    uniform = {name: max(1, round((1 - reduction) * min(shape))) for name, shape in shapes.items()}
    costs = [float(sum(shapes[name])) for name in uniform]
    budget = sum(r * cost for r, cost in zip(uniform.values(), costs, strict=True))
    spectra = [singular[name] for name in uniform]
    weights = truncation.ranks(spectra, costs, budget)
    choices = [np.arange(1, len(s) + 1) for s in spectra]
    least = allocation.ranks([truncation.tails(s) for s in spectra], choices, costs, budget)
    return {"uniform": uniform, "weights": dict(zip(uniform, weights, strict=True)), "least_error": dict(zip(uniform, least, strict=True))}
