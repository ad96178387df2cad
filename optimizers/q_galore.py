"""Q-GaLore: GaLore with a 4-bit projector, 8-bit states and weights, and refreshes that become rare where nothing changes (arXiv 2407.08296).

    every T steps: V = r leading right singular vectors of G, kept as 4-bit codes in groups of 256
                   p = ‖V_oldᵀV‖²/r, the share of the new subspace in the old;  s = (p − r/n)/(1 − r/n), over what chance gives; 1 at r = n
                   if the last q values of s average ``threshold`` or more: T ← 2T, for this matrix
    R = GV;  M, N ← Adam's means of R, R², in 8 bits;  W ← SR₈( (1 − ηλ)W − η·α·(M̂/(√N̂ + ε))Vᵀ )

SR₈: stochastic rounding to 8-bit codes, for layers that ``int8_weights`` has converted, E[SR₈(W)] = W; other weights are kept as they are. Biased as
GaLore. State: mr/2 + 2nr bytes and scales (m ≤ n): 5/256 of a byte a number of V, 4/256 of one of the moments; a weight mn bytes and 5/256.

``variant="reference-code"``: s is the cosine of the first singular vectors, whose sign is arbitrary, so that T may never grow; ε as in the paper;
decay after the step. Differs from the published code: two codes in a byte, there one; zero is always a code, there groups without a change of sign
are shifted; ``p.grad`` keeps its shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from optimizers.bases import Basis, Draw, top_right_singular
from optimizers.frames import Formed, Frame
from optimizers.outputs import Lift
from optimizers.quantized import GROUP, Codes, dequantize, pack, quantize, unpack
from optimizers.subspace import Params, Rule, Subspace


@dataclass(frozen=True)
class FourBit(Formed):
    """V in 4-bit codes; ``gap``: refreshes are where it divides the number of steps made; ``likeness`` of the last refreshes, newest last."""

    packed: UInt8[Tensor, " bytes"]
    scale: Float[Tensor, "groups 1"]
    zero: UInt8[Tensor, "groups 1"]
    gap: int
    likeness: Float[Tensor, " kept"]  # −∞ where there was no refresh yet

    def matrix(self, N: int, dtype: torch.dtype, device: torch.device) -> Tensor:  # noqa: ARG002
        r = 2 * len(self.packed) // N if N > 1 else 1
        codes = unpack(self.packed, N * r).reshape(len(self.scale), -1)
        return dequantize(Codes(codes, self.scale, self.zero), (N, r), dtype)


@dataclass(frozen=True)
class Lazy(Basis):
    """Leading directions in 4 bits; ``every``: the first gap; ``kept``: q."""

    every: int = 200
    threshold: float = 0.4
    kept: int = 5
    by: Literal["subspace", "vector"] = "subspace"
    group: int = GROUP

    frame: ClassVar[type[Frame]] = FourBit
    batched: ClassVar[bool] = False  # every matrix has a gap of its own

    def due(self, state: dict[str, Any], clock: int, every: int | None) -> bool:  # noqa: ARG002
        return clock % state["gap"] == 0

    def choose(self, G: Tensor, draw: Draw) -> Frame:
        V = top_right_singular(G, self.size(min(G.shape)))
        gap, likeness = self.every, G.new_full((self.kept,), -torch.inf, dtype=torch.float32)
        if isinstance(draw.previous, FourBit):
            old = draw.previous.dense(G).V
            alike = old[:, 0] @ V[:, 0] / old[:, 0].norm() if self.by == "vector" else likeness_of(old, V)
            likeness = torch.cat([draw.previous.likeness[1:], alike.reshape(1).to(likeness)])
            gap = draw.previous.gap * (2 if float(likeness.mean()) >= self.threshold else 1)
        coded = quantize(V, 4, self.group)
        return FourBit(pack(coded.codes), coded.scale, coded.zero, gap, likeness)


def likeness_of(old: Float[Tensor, "N r"], new: Float[Tensor, "N r"]) -> Float[Tensor, ""]:
    """1 for equal subspaces, 0 on average for one drawn uniformly, whose ‖V_oldᵀV‖²/r is r/N; 1 at r = N."""
    N, r = new.shape
    share = (old.mT @ new).square().sum() / r
    return (share - r / N) / (1 - r / N) if r < N else torch.ones_like(share)


class QGaLore(Subspace):
    """See the module docstring. ``rank``: r; ``every``: the first T in steps; ``threshold``; ``kept``: q; ``scale``: α."""

    choices = {"variant": ("paper", "reference-code")}
    coded_weights = True

    def __init__(
        self,
        params: Params,
        lr: float = 0.015,
        *,
        rank: int | float | None = 128,
        every: int = 200,
        scale: float = 0.25,
        threshold: float = 0.4,
        kept: int = 5,
        states: Literal["float", "8bit"] = "8bit",
        rounding: Literal["nearest", "stochastic"] = "stochastic",
        variant: str = "paper",
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = {"rank": rank, "every": every, "scale": scale, "threshold": threshold, "kept": kept, "variant": variant}
        super().__init__(params, lr, own | {"states": states, "rounding": rounding}, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        code = group["variant"] == "reference-code"
        return Rule(
            basis=Lazy(group["rank"], group["every"], group["threshold"], group["kept"], "vector" if code else "subspace"),
            every=group["every"],
            inner=self.adam(group),
            output=Lift(group["scale"]),
            decay_last=code,
        )
