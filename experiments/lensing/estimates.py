"""The estimators as they enter the comparison: draws in factored form, Ĝ = ACᵀ with r columns each, and their exact moments.

``LAW``: on the features, ĜVVᵀ; a fitted law knows this very gradient (GᵀG). ``tokens:LAW``: on the tokens, Δᵀ(VVᵀ)X; of the coordinate laws
r tokens. ``wta_crs``: r tokens with p_j ∝ ‖x_j‖·‖δ_j‖, as if the errors were remembered of a visit to the same weights. Of T tokens at most T count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from estimators import LAWS, wta_crs
from estimators.law import Law, Spectrum
from estimators.sketch import sketch
from estimators.truncated import FixedBasis
from experiments.lensing.factors import Factors
from experiments.validation.checks import exact
from theory import grams
from theory import wta_crs as theory_of_wta_crs
from theory.grams import Side

ON_TOKENS = [f"tokens:{name}" for name, law in LAWS.items() if not law.fitted]
KNOWN = [*LAWS, *ON_TOKENS, "wta_crs"]


@dataclass(frozen=True)
class Estimator:
    """``draw(count, generator)``: (A, C) of as many estimates, (count, m, k) and (count, n, k); ``mean``: E[Ĝ] (m, n); ``gram``: E[ĜᵀĜ] or E[ĜĜᵀ]
    of the side it was made for; ``random``: whether two draws may differ."""

    label: str
    rank: int
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    mean: np.ndarray
    gram: np.ndarray
    random: bool


def estimator(label: str, factors: Factors, spectrum: Spectrum, rank: int, side: Side) -> Estimator:
    """The estimator called ``label`` of one gradient. ``spectrum``: of GᵀG; ``rank``: r ≤ n, and at most T of it on the tokens."""
    X, D, G = factors.X, factors.D, factors.D.mT @ factors.X
    delta, inputs = (t.numpy() for t in ((D, X) if side == "input" else (X, D)))
    kind, _, name = label.rpartition(":")
    if name != "wta_crs" and kind != "tokens":
        law = LAWS[name].from_second_moment(spectrum, rank)
        truth = exact(law)

        def of_features(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            V = law.sample(count, generator=generator, dtype=G.dtype)
            return sketch(G, V), V

        gradient = G.numpy()
        return Estimator(label, rank, of_features, gradient @ truth.mean, grams.features(truth, gradient, side), _random(law))
    rank = min(rank, len(X))
    if kind == "tokens":
        law = LAWS[name](n=len(X), rank=rank)
        truth = exact(law)

        def of_tokens(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            V = law.sample(count, generator=generator, dtype=G.dtype)
            return D.mT @ V, X.mT @ V

        return Estimator(label, rank, of_tokens, D.numpy().T @ truth.mean @ X.numpy(), grams.tokens(truth, delta, inputs), _random(law))
    p = X.norm(dim=1) * D.norm(dim=1)
    p = p / p.sum()
    winners = int(wta_crs.split(p, rank)[1])

    def of_winners(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = [wta_crs.sample(p, rank, torch.rand(rank, generator=generator, dtype=torch.float64)) for _ in range(count)]
        J, w = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        return (D[J] * w.unsqueeze(-1)).mT, X[J].mT

    gram = theory_of_wta_crs.second_moment(delta, inputs, p.numpy(), rank, winners)
    return Estimator(label, rank, of_winners, G.numpy(), gram, rank < len(X))


def _random(law: Law) -> bool:
    return not isinstance(law, FixedBasis)
