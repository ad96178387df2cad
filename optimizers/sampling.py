"""Layers by turns: what LISA, OwLore and BAdam share. A layer that has no turn keeps no state, takes no step, and needs no gradient.

With ``freeze`` the matrices of such layers have ``requires_grad=False`` during the period, so that backward passes form no gradients for them; set
it to False under DistributedDataParallel, which must know the parameters that take part from the start.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from optimizers.buckets import names
from optimizers.selections import Turns
from optimizers.subspace import Params, Subspace


class LayerSampling(Subspace):
    """Base. The options of a group: ``rank``, layers in a period; ``every``, its steps; ``freeze``."""

    def __init__(self, params: Params, lr: float, own: dict[str, Any], *, seed: int = 0, **options: Any) -> None:
        super().__init__(params, lr, own, seed=seed, **options)
        self._open(self.param_groups)

    @abstractmethod
    def turns(self, group: dict[str, Any]) -> Turns:
        """Whose turn it is."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As in the base; at the end of a period the next layers are opened and the others closed."""
        loss = super().step(closure)
        self._open([group for group in self.param_groups if group["rank"] is not None and group["clock"] % group["every"] == 0])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in the base, and the layers of the period are opened."""
        super().load_state_dict(state_dict)
        self._open(self.param_groups)

    def _open(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            if group["rank"] is None:
                continue
            active = self.turns(group).active(names(self, group), group["seed"], group["clock"] // group["every"])
            for p, open_now in zip(group["params"], active, strict=True):
                if not open_now:
                    self.state.pop(p, None)
                if group["freeze"]:
                    p.requires_grad_(open_now)
                if group["freeze"] and not open_now:
                    p.grad = None
