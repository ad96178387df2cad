"""Trion: low-rank Muon in r columns of one fixed cosine basis, with the rest of the momentum kept (arXiv 2505.17967).

    A = M + G;  S = AC;  J = the r columns of S of largest norm;  b = S_J
    M ← A − (1−μ)·b·C_Jᵀ;   W ← (1 − ηλ)W − η·f(m, n)·NS₅(b)·C_Jᵀ           C: orthonormal DCT matrix of the smaller dimension

Biased at every step, Newton–Schulz apart; the momentum keeps what was not passed on (error feedback). State: mn + r elements, the indices as 64-bit
integers; C is one for all parameters of its order.

``norm``: columns are ranked by "l1", as published, or "l2", which loses least. ``adjust``: f, see optimizers/muon.py.
Differs from the published code: that takes rows of C in the place of its columns for matrices with fewer rows than columns, cannot run as it stands,
and needs torch.distributed; its Makhoul transform is left out (it changes speed only, and mixes up C and Cᵀ).
"""

from __future__ import annotations

from typing import Any, Literal

from optimizers.orthogonal import ADJUSTMENTS, PRECISIONS, Orthogonal
from optimizers.outputs import FedBack
from optimizers.selections import AlignedCosines
from optimizers.subspace import Params, Rule, Subspace


class Trion(Subspace):
    """See the module docstring. ``rank``: r; ``mu``: μ; ``precision`` of Newton–Schulz: "bfloat16" or "full"."""

    choices = {"adjust": tuple(ADJUSTMENTS), "precision": tuple(PRECISIONS), "norm": ("l1", "l2")}

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        *,
        rank: int | float | None = 128,
        mu: float = 0.95,
        norm: Literal["l1", "l2"] = "l1",
        adjust: str = "original",
        precision: str = "bfloat16",
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, {"rank": rank, "mu": mu, "norm": norm, "adjust": adjust, "precision": precision}, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        return Rule(
            basis=AlignedCosines(group["rank"], group["norm"]),
            every=1,
            inner=Orthogonal(beta=None, precision=group["precision"]),
            complement=FedBack(group["mu"]),
            adjust=ADJUSTMENTS[group["adjust"]],
        )
