"""A law on the feature axis: of X (T×n) the layer keeps XV (T×r), the gradient ΔᵀX is estimated by (ΔᵀXV)Vᵀ, m×n.

Unbiased because E[VVᵀ | X] = I and Δ does not know V: E[ΔᵀXVVᵀ | X, Δ] = ΔᵀX. V (n×r) is drawn anew in every call and again from its key in
the backward pass, the same in all processes, so that their mean is the estimate of the whole batch. The spectral law, fitted to X,
has E[VVᵀ | X] = HHᵀ with XHHᵀ = X, and saves V too. Biased: ``top_svd``, ``fixed_basis``.
Variance: theory/mse.py ``ipa`` without noise, E‖G(P − I)‖² for G = ΔᵀX: ((n+r+1)/r − 1)‖G‖² for Gaussian V, ((n+r−1)/r − 1)‖G‖² for Rademacher V.
Reference: randomized automatic differentiation, arXiv 2007.10412: Rademacher V, one for the batch. LowRankLinear keeps the same numbers
and stops at ΔᵀXV, the gradient of its B; here W moves in all directions, and the optimizer sees m×n numbers.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from estimators.compressed import Key
from estimators.on_tokens import LawKeeper


class LawOnFeatures(LawKeeper):
    """V (n×r) of ``law`` on the features of X."""

    size = 0  # n, once an X was seen

    def keep(self, X: Float[Tensor, "t n"], key: Key) -> tuple[Tensor, ...]:
        self.size = X.shape[-1]
        generator = key.generator("features", alike=not self.law.fitted)
        if self.law.fitted:
            V = self.sighted(X.mT, generator)
            return X @ V, V
        return (X @ self.blind(self.size).sample(generator=generator, dtype=X.dtype),)

    def gradient(self, kept: tuple[Tensor, ...], D: Float[Tensor, "t m"], key: Key) -> Float[Tensor, "m n"]:
        XV, *saved = kept
        V = saved[0] if saved else self.blind(self.size).sample(generator=key.generator("features", alike=True), dtype=D.dtype)
        return (D.mT @ XV) @ V.mT
