"""GORP: LoRA's factors and the weight under them learn in one gradient subspace, off those of earlier tasks (continual; arXiv 2507.02503).

A layer says (W + sBA)x with W (m×n), A (l×n), B (m×l). P (n×k): what earlier tasks need, empty at first (optimizers/protected.py).

    every T steps: V = r leading right singular vectors of G(I − PPᵀ)     G the gradient of W;  PᵀV = 0
    R = GV, R_A = ∂A·V;  Adam on R, R_A and ∂B;   W ← W − ηα·(…)Vᵀ,  A ← A − η·(…)Vᵀ,  B ← B − η·(…)
    after a task: P grows by the first moments M_W Vᵀ, M_A Vᵀ, M_B A, each of norm 1;  W ← W + s(BAP)Pᵀ,  A ← A(I − PPᵀ);  moments are forgotten

Why nothing of an earlier task changes at inputs in span(P): V is off P, so W and A move off it; A(I − PPᵀ) reads nothing of it: whatever B becomes,
BAx = 0 there; and what BA said of it before is in W, so that the exchange itself changes no output. Of other inputs nothing is promised.
V serves for A too because ∂A = sBᵀG has its rows in the row space of G. State: 2mr + 2lr + nr + nk elements, and Adam's 2ml of B.

From the public summary: LoRA's gradients and those of full weights, projected as in GaLore, are updated in one shared low-rank subspace; after each
task the subspace of past tasks is built from Adam's first moments by an SVD that keeps a share of the energy, and later gradients are projected off
it. Our reading, as no code is published: one subspace a layer, on the side of its inputs; that V is chosen from G off P; that first moments follow a
change of V (M ← MVᵀV_new); equal weight for the three moments; and the exchange of BAP for a part of W, without which ∂B, whose l columns are
not inputs, could only be kept off P by freezing it.

Biased as GaLore.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from optimizers.bases import TopSingular
from optimizers.buckets import Bucket, State
from optimizers.frames import Dense, Frame
from optimizers.outputs import Lift
from optimizers.protected import BASIS, Protect, Protecting, off
from optimizers.subspace import Params, Rule
from optimizers.transports import ReprojectFirst

PARTS = ("other", "weight", "A", "B")
WITH_FRAME = ("weight", "A")


class GORP(Protecting):
    """Groups say by ``part`` what they hold: "weight" (W), then "A" and "B" of the same layers in the same order; "other" is AdamW. ``rank``: r of
    the first two; ``every``: T in steps; ``basis``: of V, as GaLore's; ``scale``: α; ``lora_scale``: s; ``energy``, ``most``: ``Protecting``."""

    choices = {"part": PARTS, "basis": ("exact", "randomized")}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        rank: int | float = 8,
        every: int = 20,
        scale: float = 0.25,
        lora_scale: float = 1.0,
        energy: float = 0.9,
        most: float = 0.5,
        basis: Literal["exact", "randomized"] = "exact",
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.rank, self.lora_scale = rank, lora_scale
        own = {"part": "other", "every": every, "scale": scale, "basis": basis}
        super().__init__(params, lr, own, energy=energy, most=most, seed=seed, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in the base; groups with a frame get the rank."""
        part = param_group.get("part", "other")
        super().add_param_group(param_group | {"rank": self.rank if part in WITH_FRAME else None})
        if part in ("A", "B"):
            shapes = [tuple(p.shape) for p in self.param_groups[-1]["params"]]
            weights = [tuple(p.shape) for p in self.protected()]
            side = 1 if part == "A" else 0
            if [shape[side] for shape in shapes] != [shape[side] for shape in weights]:
                self.param_groups.pop()
                raise ValueError(
                    f"GORP(part={part!r}): factors of the weights of the group before, in their order, are needed; got {shapes}"
                )

    def rule(self, group: dict[str, Any]) -> Rule:
        shape: dict[str, Any] = {
            "basis": TopSingular(self.rank, group["basis"]),
            "inner": self.adam(group),
            "side": "right",
            "every": group["every"],
            "transport": ReprojectFirst(),
        }
        return Rule(**shape) if group["part"] == "A" else Rule(output=Lift(group["scale"]), complement=Protect(), **shape)

    def _choose(
        self, group: dict[str, Any], rule: Rule, bucket: Bucket, G: Tensor, state: State, old: Frame | None, history: Tensor | None
    ) -> Frame:
        if group["part"] == "A":
            return Dense(self.state[self.protected()[bucket.place]]["V"])  # that group came first in this step
        frame = super()._choose(group, rule, bucket, G, state, old, history)
        # once more: a gradient of lower rank than r leaves some directions to chance, which may choose P's
        return Dense(off(frame.V.mT, state.get(BASIS)).mT.contiguous()) if isinstance(frame, Dense) else frame

    # between tasks

    def protects(self, group: dict[str, Any]) -> bool:
        return group.get("part", "other") != "other"

    def protected(self) -> list[Tensor]:
        return self._parameters("weight")

    @torch.no_grad()
    def protect(self, W: Tensor, P: Tensor) -> None:
        """Give a weight its P, with orthonormal columns, and take its A off it; moments and frames of all three are forgotten, as A's next steps must
        not lie in the old V. The layer says what it said."""
        for A, B in self._factors(W):
            W.addmm_(B @ (A @ P), P.mT, alpha=self.lora_scale)
            A.copy_(off(A, P))
            self._forget(A)
            self._forget(B)
        super().protect(W, P)

    def remembered(self, W: Tensor) -> Tensor:
        """The first moments of W, A and B on the side of the inputs, each of norm 1, by as many rows as they have directions."""
        factors = self._factors(W)
        moments = [self._moment(W, "V"), *(M for A, B in factors for M in (self._moment(A, "V"), self._moment(B) @ A))]
        M = torch.cat([_of_norm_one(M) for M in moments])
        rows = [self.state[W]["V"], *(A.mT for A, _ in factors)] if "V" in self.state[W] else [M.mT]
        Q = torch.linalg.qr(torch.cat(rows, dim=1))[0]  # all rows of M lie in its span, of few dimensions
        return torch.linalg.qr(M @ Q)[1] @ Q.mT

    def _parameters(self, part: str) -> list[Tensor]:
        return [p for group in self.param_groups if group["part"] == part for p in group["params"]]

    def _factors(self, W: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Its A and B; none where it has none."""
        places = [i for i, other in enumerate(self.protected()) if other is W]
        pairs = list(zip(self._parameters("A"), self._parameters("B"), strict=True))
        return [pairs[place] for place in places if pairs]


def _of_norm_one(M: Tensor) -> Tensor:
    return M / torch.linalg.matrix_norm(M).clamp_min(torch.finfo(M.dtype).tiny)
