"""LowRank-LR: zeroth order in a random low-rank subspace that is held for K steps (arXiv 2603.20632).

    every K steps: V (n×r) by the law, E[VVᵀ] = cI;   Z (m×r) standard normal;   δ from F at W ± εZVᵀ;   W ← (1 − ηλ)W − η·δZVᵀ

Unbiased up to c and the ε² of the difference: E[δZ | V] = ∇F·V, whose lift has mean c∇F. At c = 1 a low rank does not reduce the second moment of one
query, (n/r)(mr+2)‖g‖² for Haar–Stiefel against (mn+2)‖g‖² of MeZO: what it gives is mr + nr random numbers in the place of mn, averages inside one
subspace over K steps, and with c = r/n a shrunk estimate. Its variance is stated in theory/mse.py, ``lr``. State: none; with momentum mr elements.

Any law of ``LAWS`` that does not look at gradients; V stands on the columns (in-features). Vectors get whole directions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from estimators import LAWS
from optimizers.zeroth import Directions, ZerothOrder


class LowRankLR(ZerothOrder):
    """See the module docstring. ``law``; ``rank``: r, or a fraction in (0, 1) of the smaller side; ``every``: K in steps; ``c``; more options of the
    law by their names. Raises ``ValueError`` for a law that is fitted to gradients, of which there are none here."""

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-6,
        *,
        law: str = "haar_stiefel",
        rank: int | float = 4,
        every: int = 50,
        c: float = 1.0,
        law_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if law not in LAWS or LAWS[law].fitted:
            known = ", ".join(name for name, kind in LAWS.items() if not kind.fitted)
            raise ValueError(f"LowRankLR(law={law!r}): forward passes show no gradient to fit a law to; known are {known}")
        if every < 1:
            raise ValueError(f"LowRankLR(every={every}): must be at least 1")
        own = {"law": law, "rank": rank, "every": every, "c": c, "law_options": law_options or {}}
        super().__init__(model, lr, own, **options)

    def directions(self, group: dict[str, Any]) -> Directions:
        law = partial(LAWS[group["law"]], c=group["c"], **group["law_options"])
        return Directions(right=law, rank=group["rank"], every=group["every"])
