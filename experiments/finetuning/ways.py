"""The two ways of a step: by gradients, and by differences of losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from experiments import runs
from experiments.finetuning.config import Tuning
from experiments.finetuning.objectives import Objective
from experiments.training import updates
from experiments.training.advance import Advance
from experiments.training.methods import METHODS, Method
from experiments.training.options import Options
from optimizers import ZEROTH_ORDER, ZerothOrder


class Gradients:
    """Backpropagation, by one of ``methods``."""

    def __init__(self, config: Options, objective: Objective, methods: Mapping[str, type[Method]] = METHODS) -> None:
        self.config, self.objective = config, objective
        try:
            self.method = methods[config.method](objective.model, config)
        except ValueError as error:
            raise runs.WrongInput(str(error)) from None
        self.optimizers = updates.optimizers(config, self.method)
        self.advance = Advance(config, self.method, self.optimizers)
        self.skipped = 0
        self.trained = sum(p.numel() for p in objective.model.parameters() if p.requires_grad)

    def step(self, batch: dict[str, Tensor], factor: float) -> dict[str, Any]:
        """One; ``factor``: share of the peak learning rates."""
        self.objective.train()
        self.advance.begin(factor)
        loss = self.objective(batch)
        self.advance.backward(loss)
        row = self.advance.end(float(loss.detach()))
        self.skipped += row["kind"] == "skip"
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
