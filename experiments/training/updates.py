"""Which torch optimizer updates which parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from experiments import runs
from experiments.training.methods import Method

if TYPE_CHECKING:
    from experiments.training.options import Options


def optimizers(config: Options, method: Method) -> list[torch.optim.Optimizer]:
    """The optimizer of the method's matrices first; under Muon the other parameters have an AdamW of their own."""
    made = _made(config, method)
    method.attach(made[0])
    return made


def _made(config: Options, method: Method) -> list[torch.optim.Optimizer]:
    if (own := method.updates(config)) is not None:
        return [own]
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    groups = [{"params": method.matrices(), "matrices": True}, {"params": method.others(), "matrices": False}]
    adam = {"betas": (0.9, 0.95), **common}
    match config.optimizer:
        case "adamw":
            return [torch.optim.AdamW(groups, **adam)]
        case "sgd":  # its own weight decay would go through the momentum; ``decay`` keeps it decoupled
            return [torch.optim.SGD(groups, momentum=0.9, lr=config.lr)]
        case "muon":
            return [torch.optim.Muon(groups[:1], **common), torch.optim.AdamW(groups[1:], **adam)]
        case "adamw8bit":
            try:
                from torchao.optim import AdamW8bit
            except ImportError:
                raise runs.WrongInput("optimizer=adamw8bit needs torchao; `pip install torchao` provides it") from None
            return [AdamW8bit(groups, **adam)]


@torch.no_grad()
def decay(config: Options, optimizers: list[torch.optim.Optimizer]) -> None:
    """Decoupled weight decay, before the step, for the optimizers that have none of their own."""
    if config.optimizer == "sgd" and config.weight_decay:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            for p in group["params"]:
                p.mul_(1 - group["lr"] * config.weight_decay)
