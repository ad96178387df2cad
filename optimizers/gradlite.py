"""GradLite: the step of a gradient whose error signals are seen in r directions, and feedback of what those miss (arXiv 2510.22467).

    v = G + e;   U ← orth(vvᵀU);   B = Uᵀv
    W ← (1 − ηλ)W − η·U·step(B);   e ← v − UB                    ``feedback="ef14"``; others: optimizers/residuals.py

G = ΔᵀX, so UUᵀG is the gradient of the error signals ΔUUᵀ: a low-rank Jacobian. U goes on from the last step's, or from what ``start`` gives:
training's layers follow Δ itself (estimators/error_basis.py). The step of iteration on v is needed: a U of Δ alone never turns towards e, which is
orthogonal to the U that left it, and what was left then stays left. ``step``: Adam in the frame, its moments carried along from one U to the next,
or plain (``inner="sgd"``), which is what the convergence of error feedback is proven for.

``basis="adaptive"``: biased at every step; with ef14 or ef21 repaired over time, Σ(what the weight got) = ΣG − e (theory/feedback.py); ``literal``
diverges in every direction that U misses, at every learning rate; ``none`` never learns what U misses. ``"static"``: U is drawn once, biased; ef14
could not repair it, since Uᵀe = 0 for good, and is refused. ``"law"``: a Haar frame at c = 1 is drawn at every step, so that E[UUᵀG] = G: unbiased,
without feedback and with plain steps.

State: mr + 2nr + mn + 1, the residual mn in ``residual`` precision: fp32, bf16 (two bytes) or 8bit (one, and a scale a block of 256; matrices of
fewer than ``smallest_8bit`` numbers stay fp32). Of float64 weights it stays float64.

Written from the paper's text; no code is public. The paper's transcribed recursion is ``literal``; its optimizer is not described beyond it, so Adam
in the frame is this project's choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from estimators import directions
from estimators.haar_stiefel import orthonormalize
from optimizers.bases import Basis, Draw, FromLaw
from optimizers.buckets import Bucket, names, stack
from optimizers.frames import Dense, Frame
from optimizers.inner import Inner, Plain, State
from optimizers.outputs import DROP, Complement
from optimizers.residuals import PRECISIONS, RECURSIONS, STORAGES, EightBit, Residual
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
    """See the module docstring. ``rank``: r; ``feedback``: "ef14", "ef21", "literal" or "none"; ``residual``: its precision; ``basis``: "adaptive",
    "static" or "law"; ``inner``: "adam" or "sgd"; ``side``: "left", the error signals', or another. Raises ``ValueError`` for ef21 or literal with
    Adam, ef14 with a static basis, and a law with feedback or Adam."""

    choices = {"feedback": (*RECURSIONS, "none"), "residual": PRECISIONS, "basis": ("adaptive", "static", "law"), "inner": ("adam", "sgd")}

    start: Callable[[str], Tensor | None] | None = None
    """Name of a parameter → U (m, r) that its basis begins the step with, or None for the last one; a static basis takes it as it is."""

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
        _check(group, adam, feedback)
        storage = EightBit(group["smallest_8bit"]) if group["residual"] == "8bit" else STORAGES[group["residual"]]
        inner: Inner = self.adam(group) if adam else Plain()
        complement: Complement = DROP if feedback is None else feedback(storage)
        drawn = group["basis"] == "law"
        return Rule(
            basis=FromLaw(group["rank"]) if drawn else Running(group["rank"], static=group["basis"] == "static"),
            side=group["side"],
            every=None if group["basis"] == "static" else 1,
            inner=inner,
            transport=ReprojectBoth() if adam else KEEP,
            complement=complement,
        )

    def _choose(self, group: dict[str, Any], rule: Rule, bucket: Bucket, G: Tensor, state: State, old: Any, history: Any) -> Frame:
        given = (
            [self.start(name) for name in bucket.names] if self.start and isinstance(rule.basis, Running) and self.inject is None else []
        )
        known = [U for U in given if U is not None]
        if not known or len(known) < len(given):
            return super()._choose(group, rule, bucket, G, state, old, history)
        U = stack(known).to(G)
        return Dense(U if group["basis"] == "static" else directions.power(G, U))

    def captured(self) -> dict[str, float]:
        """‖UUᵀv‖²/‖v‖² of the last step by the name or place of each matrix, where there is feedback."""
        states = [(name, self.state[p]) for group in self.param_groups for name, p in zip(names(self, group), group["params"], strict=True)]
        return {name: float(state["captured"]) for name, state in states if "captured" in state}


def _check(group: dict[str, Any], adam: bool, feedback: type[Residual] | None) -> None:
    name, basis = group["feedback"], group["basis"]
    if adam and feedback is not None and feedback.plain:
        raise ValueError(f"GradLite(feedback={name!r}, inner='adam'): the recursion is one of plain steps; use inner='sgd'")
    if basis == "static" and name == "ef14":
        raise ValueError(
            "GradLite(feedback='ef14', basis='static'): what a basis that stands still leaves out never comes back; use feedback='none'"
        )
    if basis == "law" and (adam or feedback is not None):
        raise ValueError(
            f"GradLite(basis='law', feedback={name!r}, inner={group['inner']!r}): unbiased steps need feedback='none' and inner='sgd'"
        )
