"""Directions that later training must leave alone: gradients, and steps, are taken off a basis P that grows from task to task.

    G ← G − (GP)Pᵀ                        P (n×k) with orthonormal columns, on the side of a layer's inputs
    after a task: P ← [P, V_j], V_j the fewest leading right singular vectors of M(I − PPᵀ) for which P holds the share ε of ‖M‖²

Exact because a linear layer says Wx: if x lies in the span of P and a step D has DP = 0, then (W + D)x = Wx, however many steps there are. The
gradient ΔᵀX has the inputs as its rows, so what P grows by are inputs that mattered; M is what an optimizer remembers of gradients.

What keeps a step off P where its gradient is: every rule that is linear in gradients (SGD, momentum), and Adam in a frame V with PᵀV = 0, whose
divisions happen in coordinates: the lift DVᵀ stays in span(V). Adam on the entries divides each by a number of its own, which turns a row off P into
one that is not; ``Outside`` takes the step itself off P. Weight decay moves Wx too, and has no place beside P.
Reference: gradient projection memory (2103.09762), which takes P from inputs; first moments in their place: GORP (2507.02503).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from estimators import directions
from optimizers.inner import State
from optimizers.outputs import Complement, Context, Lift

BASIS = "P"  # its name in the state of a parameter


def off(G: Float[Tensor, "*batch m n"], P: Float[Tensor, "n k"] | None) -> Float[Tensor, "*batch m n"]:
    """G(I − PPᵀ); G itself where nothing is protected."""
    return G if P is None else G - (G @ P) @ P.mT


def grown(P: Float[Tensor, "n k"] | None, M: Float[Tensor, "m n"], energy: float, most: float) -> Float[Tensor, "n l"]:
    """P and as many leading right singular vectors of M off P as it takes to hold the share ``energy`` of ‖M‖², P's own part of it counted.

    Never more than ``most``·n columns, a share below 1, so that something is left to learn in. Orthonormal to rounding; an M of zeros adds nothing.
    Raises ``ValueError`` for shares that are none.
    """
    m, n = M.shape
    if not (0 < energy <= 1 and 0 < most < 1):
        raise ValueError(f"grown(M={m}x{n}, energy={energy:g}, most={most:g}): energy must be in (0, 1], most in (0, 1)")
    P = M.new_zeros(n, 0) if P is None else P
    rest = off(M, P)
    _, s, V = directions.svd(rest)
    total, held = M.double().square().sum(), M.double().square().sum() - rest.double().square().sum()
    reached = held + s.double().square().cumsum(0)
    rounding = torch.finfo(M.dtype).eps * max(m, n)
    wanted = 0 if held >= energy * total else int((reached < energy * total).sum()) + 1
    real = int((s > rounding * total.sqrt()).sum())  # directions that are more than rounding
    count = max(0, min(wanted, real, int(most * n) - P.shape[1]))
    fresh = off(V[:, :count].mT, P).mT  # once more: what is left of P in them is rounding of M, and may be much of a small rest
    return torch.cat([P, torch.linalg.qr(fresh)[0]], dim=1)


@dataclass(frozen=True)
class Protect(Complement):
    """The frame sees the gradient off P."""

    def enter(self, G: Tensor, W: list[Tensor], state: State, flipped: bool) -> Tensor:  # noqa: ARG002
        return off(G, state.get(BASIS))


@dataclass(frozen=True)
class Outside(Lift):
    """W ← W + α·D(I − PPᵀ), for a step D in all entries."""

    def low(self, context: Context) -> tuple[Tensor, float] | None:
        low = super().low(context)
        return None if low is None else (off(low[0], context.state.get(BASIS)), low[1])
