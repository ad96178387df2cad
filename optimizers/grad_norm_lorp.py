"""GradNormLoRP: every row of a weight is a length and a direction, and the gradient of the directions is projected (arXiv 2412.19616).

    W = diag(g)·V̂ with rows of length one;   ∇V = G − (G·V̂)V̂ row by row,  ∇g = rows of G·V̂
    every T steps: P = r leading right singular vectors of ∇V    (of the smaller dimension)
    R = ∇V·P;  M, N ← Adam's means of R, R²;   g ← g − η·Adam(∇g);   V ← W − η·α·(M̂/(√N̂ + ε))Pᵀ;   W ← (1 − ηλ)·diag(g)·V/‖V‖

Biased as GaLore in the directions; the lengths are trained in full, and stay positive: one that would be negative is zero, and a row of zeros takes
the length of its step. V begins every step at W, so that ∇V needs no g/‖V‖ and nothing but
the moments of g is kept. State: mr + 2nr + 2·rows elements.

Rows of the parameter as it stands, an output neuron each, and one side are those of the published code, which has no licence and was not read but is
described; the paper has normalised columns of W₀ + IJ and projects from both sides. Differs from that code: it leaves the radial component in ∇V, and
then forgets the step of g, which it overwrites with the length of V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimizers.bases import TopSingular
from optimizers.buckets import stack
from optimizers.inner import Adam, Rate, State
from optimizers.outputs import TINY, Complement, Context, Lift
from optimizers.subspace import Params, Rule, Subspace

PREFIX = "length_"  # of the state of the rows' lengths
TARGET = "length_target"  # within a step


@dataclass(frozen=True)
class Lengths(Complement):
    """The frame sees the tangential part of the gradient; the radial part moves the lengths of the rows by ``inner``."""

    inner: Adam
    decay: float

    def enter(self, G: Tensor, W: list[Tensor], state: State, flipped: bool) -> Tensor:
        dim = -2 if flipped else -1
        length = _lengths(stack(W), dim)
        unit = stack(W) / (length + TINY)
        radial = (G * unit).sum(dim, keepdim=True)
        own = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
        own["step"] = own.get("step", 0) + 1
        step = self.inner.move(own, radial, 1.0).step()
        state |= {PREFIX + key: value for key, value in own.items()} | {TARGET: (dim, length, step)}
        return G - radial * unit

    def finish(self, W: list[Tensor], context: Context, rate: Rate) -> None:
        dim, length, step = context.state.pop(TARGET)
        now = _lengths(stack(W), dim)
        target = torch.where(length > 0, (length + rate * step).clamp_min(0), now)  # a row of zeros gets the length of its step
        factor = target * (1 - rate * self.decay) / (now + TINY)
        for i, weight in enumerate(W):
            weight.mul_(factor if len(W) == 1 else factor[i])


def _lengths(W: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(W, dim=dim, keepdim=True)


class GradNormLoRP(Subspace):
    """See the module docstring. ``rank``: r; ``every``: T in steps; ``scale``: α."""

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        *,
        rank: int | float | None = 128,
        every: int = 250,
        scale: float = 0.25,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, {"rank": rank, "every": every, "scale": scale}, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        return Rule(
            basis=TopSingular(group["rank"]),
            every=group["every"],
            inner=self.adam(group),
            output=Lift(group["scale"]),
            decay_last=True,  # and of the lengths: ``Lengths`` sees to it
            complement=Lengths(Adam(betas=group["betas"], eps=group["eps"]), group["weight_decay"]),
        )
