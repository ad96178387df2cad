"""How a lift or a decay reaches a weight: float32 and wider as it is, 16-bit ones through a float32 master or rounded to their format.

``master``: a float32 copy, taken before the first write, carries what is below the spacing of the format; ``stochastic``: rounding that is
right in expectation (estimators/rounding.py); ``nearest``: small changes get lost. Of a weight sharded over processes each writes its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor

from estimators import keyed, processes
from estimators.rounding import SIXTEEN_BIT, stochastic_round

Lift = Literal["master", "stochastic", "nearest"]


class Writer:
    """Changes named weights in place. ``masters``: float32 copies (m, n) by name, sharded as the weight is."""

    def __init__(self, lift: Lift, seed: int) -> None:
        self.lift, self.seed = lift, seed
        self.masters: dict[str, Tensor] = {}

    def write(self, name: str, weight: Tensor, step: int, what: str, change: Callable[[Tensor], Tensor]) -> None:
        """``change`` the rows of ``weight`` held here, in place; (name, what, step) keys the rounding."""
        W = processes.local(weight)
        if W.dtype not in SIXTEEN_BIT:
            change(W)
        elif self.lift == "master":
            if name not in self.masters:
                self.masters[name] = weight.detach().float()
            W.copy_(change(processes.local(self.masters[name])))
        else:
            exact = change(W.detach().float())
            rows = f".{row}" if (row := processes.first_row(weight)) else ""  # other rows are rounded by other numbers
            generator = keyed.generator(self.seed, f"{name}.{what}{rows}", step, W.device)
            W.copy_(stochastic_round(exact, W.dtype, generator) if self.lift == "stochastic" else exact)

    def has_master(self, weight: Tensor) -> bool:
        """Whether this weight has a master, from its first write on."""
        return self.lift == "master" and weight.dtype in SIXTEEN_BIT

    def load(self, masters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Take over full ``masters`` of a checkpoint."""
        self.masters = {name: processes.like(master.to(weights[name].device), weights[name]) for name, master in masters.items()}
