"""LowRank-IPA: the linear layers of the blocks converted by ``estimators.convert``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from estimators.convert import convert
from experiments.training.methods.method import Method, Settings, rank_of_layers


class LowRank(Method):
    """LowRank-IPA: ``estimators.convert``."""

    needs = ("law", "rank", "c", "lift_every", "refresh_every", "state", "second_moment", "lift", "store", "keep", "basis_every", "online")
    by_layer = True
    fixed: ClassVar[dict[str, Any]] = {}  # what the method chooses itself

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        super().__init__(model, settings)
        values = {name: getattr(settings, name) for name in self.needs} | {"rank": rank_of_layers(settings)}
        self.handle = handle = convert(model, seed=settings.seed, **values, **self.fixed)
        self.conversion, self.left_alone, self.touched_share = handle, handle.left_alone, handle.touched_share

    def matrices(self) -> list[nn.Parameter]:
        return self.conversion.subspace_parameters()

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(layer.B, layer.basis()) for layer in self.conversion.layers.values()]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        super().attach(optimizer)
        self.conversion.attach(optimizer)

    def after_step(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        super().after_step(optimizer, decay)
        self.conversion.step(optimizer, decay=decay)

    def subspaces(self, optimizer: torch.optim.Optimizer) -> tuple[int, ...]:
        del optimizer
        return (self.conversion.draws,)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"handle": self.conversion.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.conversion.load_state_dict(state["handle"])

    def finalize(self) -> nn.Module:
        return self.conversion.finalize()
