"""BAdam: one block of layers after the other, K steps of Adam each (arXiv 2404.02827).

    every K steps: the next layer in the order, or a random one;   Adam on its matrices, whose moments begin anew; the others stand still

Block coordinate descent: every gradient is exact in its block and absent elsewhere, biased in a period; over the turns of all blocks its mean is the
gradient over the number of blocks, a factor that Adam does not see. Groups without rank, embeddings and head, always train. State: 2mn elements for
one of L layers, 2mn/L on average; with ``freeze`` gradients as well.

``order``: "descending" as published, "ascending", or "random", independent draws. Differs from the published code: no float32 copy of the block's
16-bit weights (``rounding="stochastic"`` protects them), a random order draws anew, as LISA's does, instead of reshuffling, embeddings and head are
not left out, and the first turn is as long as the others, there a step shorter.
"""

from __future__ import annotations

from typing import Any

from optimizers.bases import Identity
from optimizers.sampling import LayerSampling
from optimizers.subspace import Params, Rule


class BAdam(LayerSampling):
    """See the module docstring. ``layers`` in a block, a number or a share; ``every``: K in steps; ``freeze``: ``LayerSampling``. ``rank`` says
    which groups are matrices of layers."""

    choices = {"order": ("descending", "ascending", "random")}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        rank: int | float | None = 1,
        layers: int | float = 1,
        every: int = 50,
        order: str = "descending",
        freeze: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = {"rank": rank, "layers": layers, "every": every, "order": order, "freeze": freeze}
        super().__init__(params, lr, own, seed=seed, **options)

    def order(self, group: dict[str, Any]) -> tuple[Any, Any]:
        return group["order"], None

    def rule(self, group: dict[str, Any]) -> Rule:
        return Rule(basis=Identity(), side="right", inner=self.adam(group))
