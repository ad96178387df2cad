"""LOMO: gradient descent inside the backward pass, where each gradient is used as soon as it is complete and then freed (arXiv 2306.09782).

    W ← (1 − ηλ)W − ηG

Unbiased: nothing happens to G. State: none. What is saved is moments and gradients: with ``per_layer`` (optimizers/per_layer.py) the gradient of one
parameter is alive at a time, and clipping by the norm of all of them takes two backward passes. ``optimizer.step()`` after an ordinary backward pass
gives the same weights. Arithmetic is float32 beside 16-bit weights, which ``rounding="stochastic"`` keeps from standing still.

The rule is that of every tensor of a group with a ``rank``, matrix or not; a group with ``rank=None`` is AdamW as everywhere here, so that embeddings
and norms of a comparison are trained alike under every method. A whole model by one rule: ``LOMO(model.named_parameters())``.

Differs from the published code: weights are never held in another precision than the model's, loss scaling of float16 is the caller's, elements are
not clipped by value, and a gradient that is not finite is refused in the place of skipping the step.
"""

from __future__ import annotations

from typing import Any

from optimizers.bases import Identity
from optimizers.inner import Plain
from optimizers.subspace import Params, Rule, Subspace


class LOMO(Subspace):
    """See the module docstring. ``rank``, of which nothing is read, says which groups are trained by the rule; all by default."""

    fused = True
    any_shape = True

    def __init__(self, params: Params, lr: float = 1e-3, *, rank: int | float | None = 1, seed: int = 0, **options: Any) -> None:
        super().__init__(params, lr, {"rank": rank}, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:  # noqa: ARG002
        return Rule(basis=Identity(), side="right", inner=Plain())
