"""FOAM: Adam's moments of block averages, and the present gradient's deviation from them (arXiv 2512.07112).

    b = averages of 2ˡ adjacent entries of a row of G;  M, N ← means of b, b²;   E repeats each average over its block;  D = G − Eb
    W ← (1 − ηλ)W − η·α·√(1−β₂ᵗ)/(1−β₁ᵗ)·(EM + D)/(√(EN + D²) + ε)

Full-rank, unbiased as a path (Eb + D = G), biased after the root. What varies within a block has no memory. Adjacency of columns is all that makes a
block: a permutation of them is another method. State: 2mn/2ˡ elements, rounded up to whole blocks a row.

Differs from the published code, which has no licence and was not read but is described: that averages squares for N in the place of squaring
averages, fills the last block up with zeros, and lets W decay after the step. Bias correction is the published code's, none of the paper's text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optimizers.bases import Basis, Draw
from optimizers.frames import Frame
from optimizers.inner import Adam, Move, Rate, State
from optimizers.outputs import Change, Context, Lift
from optimizers.subspace import Params, Rule, Subspace


@dataclass(frozen=True)
class Folded(Frame):
    """Averages of 2^level adjacent columns, (*batch, M, ⌈N/2^level⌉); the lift repeats them."""

    level: int

    def sketch(self, G: Tensor) -> Tensor:
        size, N = 2**self.level, G.shape[-1]
        blocks = torch.nn.functional.pad(G, (0, -N % size)).unflatten(-1, (-1, size)).sum(-1) / size
        if N % size:
            blocks[..., -1] *= size / (N % size)
        return blocks

    def lift(self, B: Tensor, like: Tensor) -> Tensor:
        return B.repeat_interleave(2**self.level, dim=-1)[..., : like.shape[-1]]

    def passes(self, G: Tensor) -> Tensor:
        return G


@dataclass(frozen=True)
class Blocks(Basis):
    """Fixed blocks of columns."""

    level: int = 2

    frame: ClassVar[type[Frame]] = Folded

    def choose(self, G: Tensor, draw: Draw) -> Frame:  # noqa: ARG002
        return Folded(self.level)


@dataclass(frozen=True, kw_only=True)
class FoldedMoments(Adam):
    """The move is M over N, not over its root: the deviation comes first."""

    def move(self, state: State, B: Tensor, lr: Rate) -> Move:
        M = super().move(state, B, lr).numerator
        first, second = self.corrections(state["step"])
        return Move(M, self.moment(state, "exp_avg_sq"), lr * second**0.5 / first, lr)


@dataclass(frozen=True)
class Unfolded(Lift):
    """−α·factor·(EM + D)/(√(EN + D²) + ε)."""

    eps: float = 1e-8

    def low(self, context: Context) -> None:  # noqa: ARG002
        return None

    def dense(self, context: Context, rate: Rate) -> Change:  # noqa: ARG002
        move, N = context.move, context.move.denominator
        assert N is not None
        rest = context.residual()
        step = context.frame.lift(move.numerator, rest) + rest
        root = context.frame.lift(N, rest).add_(rest.square_()).sqrt_().add_(self.eps)
        return step.div_(root), move.factor * -self.alpha


class FOAM(Subspace):
    """See the module docstring. ``level``: l; ``scale``: α. ``rank`` says which groups are matrices."""

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        *,
        rank: int | float | None = 1,
        level: int = 2,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.95),
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, {"rank": rank, "level": level, "scale": scale, "betas": betas}, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        return Rule(
            basis=Blocks(level=group["level"]),
            side="right",
            inner=FoldedMoments(betas=group["betas"], eps=group["eps"], storage=self.storage(group)),
            output=Unfolded(group["scale"], eps=group["eps"]),
        )
