"""GradLite's layer: r directions U that the error signals Δ lie in, followed from batch to batch, beside a rule for what is kept of X.

    U ← orth(ΔᵀΔU), one step of orthogonal iteration an optimizer step, from the first backward pass in it; two from a Haar frame at the start;
    ``static``: that frame for good

ΔUUᵀ is the best approximation of Δ in these directions as U settles; with it the gradient of the weight is UUᵀ(ΔᵀX), a low-rank Jacobian
(arXiv 2510.22467). The layer itself gives the whole estimate of ΔᵀX, as ``inputs`` has it (``Inputs``: exact; a law on the features: XV is kept,
unbiased), and whoever updates the weight takes ``U`` for the projection and what it leaves out for the feedback (optimizers/gradlite.py).
∂L/∂X = ΔW stays exact, so U is that of the true error signals. Several processes follow the Δ of all of them: m×r numbers are averaged once a step.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from estimators import directions, processes, selection
from estimators.compressed import Keeper, Key
from estimators.haar_stiefel import orthonormalize


class Inputs(Keeper):
    """All of X is kept: ΔᵀX itself."""

    def __repr__(self) -> str:
        return "Inputs()"

    def keep(self, X: Float[Tensor, "t n"], key: Key) -> tuple[Tensor, ...]:  # noqa: ARG002
        return (X,)

    def gradient(self, kept: tuple[Tensor, ...], D: Float[Tensor, "t m"], key: Key) -> Float[Tensor, "m n"]:  # noqa: ARG002
        return D.mT @ kept[0]


class ErrorBasis(Keeper):
    """``inputs``: the rule for X; ``rank``: r, at most m, or a fraction of m in (0, 1]. ``U``: (m, r) orthonormal columns in float32 or better, None
    before the first backward pass; ``captured``: ‖ΔU‖²/‖Δ‖² of the last, with the U that it ended with. Raises ``ValueError`` for other ranks."""

    def __init__(self, inputs: Keeper, rank: int | float, *, static: bool = False) -> None:
        if isinstance(rank, bool) or not (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1):
            raise ValueError(f"ErrorBasis(rank={rank!r}): rank must be a positive integer, or a fraction of out_features in (0, 1]")
        self.inputs, self.rank, self.static = inputs, rank, static
        self.unbiased = inputs.unbiased
        self.U: Tensor | None = None
        self.captured: Tensor | None = None
        self._last: int | None = None  # step that U was moved in

    def __repr__(self) -> str:
        return f"ErrorBasis({self.inputs!r}, rank={self.rank}, static={self.static})"

    def keep(self, X: Float[Tensor, "t n"], key: Key) -> tuple[Tensor, ...]:
        return self.inputs.keep(X, key)

    def gradient(self, kept: tuple[Tensor, ...], D: Float[Tensor, "t m"], key: Key) -> Float[Tensor, "m n"]:
        if key.index != self._last:  # once a step, also where clipping takes two passes
            self._last = key.index
            self._follow(D, key)
        return self.inputs.gradient(kept, D, key)

    def _follow(self, D: Float[Tensor, "t m"], key: Key) -> None:
        """One step of the iteration, and how much of Δ it then holds. A Δ that is zero or not finite has no directions, and changes nothing."""
        exact = D.to(torch.promote_types(D.dtype, torch.float32))
        energy = processes.mean(exact.square().sum())
        if self.U is None:
            m = D.shape[1]
            r = min(m, selection.rank_of(m, self.rank))
            generator = key.generator("errors", alike=True)
            U, steps = orthonormalize(torch.randn(m, r, generator=generator, dtype=exact.dtype, device=D.device)), 2
        else:
            U, steps = self.U.to(exact), 1  # a checkpoint gives it back on the CPU
        if bool((energy > 0) & torch.isfinite(energy)):
            for _ in range(0 if self.static else steps):
                U = torch.linalg.qr(processes.mean(exact.mT @ (exact @ U)))[0]
                self.captured = _share(exact, U, energy)
                if self.captured >= directions.ENOUGH:  # another step would turn U by rounding
                    break
            if self.static:
                self.captured = _share(exact, U, energy)
        self.U = U.contiguous()  # as a checkpoint gives it back: products round by the layout

    def visit(self, ids: Int[Tensor, " b"]) -> None:
        self.inputs.visit(ids)

    def step(self) -> None:
        self.inputs.step()

    def state_dict(self) -> dict[str, Any]:
        own = {} if self.U is None else {"U": self.U, "last": -1 if self._last is None else self._last}
        return own | {f"inputs.{name}": value for name, value in self.inputs.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.U, self._last, self.captured = state.get("U"), state.get("last"), None
        self.inputs.load_state_dict({name.removeprefix("inputs."): value for name, value in state.items() if name.startswith("inputs.")})


def _share(D: Float[Tensor, "t m"], U: Float[Tensor, "m r"], energy: Tensor) -> Tensor:
    """‖ΔU‖²/‖Δ‖² over all processes."""
    return processes.mean((D @ U).square().sum()) / energy
