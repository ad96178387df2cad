"""The two ways of a step: by gradients, and by differences of losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiments import runs
from experiments.finetuning.config import Tuning
from experiments.finetuning.objectives import Objective
from experiments.training import updates
from experiments.training.methods import METHODS, Method
from optimizers import ZEROTH_ORDER, ZerothOrder


class Gradients:
    """Backpropagation, by a method of ``METHODS``."""

    def __init__(self, config: Tuning, objective: Objective) -> None:
        self.config, self.objective = config, objective
        try:
            self.method: Method = METHODS[config.method](objective.model, config)
        except ValueError as error:
            raise runs.WrongInput(str(error)) from None
        self.optimizers = updates.optimizers(config, self.method)
        self.skipped = 0
        self.trained = sum(p.numel() for p in objective.model.parameters() if p.requires_grad)

    def step(self, batch: dict[str, Tensor], factor: float) -> dict[str, Any]:
        """One; ``factor``: share of the peak learning rates."""
        config, method = self.config, self.method
        self.objective.train()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                peak = config.lr if group["matrices"] or config.other_lr is None else config.other_lr
                lr = peak * factor * (method.lr_factor(method.steps) if group["matrices"] else 1.0)
                group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr  # torchao holds a tensor
            optimizer.zero_grad(set_to_none=True)
        loss = self.objective(batch)
        loss.backward()
        trained = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        row = {"loss": float(loss.detach()), "grad_norm": float(norm)}
        if not all(map(math.isfinite, row.values())):
            self.skipped += 1
            return {"kind": "skip"} | {name: str(value) for name, value in row.items()}
        nn.utils.clip_grads_with_norm_(trained, config.clip or math.inf, norm)
        updates.decay(config, self.optimizers)
        for optimizer in self.optimizers:
            optimizer.step()
        matrices = self.optimizers[0]
        method.after_step(matrices, 1 - float(matrices.param_groups[0]["lr"]) * config.weight_decay)
        return row

    def finalize(self) -> nn.Module:
        return self.method.finalize()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [o.state_dict() for o in self.optimizers], "method": self.method.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.method.load_state_dict(state["method"])
        self.skipped = state["skipped"]


class Differences:
    """Forward passes alone, by a method of ``ZEROTH_ORDER``. Its rank and period are options only where its class has them."""

    def __init__(self, config: Tuning, objective: Objective) -> None:
        self.config, self.objective = config, objective
        kind = ZEROTH_ORDER[config.method]
        own = kind.takes(law=config.law, c=config.c, rank=config.rank, every=config.refresh_every)
        rounding = "stochastic" if config.lift == "stochastic" else "nearest"
        common = {name: getattr(config, name) for name in ("epsilon", "queries", "momentum", "weight_decay", "seed")}
        make: Callable[..., ZerothOrder] = kind
        try:
            self.optimizer = make(objective.model, config.lr, rounding=rounding, **common, **own)
        except ValueError as error:
            raise runs.WrongInput(str(error)) from None
        self.optimizers: list[torch.optim.Optimizer] = [self.optimizer]
        self.trained = sum(p.numel() for p in objective.model.parameters() if p.requires_grad)

    @property
    def skipped(self) -> int:
        """Queries without a finite loss."""
        return self.optimizer.skipped

    def step(self, batch: dict[str, Tensor], factor: float) -> dict[str, Any]:
        """One; ``factor``: share of the peak learning rate."""
        self.objective.eval()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * factor
        loss = float(self.optimizer.step(lambda: self.objective(batch)))  # not a number where no query had finite losses
        return {"loss": loss} if math.isfinite(loss) else {"kind": "skip", "loss": str(loss)}

    def finalize(self) -> nn.Module:
        return self.objective.model

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
