"""Token-axis estimator: Δᵀ(VVᵀ)X for the weight gradient ΔᵀX of a linear layer, with V drawn on the T tokens.

Unbiased up to c because E[VVᵀ] = cI on the token axis. Needs r mixtures of tokens instead of all T; column-row sampling is the
coordinate law. Variance: theory/mse.py ``tokens``, through the full map E[P·ΔΔᵀ·P].
Reference: Drineas, Kannan & Mahoney (2006); RAD, arXiv 2007.10412.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from estimators.law import check_finite


def tokens(
    delta: Float[Tensor, "*batch t m"], inputs: Float[Tensor, "*batch2 t n"], V: Float[Tensor, "*batch3 t r"]
) -> Float[Tensor, "*batch4 m n"]:
    """(VᵀΔ)ᵀ(VᵀX), m×n. ``delta`` Δ: (*, T, m) error signal; ``inputs`` X: (*, T, n). Raises ``ValueError`` when T differs or
    an entry is not finite.
    """
    if not delta.shape[-2] == inputs.shape[-2] == V.shape[-2]:
        raise ValueError(
            f"tokens(delta={tuple(delta.shape)}, inputs={tuple(inputs.shape)}, V={tuple(V.shape)}): all need the same number of tokens"
        )
    check_finite("tokens", "delta", delta)
    check_finite("tokens", "inputs", inputs)
    return (V.mT @ delta).mT @ (V.mT @ inputs)
