"""VeLoRA: every token is cut into groups of features, and of each group one number is kept, its component along one fixed direction.

Of X (T×n) in sub-tokens x of n/g features the layer keeps z = ⟨x, v⟩ (T×g), and ΔᵀX is estimated by ΔᵀX̂ with x̂ = z·v. Biased: X̂ is the projection
of X on the g-dimensional space of the v of each group, the same for every draw, as ``fixed_basis`` on the features; what is orthogonal is
lost at every step. Error: theory/truncated.py with the basis I_g ⊗ v. v is the normalised mean of the sub-tokens of the first batch, and is state.
Reference: arXiv 2405.17991. Differs from the published code, which scales the estimate by a hyperparameter; under Adam it would not matter.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from estimators import processes, selection
from estimators.compressed import Keeper, Key


class VeLoRA(Keeper):
    """``groups``: g, a divisor of n, or a fraction of n in (0, 1] that is rounded down to one. Raises ``ValueError`` for others."""

    unbiased = False

    def __init__(self, groups: int | float = 32) -> None:
        if isinstance(groups, bool) or not (groups >= 1 if isinstance(groups, int) else 0 < groups <= 1):
            raise ValueError(f"VeLoRA(groups={groups!r}): groups must be a positive integer, or a fraction of in_features in (0, 1]")
        self.groups = groups
        self.v: Tensor | None = None

    def __repr__(self) -> str:
        return f"VeLoRA(groups={self.groups})"

    def count(self, n: int) -> int:
        """g of a layer with n features."""
        wanted = selection.rank_of(n, self.groups)
        if isinstance(self.groups, int):
            if n % wanted:
                raise ValueError(f"VeLoRA(groups={self.groups}): in_features={n} is not a multiple of groups")
            return wanted
        return next(g for g in range(wanted, 0, -1) if n % g == 0)

    def keep(self, X: Float[Tensor, "t n"], key: Key) -> tuple[Tensor, ...]:
        del key  # nothing is random
        cut = X.unflatten(1, (self.count(X.shape[1]), -1))
        v = self._direction(cut).to(cut)
        return cut @ v, v

    def gradient(self, kept: tuple[Tensor, ...], D: Float[Tensor, "t m"], key: Key) -> Float[Tensor, "m n"]:
        del key
        z, v = kept
        return ((D.mT @ z).unsqueeze(-1) * v).flatten(1)

    def _direction(self, cut: Float[Tensor, "t g s"]) -> Float[Tensor, " s"]:
        """v, of the first batch whose mean sub-token has a direction, over all processes; equal entries for a batch that has none."""
        if self.v is None:
            wide = torch.promote_types(cut.dtype, torch.float32)
            mean = processes.mean(cut.to(wide).mean((0, 1)))
            norm = mean.norm()
            if not bool((norm > 0) & torch.isfinite(norm)):
                return torch.full_like(mean, len(mean) ** -0.5)
            self.v = mean / norm
        return self.v

    def state_dict(self) -> dict[str, Any]:
        return {} if self.v is None else {"v": self.v}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.v = state.get("v")
