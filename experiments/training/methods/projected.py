"""The optimizers of ``optimizers/`` as training methods: weights and gradients are whole, the optimizer's state lives in a frame.

Where the method holds its weights in 8-bit codes, so do the linear layers of the blocks, in one process; DistributedDataParallel cannot send a
weight that takes no memory, and several processes keep floats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from estimators import processes, selection
from experiments.runs import WrongInput
from experiments.training.methods.method import Full, Settings
from optimizers import Subspace, float_weights, int8_weights

if TYPE_CHECKING:
    from experiments.training.options import Options

BETAS = (0.9, 0.95)  # of full AdamW in this loop, and of every method that does not name its own
FIELDS = {
    "rank": "rank",
    "every": "refresh_every",
    "scale": "alpha",
    "variant": "variant",
    "random_from": "random_from",
    "layers": "layers",
}  # option → field of the configuration


class Projected(Full):
    """Linear layers of the blocks by one of ``OPTIMIZERS``, everything else by AdamW in the same optimizer."""

    kind: ClassVar[type[Subspace]]
    options: ClassVar[dict[str, str]]
    fixed: ClassVar[dict[str, Any]] = {}  # options that no field of the configuration stands for

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        super().__init__(model, settings)
        chosen, _ = selection.choose(model, None, 1)
        if self.kind.coded_weights and processes.size() == 1:
            int8_weights(model, set(chosen))
        self.layers = [model.get_submodule(name) for name in chosen]
        self.touched_share = sum(p.numel() for p in self.matrices()) / sum(p.numel() for p in model.parameters())

    def matrices(self) -> list[nn.Parameter]:
        return [cast(nn.Parameter, layer.weight) for layer in self.layers]

    def subspaces(self, optimizer: torch.optim.Optimizer) -> tuple[int, ...]:
        states = [optimizer.state.get(p) for p in self.matrices()]
        return tuple(1 + state["draws"] if state else 0 for state in states)

    def finalize(self) -> nn.Module:
        for p in self.matrices():
            p.requires_grad_(True)  # also of layers that had no turn in the end
        return float_weights(self.model)

    def updates(self, config: Options) -> Subspace:
        """The optimizer of all parameters. Raises ``WrongInput`` for what it cannot do."""
        if config.optimizer not in ("adamw", "adamw8bit"):
            raise WrongInput(f"method={config.method} has its own update; --optimizer adamw8bit keeps its states in 8 bits")
        if config.precision == "bf16_weights" and config.lift == "master":
            raise WrongInput(f"method={config.method} keeps no float32 copies of bf16 weights; use --lift stochastic or --lift nearest")
        if not self.layers:
            raise WrongInput(f"method={config.method}: no linear layer of {type(self.model).__name__} can be projected")
        names = {id(p): name for name, p in self.model.named_parameters()}
        smallest = min(min(p.shape) for p in self.matrices())
        if "rank" in self.options and not 0 < config.rank <= smallest:
            raise WrongInput(
                f"rank={config.rank} is above the smaller side of some matrices, {smallest}; a frame has as many directions at most"
            )
        precision = {"states": "8bit" if config.optimizer == "adamw8bit" else "float"}
        precision["rounding"] = "stochastic" if config.lift == "stochastic" else "nearest"
        groups: list[dict[str, Any]] = [
            {"params": [(names[id(p)], p) for p in self.matrices()], "matrices": True},
            {"params": [(names[id(p)], p) for p in self.others()], "matrices": False, "rank": None, "betas": BETAS, **precision},
        ]
        given = {option: value for option, field in self.options.items() if (value := getattr(config, field)) is not None} | self.fixed
        common: dict[str, Any] = {
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            "seed": config.seed,
        }
        if config.optimizer == "adamw8bit" or not self.kind.takes(states=None):  # where the method has no precision of its own
            common["states"] = precision["states"]
        if config.lift == "stochastic" or not self.kind.takes(rounding=None):
            common["rounding"] = precision["rounding"]
        if not self.kind.takes(betas=BETAS):
            common["betas"] = BETAS
        common |= self.kind.takes(freeze=processes.size() == 1)
        if config.second_moment is not None:
            common["second_moment"] = config.second_moment
        try:
            return self.kind(groups, **common, **given)
        except ValueError as error:
            raise WrongInput(str(error)) from None


def projected(kind: type[Subspace]) -> type[Projected]:
    """The training method of an optimizer; it needs the fields that the optimizer has options for. One that chooses its frame anew at every step by
    default, because it feeds back what the frame leaves out, goes on doing so."""
    options = kind.takes(**FIELDS)
    if "every" in options and kind.default("every") == 1:
        del options["every"]
    return type(kind.__name__, (Projected,), {"kind": kind, "options": options, "needs": tuple(options.values())})
