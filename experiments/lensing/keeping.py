"""What an estimate keeps of a gradient in tokens: measured over draws, and where theory has it exactly beside that.

Measured only: the leading singular directions of the estimate, matched one to one with those of the gradient; the Jaccard overlap of their top tokens
and the cosine of their scores. With theory beside it, of the whole matrix (ℓ_t the direction of token t, e_t(G) = ‖Gℓ_t‖² its energy):

    signal   Σ_t ⟨Ĝℓ_t, Gℓ_t⟩ / Σ_t e_t(G)       1 in the mean for an unbiased estimate
    energy   Σ_t e_t(Ĝ) / Σ_t e_t(G)              all tokens
    kept     the same over the top tokens of G alone: kept/energy says how much of the estimate is still about them
    cosine   E[signal]/√E[energy], between the scores of Ĝ and of G, every token and output taken together

For layers that write into the residual stream ‖Gᵀℓ_t‖² stands for ‖Gℓ_t‖². Theory: theory/grams.py, through K = Σ_t ℓ_tℓ_tᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from estimators.measure import GROUPS, Running, jackknife
from experiments.lensing.estimates import Estimator
from experiments.lensing.factors import Factors, contributions, gram_factor, leading, oriented
from experiments.lensing.vocabulary import Lens, overlap
from theory.grams import Side

STATISTICS = ("signal", "energy", "kept")  # those with an exact counterpart
CHUNK = 32  # draws in memory at a time
MEASURED = ("overlap", "direction_cosine")


@dataclass(frozen=True)
class Exact:
    """The gradient itself. ``W`` (d, q): its leading directions, oriented; ``tokens`` (q, k) their top tokens; ``top`` (k, d): ℓ_t of the k tokens of
    the largest energy; ``along`` (m, n): with K beside G, so that Σ along·Ĝ = Σ_t⟨Ĝℓ_t, Gℓ_t⟩; ``energy``, ``kept``: its sums over all and over
    these tokens."""

    side: Side
    W: Tensor
    tokens: Tensor
    top: Tensor
    along: Tensor
    energy: float
    kept: float


def exactly(factors: Factors, side: Side, lens: Lens, directions: int, count: int) -> Exact:
    """Of the sum over tokens ΔᵀX; ``directions`` and ``count``: how many leading directions, and tokens of each."""
    H = gram_factor(factors.D.mT, factors.X.mT, side)
    W = oriented(leading(H, directions), contributions(factors.X, factors.D, side))
    energies = lens.energies(H)
    chosen = energies.topk(count).indices
    G = factors.D.mT @ factors.X
    along = G @ lens.K if side == "input" else lens.K @ G
    return Exact(side, W, lens.top(W, count), lens.L[chosen], along, float(energies.sum()), float(energies[chosen].sum()))


def keeps(estimator: Estimator, exact: Exact, lens: Lens, draws: int, generator: torch.Generator) -> dict[str, Any]:
    """One row: means over ``draws``, their standard errors, the exact values, and the top tokens of the leading direction of the first draw."""
    draws = draws if estimator.random else 2
    count = exact.tokens.shape[1]
    sums, cosines, found = [], [], []
    for start in range(0, draws, CHUNK):
        A, C = estimator.draw(min(CHUNK, draws - start), generator)
        H = gram_factor(A, C, exact.side)
        signal = ((exact.along.mT @ A) * C).sum((-2, -1))
        energy, kept = (H * (lens.K @ H)).sum((-2, -1)), (exact.top @ H).square().sum((-2, -1))
        sums.append(torch.stack([signal / exact.energy, energy / exact.energy, kept / exact.kept], dim=1))
        for W in leading(H, exact.W.shape[1]):
            some, likeness = matched(W, exact.W, lens.K)
            found.append(some)
            cosines.append(likeness)
    values, alike = torch.cat(sums), torch.stack(cosines)
    tokens = lens.top(torch.cat(found, 1), count).view(draws, -1, count)
    overlaps = overlap(tokens, exact.tokens) * (alike > 0)
    seen = Running()
    seen.update(torch.cat([values, overlaps.mean(1, keepdim=True), alike.mean(1, keepdim=True)], dim=1))
    row: dict[str, Any] = {"law": estimator.label, "rank": estimator.rank, "draws": draws}
    for name, estimate in zip((*STATISTICS, *MEASURED), seen.estimates, strict=True):
        row |= {name: estimate.value, f"{name}_error": estimate.standard_error}
    groups = torch.stack([group.mean(0) for group in values.tensor_split(min(GROUPS, draws))])
    cosine = jackknife(lambda keep: float(groups[keep, 0].mean() / groups[keep, 1].mean().sqrt()), len(groups))
    row |= {"cosine": cosine.value, "cosine_error": cosine.standard_error if estimator.random else 0.0}
    return row | predicted(estimator, exact, lens) | {"tokens": lens.words(tokens[0, 0])}


def predicted(estimator: Estimator, exact: Exact, lens: Lens) -> dict[str, float]:
    """The exact means of ``STATISTICS``, and the cosine that they make."""
    mean, gram = torch.from_numpy(estimator.mean), torch.from_numpy(estimator.gram)
    signal = float((exact.along * mean).sum()) / exact.energy
    energy = float((lens.K * gram).sum()) / exact.energy
    kept = float(((exact.top @ gram) * exact.top).sum()) / exact.kept
    return {"signal_exact": signal, "energy_exact": energy, "kept_exact": kept, "cosine_exact": signal / energy**0.5}


def matched(W: Tensor, reference: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """(the columns of W that are most like those of ``reference``, one to one and with their sign; the cosines of their scores). One that has no
    partner, because W has fewer columns, is a zero column of cosine 0."""
    length = lambda V: (V * (K @ V)).sum(0).sqrt()  # noqa: E731
    scale = torch.outer(length(W), length(reference)).clamp_min(torch.finfo(W.dtype).tiny)
    cosines = W.mT @ K @ reference / scale
    theirs, ours = linear_sum_assignment(cosines.abs().numpy(), maximize=True)
    found, alike = torch.zeros_like(reference), reference.new_zeros(reference.shape[1])
    signs = torch.where(cosines[theirs, ours] < 0, -1.0, 1.0).to(W.dtype)
    found[:, ours] = W[:, theirs] * signs
    alike[ours] = cosines[theirs, ours].abs()
    return found, alike
