"""Muon: momentum whose singular values are all brought to one (Jordan et al. 2024; at scale arXiv 2502.16982; the rule of torch.optim.Muon).

    M ← βM + (1−β)G;   U = (1−β)G + βM with Nesterov's momentum, else M
    W ← (1 − ηλ)W − η·f(m, n)·NS₅(U)

Full-rank: the frame is all of G. Unbiased up to NS, which is not linear. State: mn elements. torch.optim.Muon is the published implementation; this
one lets it stand on the same loop, groups and tables as the others, and is compared with it step by step. Differs from it: momentum is float32 beside
16-bit weights too, which there, without Nesterov's form, is overwritten by what Newton–Schulz divides by its norm.

``adjust``: f, "original" √max(1, m/n), "match_rms_adamw" 0.2·√max(m, n) so that AdamW's learning rates fit, "spectral" √(m/n), or "none".
"""

from __future__ import annotations

from typing import Any

from optimizers.bases import Identity
from optimizers.orthogonal import ADJUSTMENTS, PRECISIONS, Orthogonal
from optimizers.subspace import Params, Rule, Subspace


class Muon(Subspace):
    """See the module docstring. ``momentum``: β; ``precision`` of Newton–Schulz: "bfloat16" or "full". ``rank`` says which groups are matrices."""

    choices = {"adjust": tuple(ADJUSTMENTS), "precision": tuple(PRECISIONS)}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        rank: int | float | None = 1,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust: str = "original",
        precision: str = "bfloat16",
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = {"rank": rank, "momentum": momentum, "nesterov": nesterov, "adjust": adjust, "precision": precision}
        super().__init__(params, lr, own, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        return Rule(
            basis=Identity(),
            side="right",
            inner=Orthogonal(beta=group["momentum"], nesterov=group["nesterov"], precision=group["precision"], storage=self.storage(group)),
            adjust=ADJUSTMENTS[group["adjust"]],
        )
