"""Methods that keep less of the inputs of the blocks' linear layers: ``estimators.compress`` with one rule each, and CompAct.

The weights are trained by the configured optimizer as under ``adamw``; what they get is an estimate of their gradient. ``tokens``: any law on the
tokens of a layer's input, ``rank`` its r, a fraction that of the tokens; ``rad``: Rademacher V on the features (2007.10412); ``wta_crs``: ``rank``
tokens (2305.15265), with a table of the last visit where the loop names its samples; ``velora``: ``rank`` groups of features, rounded down to a
divisor of n (2405.17991). CompAct (2410.15352) is LowRank-IPA with a Gaussian V that is drawn from its key at each use.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from estimators import WTACRS, Keeper, LawOnFeatures, LawOnTokens, VeLoRA, compress, selection
from experiments.training.methods.lowrank import LowRank
from experiments.training.methods.method import Method, Settings


class Compressed(Method):
    """Every weight by an estimate of its gradient from what ``keeper`` keeps."""

    needs: ClassVar[tuple[str, ...]] = ("rank",)

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        super().__init__(model, settings)
        self.compression = compress(model, keeper=self.keeper, seed=settings.seed)
        self.left_alone, self.touched_share = self.compression.left_alone, self.compression.touched_share

    @abc.abstractmethod
    def keeper(self, linear: nn.Linear) -> Keeper:
        """The rule of a layer."""

    def matrices(self) -> list[nn.Parameter]:
        return [layer.weight for layer in self.compression.layers.values()]

    def visit(self, ids: Tensor) -> None:
        self.compression.visit(ids)

    def after_step(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        super().after_step(optimizer, decay)
        self.compression.step()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"handle": self.compression.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.compression.load_state_dict(state["handle"])

    def finalize(self) -> nn.Module:
        return self.compression.finalize()


class Tokens(Compressed):
    """A law on the tokens."""

    needs = ("law", "rank")
    narrow = False

    def keeper(self, linear: nn.Linear) -> Keeper:
        del linear
        return LawOnTokens(self.settings.law, self.settings.rank)


class RAD(Compressed):
    """Rademacher V on the features."""

    def keeper(self, linear: nn.Linear) -> Keeper:
        del linear
        return LawOnFeatures("rademacher", self.settings.rank)


class WinnersTakeAll(Compressed):
    """WTA-CRS."""

    narrow = False

    def keeper(self, linear: nn.Linear) -> Keeper:
        del linear
        return WTACRS(self.settings.rank)


class Groups(Compressed):
    """VeLoRA."""

    def keeper(self, linear: nn.Linear) -> Keeper:
        n = linear.in_features
        return VeLoRA(min(1.0, selection.rank_of(n, self.settings.rank) / n))  # as a fraction, which is rounded down to a divisor


class CompAct(LowRank):
    """Gaussian V that is not kept."""

    needs = ("rank", "c", "lift_every", "refresh_every", "state", "second_moment", "lift")
    fixed: ClassVar[dict[str, Any]] = {"law": "gaussian", "store": False}
