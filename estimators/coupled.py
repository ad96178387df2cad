"""Bilinear pairs trained together: a factor that has vanished beside its partner is not made smaller by a step, so that the partner can still learn.

W = Σⱼ xⱼaⱼᵀ, column j of X (m×r) with column j of A (n×r), L(W) with ∂L/∂W = G. Where ‖xⱼ‖ < α‖aⱼ‖ (*vanished*) the partner's gradient Gᵀxⱼ is small
whatever G is; a step that shrinks xⱼ further ends what aⱼ could learn, at xⱼ = 0 for ever if there is a penalty on X (theory/coupled.py). So there

    x̂ⱼ = xⱼ⁺ + βⱼxⱼ,    βⱼ = max(0, −⟨xⱼ, xⱼ⁺ − xⱼ⟩)/‖xⱼ‖²,    xⱼ⁺ the optimizer's step;

elsewhere, and where the step does not shrink xⱼ, x̂ⱼ = xⱼ⁺ to the last bit. For gradient descent βⱼ = η·max(0, ⟨aⱼ, ∂L/∂aⱼ⟩)/‖xⱼ‖²: it comes from the
coupled gradient, because ⟨xⱼ, Gaⱼ⟩ = ⟨aⱼ, Gᵀxⱼ⟩. At xⱼ = 0 there is nothing to correct: with ``lift_every=1`` B is zero before every step, and
the pair (B, V) is trained as without.

Biased as the step itself. It costs what it keeps: a component that ought to vanish cannot, it only turns. State: none between steps.
Reference: cogradient descent (CoGD, 2006.09142), whose projection x⁺ + β∘x this is, active where one factor has vanished and the other has not.
Differs from it: β is derived here, and the optimizer is any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Pairs = Callable[[], Sequence[tuple[Tensor, Tensor]]]


@torch.no_grad()
def coupled(old: Float[Tensor, "m r"], new: Float[Tensor, "m r"], partner: Float[Tensor, "n r"], threshold: float) -> Float[Tensor, "m r"]:
    """X̂ for a step from ``old`` to ``new`` beside A = ``partner``; ``threshold``: α. In float32 or better, then in the dtype of ``new``."""
    exact = torch.promote_types(new.dtype, torch.float32)
    x, step, a = old.to(exact), new.to(exact) - old.to(exact), partner.to(exact)
    square = x.square().sum(0)
    shrinks = -(x * step).sum(0)
    active = (square < threshold**2 * a.square().sum(0)) & (shrinks > 0) & (square > 0)
    beta = torch.where(active, shrinks / square, torch.zeros_like(square))
    return torch.where(active, (new.to(exact) + beta * x).to(new.dtype), new)


class Coupling:
    """``coupled`` on both sides of every pair, after each step of ``optimizer``, for whatever of them it trains.

    ``pairs()`` gives (X, A) of shapes (m, r) and (n, r), views of the parameters themselves, or of a V that nothing trains; ``threshold``: α > 0.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, pairs: Pairs, threshold: float) -> None:
        if not 0 < threshold < float("inf"):
            raise ValueError(f"Coupling(threshold={threshold}): must be positive and finite")
        self.pairs, self.threshold = pairs, threshold
        self._before: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        optimizer.register_step_pre_hook(self._remember)
        optimizer.register_step_post_hook(self._correct)

    def _remember(self, *_: Any) -> None:
        with torch.enable_grad():  # without it a view of a parameter does not say that it is trained
            self._before = [(X, X.detach().clone(), A, A.detach().clone()) for X, A in self.pairs()]

    @torch.no_grad()
    def _correct(self, *_: Any) -> None:
        for X, x, A, a in self._before:
            X.copy_(coupled(x, X, a, self.threshold))
            if A.requires_grad:
                A.copy_(coupled(a, A, x, self.threshold))
        self._before = []
