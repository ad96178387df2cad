"""Synthetic gradient populations with a chosen shape, spectrum and noise level."""

from __future__ import annotations

import torch
from torch import Tensor

from estimators import keyed
from estimators.haar_stiefel import householder_qr

POPULATION = 8  # equally likely gradients

SPECTRA = {
    "flat": lambda k: torch.ones_like(k),
    "power": lambda k: 1 / k,  # s_k = 1/k
    "exponential": lambda k: 0.6 ** (k - 1),
    "low_rank": lambda k: (k <= 3).double(),  # exactly three directions carry the signal
}


def shape_of(text: str) -> tuple[int, int]:
    """(m, n) from "12x20". Raises ``ValueError`` for anything else."""
    rows, cross, columns = text.partition("x")
    if not (cross and rows.isdigit() and columns.isdigit() and int(rows) and int(columns)):
        raise ValueError(f"shape {text!r} is not of the form ROWSxCOLUMNS, such as 12x20")
    return int(rows), int(columns)


def gradients(shape: str, spectrum: str, noise: float, seed: int) -> Tensor:
    """(8, m, n) float64 gradients: mean g with singular values ``spectrum`` and ‖g‖ = 1, noise with tr Σ_ξ = ``noise`` exactly.

    The noise has the same decay along its own random directions, so S is not aligned with g.
    """
    m, n = shape_of(shape)
    generator = keyed.generator(seed, f"gradients {shape} {spectrum}", 0)
    k = min(m, n)
    values = SPECTRA[spectrum](torch.arange(1, k + 1, dtype=torch.float64))

    def frame(rows: int) -> Tensor:
        return householder_qr(torch.randn(rows, k, generator=generator, dtype=torch.float64))

    g = (frame(m) * values) @ frame(n).mT
    g = g / g.norm()
    raw = torch.randn(POPULATION, m, k, generator=generator, dtype=torch.float64) * values @ frame(n).mT
    raw = raw - raw.mean(0)
    spread = raw.square().sum() / POPULATION
    return g + raw * (noise / spread).sqrt()
