"""BAdam: one block of layers after the other, K steps of Adam each (arXiv 2404.02827).

    every K steps: the next layer in the order, or a random one;   Adam on its matrices, whose moments begin anew; the others stand still

Block coordinate descent: every gradient is exact in its block and absent elsewhere. State: 2mn elements for one of L layers, 2mn/L on average; with
``freeze`` gradients as well.

``order``: "descending" as published, "ascending", or "random", independent draws. Differs from the published code: no float32 copy of the
block's 16-bit weights (``rounding="stochastic"`` protects them), and a random order draws anew instead of reshuffling.
"""

from __future__ import annotations

from typing import Any, Literal

from optimizers.sampling import LayerSampling
from optimizers.selections import Turns
from optimizers.subspace import Params, Rule
from optimizers.transports import Reset


class BAdam(LayerSampling):
    """See the module docstring. ``rank``: layers in a block; ``every``: K in steps; ``freeze``: ``LayerSampling``."""

    choices = {"order": ("descending", "ascending", "random")}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        rank: int | float | None = 1,
        every: int = 50,
        order: Literal["descending", "ascending", "random"] = "descending",
        freeze: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, {"rank": rank, "every": every, "order": order, "freeze": freeze}, seed=seed, **options)

    def turns(self, group: dict[str, Any]) -> Turns:
        return Turns(group["rank"], group["order"], layers=True)

    def rule(self, group: dict[str, Any]) -> Rule:
        return Rule(basis=self.turns(group), every=group["every"], side="right", inner=self.adam(group), transport=Reset())
