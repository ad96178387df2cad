"""What the weight gets: the lifted step, and what is done about the rest of the gradient that the frame does not see.

Output: ``Lift`` α·lift(D); ``ScaleGradient`` the full gradient, row by row as long as the inner rule made the sketch (APOLLO); ``ExactNow`` the
present update exactly and the past through the sketch (Flora's code). Complement of the frame: ``DROP``; ``Sign`` and ``Descent``, steps
without state on the residual (FRUGAL); ``Scaled``, the residual as long as the inner rule made the sketch (Fira); ``ErrorFeedback``, kept
for the next step (LDAdam, DCT-AdamW); ``FedBack``, the momentum itself is kept whole and keeps it (Dion, Trion).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimizers.frames import Frame
from optimizers.inner import Move, Rate, State, rms_clip

Change = tuple[Tensor, Rate]  # X (*batch, M, N) and a factor: a number, (*batch, M, 1) or (*batch, 1, 1); the weight gets factor·X
TINY = 1e-30  # beside a norm that divides: 0/0 is 0


@dataclass
class Context:
    """One step of one bucket: G (*batch, M, N) as the frame saw it, B its sketch, ``move`` the inner step, all in one precision."""

    G: Tensor
    B: Tensor
    move: Move
    frame: Frame
    state: State
    history: Tensor | None = None  # lift of the first moment before this step, in the frame of the last
    lost: Tensor | None = None  # what of it the change of frame lost
    flipped: bool = False  # whether all of it is transposed
    rule: Any = None  # the ``Rule`` that is followed
    known_norm: Tensor | None = None  # ‖G‖, where somebody has already looked at all of it

    def norm(self) -> Tensor:
        """‖G‖, (*batch, 1, 1)."""
        return norm(self.G, whole=True) if self.known_norm is None else self.known_norm

    def path(self, G: Tensor) -> Tensor:
        """What of a gradient G (*batch, M, N) reaches the weight in this step but for the inner rule and what is done with the residual."""
        return self.rule.output.path(self, G)

    def residual(self, alpha: float = 1.0) -> Tensor:
        """G − α·lift(B), (*batch, M, N)."""
        rest = self.G.clone()
        self.frame.add(rest, self.B, -alpha)
        return rest


class Complement:
    """Base, and ``DROP``: nothing is done about the residual."""

    @property
    def needs_history(self) -> bool:
        """Whether ``history`` and ``lost`` are to be formed when a frame is chosen."""
        return False

    def enter(self, G: Tensor, W: list[Tensor], state: State, flipped: bool) -> Tensor:  # noqa: ARG002
        """The gradient that the frame is to see; W: the weights, one a matrix; ``flipped``: whether all of them are transposed."""
        return G

    def term(self, context: Context) -> Change | None:  # noqa: ARG002
        """A change of the weight beside the output's."""
        return None

    def finish(self, W: list[Tensor], context: Context, rate: Rate) -> None:
        """Called last, with the weights as they are after the step, to be changed in place."""


DROP = Complement()


@dataclass(frozen=True)
class Sign(Complement):
    """−η·scale·sign(residual): signSGD."""

    scale: float = 1.0

    def term(self, context: Context) -> Change:
        return context.residual().sign_(), context.move.size * -self.scale


@dataclass(frozen=True)
class Descent(Complement):
    """−η·scale·residual: SGD."""

    scale: float = 1.0

    def term(self, context: Context) -> Change:
        return context.residual(), context.move.size * -self.scale


@dataclass(frozen=True)
class Limiter:
    """Lets the norm of a matrix grow by a factor γ a step at most. A norm of zero limits nothing, else nothing could grow after it."""

    gamma: float = 1.01

    def __call__(self, scale: Tensor, norms: Tensor, state: State) -> Tensor:
        """``scale`` (*batch, M or 1, 1) of the rows of a matrix X, or of all of it, whose ``norms`` are given, so small that the norm of scale∘X
        keeps the limit; scale∘X is never formed."""
        whole, before = norm(norms * scale, whole=True), state.get("limit")
        if before is None:
            state["limit"] = whole
            return scale
        excess = (whole / (before + TINY)).clamp_min(self.gamma) / self.gamma
        factor = torch.where(before > 0, 1 / excess, 1.0)
        state["limit"] = whole * factor
        return scale * factor


