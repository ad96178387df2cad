"""LISA: embeddings and head always, and a few random layers by turns, by AdamW (arXiv 2403.17919).

    every K steps: γ of the L layers, uniformly without replacement;   AdamW on their matrices, whose moments begin anew; the others stand still

Biased in a period, unbiased up to γ/L in the choice of layers: E over periods of the gradient that is used is (γ/L)·G, a factor that AdamW does not
see; its variance is that of a matrix that is there with probability p = γ/L, p(1 − p)‖G‖². State: 2mn elements while a layer has its turn, 2mn·γ/L on
average; with ``freeze`` gradients as well.

Which parameters are always trained is the caller's: groups without rank (``split_parameters``). Differs from the published code: that only switches
``requires_grad`` and keeps the moments of layers that have had their turn.
"""

from __future__ import annotations

from typing import Any

from optimizers.bases import Identity
from optimizers.sampling import LayerSampling
from optimizers.subspace import Params, Rule


class LISA(LayerSampling):
    """See the module docstring. ``layers``: γ, a number or a share; ``every``: K in steps; ``freeze``: ``LayerSampling``. ``rank`` says which
    groups are matrices of layers."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        rank: int | float | None = 1,
        layers: int | float = 2,
        every: int = 20,
        freeze: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, {"rank": rank, "layers": layers, "every": every, "freeze": freeze}, seed=seed, **options)

    def order(self, group: dict[str, Any]) -> tuple[Any, Any]:  # noqa: ARG002
        return "random", None

    def rule(self, group: dict[str, Any]) -> Rule:
        return Rule(basis=Identity(), side="right", inner=self.adam(group))
