"""DCT-AdamW: Adam in r columns of one fixed cosine basis, chosen anew by the gradient (arXiv 2505.17967).

    A = G + e;  every T steps: J = the r columns of AC of largest norm;   a = AC_J;  e ← A − a·C_Jᵀ
    M, N follow their columns: those that stay in J keep their numbers, new ones begin at 0
    M, N ← Adam's means of a, a²;  W ← (1 − ηλ)W − η·(M̂/(√N̂ + ε))·C_Jᵀ            C: orthonormal DCT matrix of the smaller dimension

Biased at every step, and repaired over time by the error feedback; without it (``feedback=False``) biased for good. Ranked by "l2" the selection is
the r-subset of columns that loses least of A. State: 2nr + r elements (the indices as 64-bit integers), and mn with feedback; C is one for all
parameters of its order.

``norm``: "l1", as published, or "l2". ``rotate=False`` keeps M and N by place, whatever the columns are now.
``variant="reference-code"``: T counts from one step before the first. Differs from the published code: C belongs to each matrix's own dimension,
there to that of the first; rotation is the exact partial permutation, there a product with one that is rounded, written over its own factor, which
on a CPU leaves zeros of M and N; the error is kept in float32 (the 8-bit one there has 16 levels, and the 4-bit one is unpacked in another order
than packed).
"""

from __future__ import annotations

from typing import Any, Literal

from optimizers.outputs import DROP, Complement, ErrorFeedback
from optimizers.selections import AlignedCosines
from optimizers.subspace import Params, Rule, Subspace
from optimizers.transports import KEEP, Rotate


class DCTAdamW(Subspace):
    """See the module docstring. ``rank``: r; ``every``: T in steps."""

    choices = {"norm": ("l1", "l2"), "variant": ("paper", "reference-code")}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        rank: int | float | None = 128,
        every: int = 1,
        norm: Literal["l1", "l2"] = "l1",
        rotate: bool = True,
        feedback: bool = True,
        variant: str = "paper",
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = {"rank": rank, "every": every, "norm": norm, "rotate": rotate, "feedback": feedback, "variant": variant}
        super().__init__(params, lr, own, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        feedback: Complement = ErrorFeedback() if group["feedback"] else DROP
        return Rule(
            basis=AlignedCosines(group["rank"], group["norm"]),
            every=group["every"],
            phase=1 if group["variant"] == "reference-code" else 0,
            inner=self.adam(group),
            transport=Rotate() if group["rotate"] else KEEP,
            complement=feedback,
        )
