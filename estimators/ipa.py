"""IPA, the backprop estimator: the exact derivative of the loss along the subspace, ∂/∂B F(W + BVᵀ) at B = 0, which is ĜV.

Unbiased up to c because its lift is ĜVVᵀ and E[VVᵀ] = cI, V independent of Ĝ. It needs r columns of the gradient, never all n:
a layer that only wants the sketch need only keep XV. Variance: theory/mse.py ``ipa``.
Reference: LowRank-IPA, arXiv 2603.20632.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from estimators.law import check_finite
from estimators.sketch import lift


def ipa(loss: Callable[[Tensor], Tensor], W: Float[Tensor, "m n"], V: Float[Tensor, "*batch n r"]) -> Float[Tensor, "*batch m r"]:
    """The sketch ĜV of the gradient of ``loss`` at W, by automatic differentiation through B.

    ``loss`` maps weights (*batch, m, n) to values (*batch). Raises ``ValueError`` when W and V do not fit or W is not finite.
    """
    if W.ndim != 2 or V.ndim < 2 or W.shape[-1] != V.shape[-2]:
        raise ValueError(f"ipa(W={tuple(W.shape)}, V={tuple(V.shape)}): W must be (m, n) and V (*, n, r)")
    check_finite("ipa", "W", W)
    B = torch.zeros(*V.shape[:-2], W.shape[0], V.shape[-1], dtype=V.dtype, device=V.device, requires_grad=True)
    with torch.enable_grad():
        (sketched,) = torch.autograd.grad(loss(W.detach() + lift(B, V)).sum(), B)
    return sketched
