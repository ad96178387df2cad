"""Inner rules whose steps have a shape but no size of their own: near-orthogonal ones (Muon, Trion, GUM), columns of length one (Dion).

``Orthogonal``   M ← βM + (1−β)B, step −η·NS(M), or with ``nesterov`` NS((1−β)B + βM); without β NS(B).
``UnitColumns``  step −η·Q with Q the columns of B over their lengths, kept for the next power iteration.

NS(X), Newton–Schulz, brings all singular values of X/‖X‖ towards one: it knows nothing of the scale of X. ``ADJUSTMENTS`` are the factors that the
learning rate takes from the shape m×n of the parameter. Sources: Muon (Jordan et al. 2024), its form in torch.optim.Muon, Dion (2504.05295).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from estimators.rounding import SIXTEEN_BIT
from optimizers.inner import Inner, Move, Rate, State

QUINTIC = (3.4445, -4.7750, 2.0315)
ADJUSTMENTS: dict[str, Callable[[int, int], float]] = {
    "none": lambda m, n: 1.0,  # noqa: ARG005
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "spectral": lambda m, n: math.sqrt(m / n),
}
PRECISIONS: dict[str, torch.dtype | None] = {"bfloat16": torch.bfloat16, "full": None}


def newton_schulz(
    X: Float[Tensor, "*batch m n"],
    steps: int = 5,
    coefficients: tuple[float, float, float] = QUINTIC,
    dtype: torch.dtype | None = None,
    eps: float = 1e-7,
    out: Tensor | None = None,
) -> Float[Tensor, "*batch m n"]:
    """``steps`` of X ← aX + (bA + cA²)X with A = XXᵀ, from X/‖X‖, computed in ``dtype`` (None: as given) on the smaller side.

    With the usual coefficients singular values end between about 0.7 and 1.2. Zeros stay zeros. ``out``: where the result goes, X itself for one.
    A processor without products of 16-bit numbers makes them as float32 ones and rounds what they give: the sum is in another order.
    """
    a, b, c = coefficients
    Y = X.clone() if dtype is None or dtype == X.dtype else X.to(dtype)
    tall = X.shape[-2] > X.shape[-1]
    Y = Y.mT if tall else Y
    Y.div_(torch.linalg.vector_norm(Y, dim=(-2, -1), keepdim=True).clamp_min(eps))
    product = torch.addmm if X.ndim == 2 else torch.baddbmm
    narrow = Y.dtype
    wide = torch.float32 if narrow in SIXTEEN_BIT and not multiplies_sixteen_bit(Y.device) else narrow
    rounded = lambda Z: Z.to(narrow).to(wide)  # noqa: E731
    Y = Y.to(wide)
    for _ in range(steps):
        A = rounded(Y @ Y.mT)
        Y = rounded(product(Y, rounded(product(A, A, A, beta=b, alpha=c)), Y, beta=a))
    Y = Y.mT if tall else Y
    return Y.to(X.dtype) if out is None else out.copy_(Y)


def multiplies_sixteen_bit(device: torch.device) -> bool:
    """Whether products of 16-bit matrices are made by something that was built for them; a plain loop takes many times as long."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@dataclass(frozen=True, kw_only=True)
class Orthogonal(Inner):
    """``beta``: momentum, None for none; ``precision`` of the products, a key of PRECISIONS."""

    beta: float | None = 0.95
    nesterov: bool = False
    steps: int = 5
    precision: str = "bfloat16"

    first: ClassVar[str | None] = "momentum_buffer"
    names: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def move(self, state: State, B: Tensor, lr: Rate) -> Move:
        U, spare = B, None
        if self.beta is not None:
            M = self._begun(state, "momentum_buffer", B).lerp_(B, 1 - self.beta)
            self.write(state, "momentum_buffer", M)
            U = B.lerp(M, self.beta) if self.nesterov else M
            spare = U if self.nesterov else None
        return Move(newton_schulz(U, self.steps, dtype=PRECISIONS[self.precision], out=spare), None, lr, lr)


@dataclass(frozen=True, kw_only=True)
class UnitColumns(Inner):
    """``eps`` is added to the lengths."""

    eps: float = 1e-8

    names: ClassVar[tuple[str, ...]] = ("Q",)

    def move(self, state: State, B: Tensor, lr: Rate) -> Move:
        Q = B / (torch.linalg.vector_norm(B, dim=-2, keepdim=True) + self.eps)
        state["Q"] = Q
        return Move(Q, None, lr, lr)
