"""SubZero: zeroth order along UZVᵀ with orthonormal U and V, held for T steps (arXiv 2410.08989).

    every T steps: U (m×r), V (n×r) Haar–Stiefel, orthonormal;   Z (r×r) standard normal
    δ from F at W ± ε·s·UZVᵀ,  s = √(mn)/r;   W ← (1 − ηλ)W − η·δ·s·UZVᵀ

With s, E‖D‖² = mn is that of a whole Gaussian direction and the estimate is unbiased up to the ε² of the difference: both sides are the Haar–Stiefel
law at c = 1 (theory/mse.py, ``lr_two_sided``). State: none; with momentum r² elements. Vectors get whole directions.

``scaled=False``: s = 1, the formula of the paper; the factor is its published code's. E is then (r²/(mn))·g, which a learning rate pays back if all
matrices have one shape. The published code is copyleft and was not read. Differs from it: matrices that are far from square are taken as they are.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from estimators.haar_stiefel import HaarStiefel
from optimizers.zeroth import Directions, ZerothOrder


def orthonormal(n: int, rank: int) -> HaarStiefel:
    """The Haar–Stiefel law whose V is orthonormal as it is, c = r/n."""
    return HaarStiefel(n=n, rank=rank, c=rank / n)


class SubZero(ZerothOrder):
    """See the module docstring. ``rank``: r; ``every``: T in steps."""

    def __init__(
        self, model: nn.Module, lr: float = 1e-6, *, rank: int | float = 8, every: int = 2000, scaled: bool = True, **options: Any
    ) -> None:
        if every < 1:
            raise ValueError(f"SubZero(every={every}): must be at least 1")
        super().__init__(model, lr, {"rank": rank, "every": every, "scaled": scaled}, **options)

    def directions(self, group: dict[str, Any]) -> Directions:
        law = HaarStiefel if group["scaled"] else orthonormal
        return Directions(left=law, right=law, rank=group["rank"], every=group["every"])
