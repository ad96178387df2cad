"""What every training method is, and the plainest: every weight by its full gradient."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from estimators import Coupling, selection
from estimators.convert import Conversion
from estimators.law import Constant
from estimators.transport import Policy, Second
from estimators.writing import Lift
from experiments import allowed

if TYPE_CHECKING:
    from experiments.training.options import Options


class Settings(Protocol):
    """The fields of a configuration that methods read."""

    @property
    def law(self) -> str: ...
    @property
    def rank(self) -> int | float: ...
    @property
    def ranks(self) -> Path | None: ...
    @property
    def c(self) -> Constant: ...
    @property
    def seed(self) -> int: ...
    @property
    def lift_every(self) -> int: ...
    @property
    def refresh_every(self) -> int: ...
    @property
    def state(self) -> Policy: ...
    @property
    def second_moment(self) -> Second | None: ...
    @property
    def coupled(self) -> float: ...
    @property
    def lift(self) -> Lift: ...
    @property
    def store(self) -> bool: ...
    @property
    def keep(self) -> int | float: ...
    @property
    def basis_every(self) -> int: ...
    @property
    def online(self) -> float: ...
    @property
    def lora_scale(self) -> float: ...


def rank_of_layers(settings: Settings) -> selection.Ranks:
    """r of every layer: by name where a file says it, else the same number or fraction for all."""
    return settings.rank if settings.ranks is None else allowed.ranks(settings.ranks)


class Method(abc.ABC):
    """A prepared model. ``handle``: the conversion behind it, if there is one; ``left_alone``: what keeps its plain gradient, and why."""

    handle: Conversion | None = None
    needs: ClassVar[tuple[str, ...]] = ()  # fields that only this method reads
    narrow: ClassVar[bool] = True  # its rank is of features, below the width of the model
    by_layer: ClassVar[bool] = False  # takes a rank for every layer

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        if settings.ranks is not None and not self.by_layer:
            raise ValueError("ranks: a rank for every layer is for lowrank, compact, lora and relora; others take --rank")
        self.model, self.settings = model, settings
        self.left_alone: dict[str, str] = {}
        self.touched_share = 0.0
        self.steps = 0

    @abc.abstractmethod
    def matrices(self) -> list[nn.Parameter]:
        """The trained parameters that stand for the linear layers of the blocks."""

    def others(self) -> list[nn.Parameter]:
        """All other trained parameters."""
        mine = {id(p) for p in self.matrices()}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in mine]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The factors (X, A), shapes (m, r) and (n, r), of matrices that are trained, or move, as X·Aᵀ; views of parameters, or V."""
        return []

    def updates(self, config: Options) -> torch.optim.Optimizer | None:
        """The method's own optimizer of all that is trained; None for torch's, as ``config`` says. Raises ``WrongInput`` for what it cannot do."""
        del config
        return None

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Called once with the optimizer of ``matrices``, before its first step."""
        if self.settings.coupled and self.pairs():
            Coupling(optimizer, self.pairs, self.settings.coupled)

    def after_step(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        """Called once after every optimizer step with the optimizer of ``matrices`` and the factor 1 − ηλ of this step."""
        del optimizer, decay
        self.steps += 1

    def visit(self, ids: Tensor) -> None:
        """Which samples the next forward pass has, (B,) integers, where the loop knows; for methods that remember samples."""
        del ids

    def lr_factor(self, step: int) -> float:
        """What the method does to the learning rate of ``matrices`` at this step, beside the common schedule."""
        del step
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """What belongs in a checkpoint beside the model and the optimizers."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.steps = state["steps"]

    def subspaces(self, optimizer: torch.optim.Optimizer) -> tuple[int, ...]:
        """How many subspaces there were so far, of each matrix or of all at once; none where a matrix has no turn. ``optimizer``: of ``matrices``."""
        del optimizer
        return ()

    def observed(self) -> dict[str, float]:
        """What the method saw of itself in the last step, for the record."""
        return {}

    def finalize(self) -> nn.Module:
        """The plain model again; training is over."""
        return self.model

    def facts(self) -> dict[str, Any]:
        """Sizes that a result should carry: trained and touched weights."""
        return {
            "trained_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "matrix_parameters": sum(p.numel() for p in self.matrices()),
            "touched_share": self.touched_share,
        }


class Full(Method):
    """Every weight by its full gradient."""

    def matrices(self) -> list[nn.Parameter]:
        chosen, _ = selection.choose(self.model, None, 1)
        return [cast(nn.Parameter, layer.weight) for layer in chosen.values()]
