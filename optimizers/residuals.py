"""What a frame does not pass on, kept for later steps in a stated precision: the three recursions of error feedback as complements.

    ef14     v = G + e;  W ← W − η·step(C(v));  e ← v − C(v)            ``ErrorFeedback`` of optimizers/outputs.py, with a precision
    ef21     h ← h + C(G − h);  W ← W − ηh                              (arXiv 2106.05203), for a plain inner step
    literal  W ← W − η(C(G) + r);  r ← r + G − C(G)                     GradLite as transcribed: r is added and never paid back; diverges

C(G) = lift(sketch(G)). The pure functions of estimators/error_feedback.py are the same steps on tensors alone. A residual in bfloat16 or 8 bits is
rounded to the nearest once a step; what rounding loses is not fed back. ``captured``: ‖C(v)‖²/‖v‖² of the last step, for an orthonormal frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optimizers.inner import State
from optimizers.outputs import TINY, Change, Complement, Context
from optimizers.storage import FLOAT, EightBit, Storage

PRECISIONS = ("fp32", "bf16", "8bit")
NAME = "error"


@dataclass(frozen=True)
class Bfloat16(Storage):
    """bfloat16 beside float32 weights; float64 ones keep float64."""

    def read(self, state: State, name: str) -> Tensor | None:
        value = state.get(name)
        return value if value is None or value.dtype != torch.bfloat16 else value.float()

    def write(self, state: State, name: str, value: Tensor) -> None:
        state[name] = value.bfloat16() if value.dtype == torch.float32 else value


STORAGES: dict[str, Storage] = {"fp32": FLOAT, "bf16": Bfloat16(), "8bit": EightBit()}


@dataclass(frozen=True)
class Residual(Complement):
    """Base: one m×n tensor under ``error``. What enters the frame and what is kept afterwards is the recursion's."""

    storage: Storage = FLOAT

    plain: ClassVar[bool] = True  # whether the recursion is one of plain steps only

    def kept(self, state: State) -> Tensor | None:
        """The residual, None before the first step."""
        return self.storage.read(state, NAME)

    def keep(self, context: Context, value: Tensor) -> None:
        """Remember ``value``, and what share the frame has caught."""
        self.storage.write(context.state, NAME, value)
        context.state["captured"] = _square(context.B) / (_square(context.G) + TINY)


class EF14(Residual):
    """e ← v − C(v) with v = G + e."""

    plain: ClassVar[bool] = False

    def enter(self, G: Tensor, W: list[Tensor], state: State, flipped: bool) -> Tensor:  # noqa: ARG002
        e = self.kept(state)
        return G if e is None else G + e

    def term(self, context: Context) -> None:
        self.keep(context, context.residual())


class EF21(Residual):
    """h ← h + C(G − h); the weight gets h."""

    def enter(self, G: Tensor, W: list[Tensor], state: State, flipped: bool) -> Tensor:  # noqa: ARG002
        h = self.kept(state)
        return G if h is None else G - h

    def term(self, context: Context) -> Change | None:
        h = self.kept(context.state)
        caught = context.frame.lift(context.B, context.G)
        self.keep(context, caught if h is None else h + caught)
        return None if h is None else (h, -context.move.size)


class Literal(Residual):
    """r ← r + G − C(G), and the weight gets C(G) + r."""

    def term(self, context: Context) -> Change | None:
        r = self.kept(context.state)
        self.keep(context, context.residual() if r is None else r + context.residual())
        return None if r is None else (r, -context.move.size)


RECURSIONS: dict[str, type[Residual]] = {"ef14": EF14, "ef21": EF21, "literal": Literal}


def _square(X: Tensor) -> Any:
    return X.square().sum((-2, -1), keepdim=True)
