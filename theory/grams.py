"""E[ĜᵀĜ] and E[ĜĜᵀ] of an estimate Ĝ of one gradient G = ΔᵀX: direction by direction what theory/mse.py says of their traces.

Along a direction ℓ of the inputs E‖Ĝℓ‖² = ℓᵀE[ĜᵀĜ]ℓ, along one of the outputs E‖Ĝᵀℓ‖² = ℓᵀE[ĜĜᵀ]ℓ. Proof, P = VVᵀ:

    on the features, Ĝ = GP      E[ĜᵀĜ] = E[P·GᵀG·P]           E[ĜĜᵀ] = G·E[P²]·Gᵀ
    on the tokens, Ĝ = ΔᵀPX      E[ĜᵀĜ] = Xᵀ·E[P·ΔΔᵀ·P]·X      E[ĜĜᵀ] = Δᵀ·E[P·XXᵀ·P]·Δ

So a law with E[P²] = c²(n/r)I on the features multiplies every direction of the outputs by the same number, while among those of the inputs it
spreads tr(GᵀG): at Haar–Stiefel every ℓ gets (cn/r)²β‖ℓ‖²‖G‖². WTA-CRS: ``wta_crs.second_moment``. Units: squared gradient.
Source: the second-moment maps of arXiv 2603.20632; the four lines derived here.
"""

from __future__ import annotations

from typing import Literal

from numpy.typing import ArrayLike

from theory.arguments import Array, matrix
from theory.moments import Moments

Side = Literal["input", "output"]


def features(law: Moments, gradient: ArrayLike, side: Side) -> Array:
    """E[ĜᵀĜ] (n×n, side input) or E[ĜĜᵀ] (m×m, side output) of GP; ``gradient``: G (m, n). Raises ``ValueError`` unless the law is on n."""
    G = matrix("grams.features", "gradient", gradient)
    if G.shape[-1] != law.n:
        raise ValueError(f"grams.features(n={law.n}): gradient {G.shape} must have n columns")
    return law.second_moment(G.T @ G) if side == "input" else G @ law.square @ G.T


def tokens(law: Moments, delta: ArrayLike, inputs: ArrayLike) -> Array:
    """E[ĜᵀĜ] (n×n) of ΔᵀPX; E[ĜĜᵀ] with ``delta`` Δ (T, m) and ``inputs`` X (T, n) exchanged. Raises ``ValueError`` unless the law is on T."""
    delta, inputs = matrix("grams.tokens", "delta", delta), matrix("grams.tokens", "inputs", inputs)
    if delta.shape[0] != law.n or inputs.shape[0] != law.n:
        raise ValueError(f"grams.tokens(n={law.n}): delta {delta.shape} and inputs {inputs.shape} must have n rows (tokens)")
    return inputs.T @ law.second_moment(delta @ delta.T) @ inputs
