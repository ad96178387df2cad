"""GradLite: the step of a gradient whose error signals are seen in r directions, and feedback of what those miss (arXiv 2510.22467).

    v = G + e;   U ← orth(vvᵀU), or U drawn once (``basis="static"``);   B = Uᵀv
    W ← (1 − ηλ)W − η·U·step(B);   e ← v − UB                    ``feedback="ef14"``; others: optimizers/residuals.py

G = ΔᵀX, so UUᵀG is the gradient of the error signals ΔUUᵀ: a low-rank Jacobian. Here U follows G; where the layers are replaced
(estimators/error_basis.py) it follows Δ itself, and their frames come by ``inject``. ``step``: Adam in the frame, its moments carried along from
one U to the next, or plain (``inner="sgd"``), which is what the convergence of error feedback is proven for.

Biased at every step; with ef14 or ef21 repaired over time, Σ(what the weight got) = ΣG − e (theory/feedback.py); ``literal`` diverges in every
direction that U misses, at every learning rate; ``none`` never learns what U misses. State: mr + 2nr + mn + 1, the residual mn in ``residual``
precision: fp32, bf16 (two bytes) or 8bit (one, and a scale a block of 256).

Written from the paper's text; no code is public. The paper's transcribed recursion is ``literal``; its optimizer is not described beyond it, so Adam
in the frame is this project's choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from estimators import directions
from estimators.haar_stiefel import orthonormalize
from optimizers.bases import Basis, Draw
from optimizers.buckets import names
from optimizers.frames import Dense, Frame
from optimizers.inner import Inner, Plain
from optimizers.outputs import DROP, Complement
from optimizers.residuals import PRECISIONS, RECURSIONS, STORAGES, EightBit
from optimizers.subspace import Params, Rule, Subspace
from optimizers.transports import KEEP, ReprojectBoth


@dataclass(frozen=True)
class Running(Basis):
    """One step of orthogonal iteration on GᵀG from the last V; from a Haar frame, two, the first time. ``static``: that frame for good."""

    static: bool = False

    frame: ClassVar[type[Frame]] = Dense

    def choose(self, G: Tensor, draw: Draw) -> Frame:
        if isinstance(draw.previous, Dense):
            return Dense(directions.power(G, draw.previous.V))
        r = self.size(min(G.shape[-2:]))
        start = draw.each(G, lambda X, g: orthonormalize(torch.randn(X.shape[-1], r, generator=g, device=X.device, dtype=X.dtype)))
        return Dense(start if self.static else directions.power(G, start, steps=2))


class GradLite(Subspace):
    """See the module docstring. ``rank``: r; ``feedback``: "ef14", "ef21", "literal" or "none"; ``residual``: its precision; ``basis``: "adaptive" or
    "static"; ``inner``: "adam" or "sgd"; ``side``: "left", the error signals', or another. Raises ``ValueError`` for ef21 or literal with Adam."""

    choices = {"feedback": (*RECURSIONS, "none"), "residual": PRECISIONS, "basis": ("adaptive", "static"), "inner": ("adam", "sgd")}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        rank: int | float | None = 16,
        feedback: str = "ef14",
        residual: str = "bf16",
        basis: str = "adaptive",
        inner: str = "adam",
        betas: tuple[float, float] = (0.9, 0.99),
        side: str = "left",
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = {"rank": rank, "feedback": feedback, "residual": residual, "basis": basis, "inner": inner, "betas": betas, "side": side}
        super().__init__(params, lr, own, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        feedback, adam = RECURSIONS.get(group["feedback"]), group["inner"] == "adam"
        if adam and feedback is not None and feedback.plain:
            raise ValueError(
                f"GradLite(feedback={group['feedback']!r}, inner='adam'): the recursion is one of plain steps; use inner='sgd'"
            )
        storage = EightBit(group["smallest_8bit"]) if group["residual"] == "8bit" else STORAGES[group["residual"]]
        inner: Inner = self.adam(group) if adam else Plain()
        complement: Complement = DROP if feedback is None else feedback(storage)
        return Rule(
            basis=Running(group["rank"], static=group["basis"] == "static"),
            side=group["side"],
            every=1 if group["basis"] == "adaptive" else None,
            inner=inner,
            transport=ReprojectBoth() if adam else KEEP,
            complement=complement,
        )

    def captured(self) -> dict[str, float]:
        """‖UUᵀv‖²/‖v‖² of the last step by the name or place of each matrix, where there is feedback."""
        states = [(name, self.state[p]) for group in self.param_groups for name, p in zip(names(self, group), group["params"], strict=True)]
        return {name: float(state["captured"]) for name, state in states if "captured" in state}