def growth(context: Context, whole: bool = False) -> Tensor:
    """‖direction‖/‖B‖ of every row (*batch, M, 1), or of the ``whole`` matrix (*batch, 1, 1)."""
    return norm(context.move.direction(), whole) / (norm(context.B, whole) + TINY)


def norm(X: Tensor, whole: bool) -> Tensor:
    """‖X‖ (*batch, 1, 1), or of every row (*batch, M, 1); torch's norm is several times slower over rows of a transposed matrix."""
    return torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True) if whole else X.square().sum(-1, keepdim=True).sqrt_()


@dataclass(frozen=True)
class Scaled(Complement):
    """−η·limit(φ∘(G − α·lift(B))), φ the growth of each row; α = 1 in the paper."""

    alpha: float = 1.0
    limiter: Limiter | None = Limiter()

    def term(self, context: Context) -> Change:
        rest, scale = context.residual(self.alpha), growth(context)
        if self.limiter is not None:
            scale = self.limiter(scale, norm(rest, whole=False), context.state)
        return rest, scale * -context.move.size


@dataclass(frozen=True)
class ErrorFeedback(Complement):
    """e ← a − lift(B) with a = G + e: what the frame did not see. With ``beta1`` also β₁/(1−β₁)·lost: what its change lost of the momentum."""

    beta1: float | None = None

    @property
    def needs_history(self) -> bool:
        return self.beta1 is not None

    def enter(self, G: Tensor, W: list[Tensor], state: State, flipped: bool) -> Tensor:  # noqa: ARG002
        return G + state["error"] if "error" in state else G

    def term(self, context: Context) -> None:
        error = context.residual()
        if context.lost is not None and self.beta1 is not None:
            error.add_(context.lost, alpha=self.beta1 / (1 - self.beta1))
        context.state["error"] = error


@dataclass(frozen=True)
class FedBack(Complement):
    """The frame sees the momentum A = M + G, and what it passes on is mostly taken out of it: M ← A − (1−μ)·lift(B) (Dion, Trion)."""

    mu: float = 0.95

    def enter(self, G: Tensor, W: list[Tensor], state: State, flipped: bool) -> Tensor:  # noqa: ARG002
        return G + state["momentum"] if "momentum" in state else G

    def term(self, context: Context) -> None:
        context.state["momentum"] = context.residual(1 - self.mu)


@dataclass(frozen=True)
class Lift:
    """W ← W + α·lift(step)."""

    alpha: float = 1.0

    needs_history = False

    def path(self, context: Context, G: Tensor) -> Tensor:
        """What of G the frame passes on."""
        return context.frame.passes(G)

    def low(self, context: Context) -> tuple[Tensor, float] | None:
        """The step in the frame's coordinates and its factor, None if the weight gets none. Asked last: the move is used up."""
        move = context.move
        if move.denominator is None and not isinstance(move.factor, Tensor):
            return move.numerator, -move.factor * self.alpha
        return move.step(), self.alpha

    def dense(self, context: Context, rate: Rate) -> Change | None:  # noqa: ARG002
        """A change of the weight that is not low-rank, None if there is none."""
        return None


LIFT = Lift()


@dataclass(frozen=True)
class ScaleGradient(Lift):
    """W ← W − η·α·limit(s∘G), s the growth of each row or of the ``whole`` matrix."""

    whole: bool = False
    limiter: Limiter | None = Limiter()

    def path(self, context: Context, G: Tensor) -> Tensor:  # noqa: ARG002
        return G

    def low(self, context: Context) -> None:  # noqa: ARG002
        return None

    def dense(self, context: Context, rate: Rate) -> Change:  # noqa: ARG002
        scale = growth(context, self.whole)
        if self.limiter is not None:
            scale = self.limiter(scale, context.norm() if self.whole else norm(context.G, whole=False), context.state)
        return context.G, scale * (context.move.size * -self.alpha)


@dataclass(frozen=True)
class ExactNow(Lift):
    """W ← W − η·clip((1−β)G + β·history): the present exactly, the past as the sketch of the last step remembers it."""

    beta: float = 0.9
    clip: float = 1.0

    needs_history = True

    def low(self, context: Context) -> None:  # noqa: ARG002
        return None

    def dense(self, context: Context, rate: Rate) -> Change:
        out = context.G * (1 - self.beta)
        if context.history is not None:
            out = out.add_(context.history, alpha=self.beta)
        return rms_clip(out, self.clip), -rate
