"""What ``measure`` sums up, draw by draw: the estimates themselves, their squared errors, and the squared errors of means of many.

Here a draw takes one of the equally likely gradients as it comes, with no weights, so that the distribution of the error can be looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from estimators import Estimate, Law, estimate, sketch
from estimators.measure import Running

CHUNK_BYTES = 2**25  # of the V that are drawn at once


def estimates(
    law: Law, gradients: Float[Tensor, "*population m n"], draws: int, *, generator: torch.Generator
) -> Float[Tensor, "draws m n"]:
    """``draws`` independent ĜVVᵀ, Ĝ uniform over the ``gradients`` (N, m, n), or the one there is (m, n)."""
    return estimate(_taken(gradients, draws, generator), _drawn(law, gradients, draws, generator))


def squared_errors(
    law: Law, gradients: Float[Tensor, "*population m n"], draws: int, *, generator: torch.Generator
) -> Float[Tensor, " draws"]:
    """‖ĜVVᵀ − g‖² of every draw, g the mean of the gradients; from sketches, as ``measure`` does, so that many draws fit."""
    g = gradients if gradients.ndim == 2 else gradients.mean(0)
    chunk = max(1, CHUNK_BYTES // (law.n * law.rank * gradients.element_size()))
    found = []
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        Ghat, V = _taken(gradients, size, generator), _drawn(law, gradients, size, generator)
        B = sketch(Ghat, V)
        square = ((B.mT @ B) * (V.mT @ V)).sum((-2, -1))  # ‖ĜVVᵀ‖²
        found.append(square - 2 * (B * sketch(g, V)).sum((-2, -1)) + g.square().sum())
    return torch.cat(found)


def errors_of_means(
    law: Law, gradients: Float[Tensor, "*population m n"], counts: Sequence[int], replicas: int, *, generator: torch.Generator
) -> list[Estimate]:
    """E‖mean of N draws − g‖² for each N of ``counts``, averaged over ``replicas`` independent sequences of max(counts) draws.

    The Ns share their draws within a sequence: each has its own honest standard error, and neighbours are correlated.
    Exactly it is bias² + variance/N. Raises ``ValueError`` for fewer than 2 replicas or a count below 1.
    """
    if replicas < 2 or min(counts) < 1:
        raise ValueError(f"errors_of_means(counts={list(counts)}, replicas={replicas}): needs 2 replicas and counts of at least 1")
    g = gradients if gradients.ndim == 2 else gradients.mean(0)
    places = torch.tensor(counts) - 1
    running = Running()
    for _ in range(replicas):
        means = estimates(law, gradients, max(counts), generator=generator).cumsum(0)[places] / (places + 1)[:, None, None]
        running.update((means - g).square().sum((-2, -1)).unsqueeze(0))
    return running.estimates


def _taken(gradients: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return gradients if gradients.ndim == 2 else gradients[torch.randint(len(gradients), (size,), generator=generator)]


def _drawn(law: Law, gradients: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return law.sample(size, generator=generator, dtype=gradients.dtype)
