"""MeZO: zeroth order along whole Gaussian directions (arXiv 2305.17333).

    z standard normal, as many numbers as there are weights;   δ from F at θ ± εz;   θ ← (1 − ηλ)θ − η·δz

Unbiased up to the ε² of the difference; E‖δz‖² = (d+2)‖g‖² with d weights. State: none.

Differs from the published code: weights are not perturbed in place, where two additions and a subtraction leave a rounding error at every step;
momentum, several queries and other forms of the difference are those of the common loop.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from optimizers.zeroth import WHOLE, Directions, ZerothOrder


class MeZO(ZerothOrder):
    """See the module docstring."""

    def __init__(self, model: nn.Module, lr: float = 1e-6, **options: Any) -> None:
        super().__init__(model, lr, **options)

    def directions(self, group: dict[str, Any]) -> Directions:  # noqa: ARG002
        return WHOLE
