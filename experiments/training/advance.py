"""What an optimizer step is beside its forward passes: learning rates before; then the backward pass, the check, clipping, and the update.

``fused``: every parameter is updated inside the backward pass, and its gradient is freed (optimizers/per_layer.py). Clipping by the norm of all
gradients then takes two backward passes over one graph; the steps are the same as without, up to rounding of the norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from experiments.runs import WrongInput
from experiments.training import parallel, updates
from experiments.training.methods import Method
from optimizers import PerLayer, Subspace, UnusableGradient

if TYPE_CHECKING:
    from experiments.training.options import Options


class Advance:
    """The optimizers of ``method`` at work. ``accumulate``: micro-batches a step. Raises ``WrongInput`` for a fused update that cannot be."""

    def __init__(self, config: Options, method: Method, optimizers: list[torch.optim.Optimizer], accumulate: int = 1) -> None:
        self.config, self.method, self.optimizers = config, method, optimizers
        self.names = {id(p): name for name, p in method.model.named_parameters()}
        self.fault: str | None = None  # of a gradient inside a fused backward pass
        self.norm: float | None = None  # of all gradients, where that pass was clipped
        self.fused = self._fuse(accumulate) if config.fused else None

    def _fuse(self, accumulate: int) -> PerLayer:
        config = self.config
        (optimizer, *more) = self.optimizers
        if more or not isinstance(optimizer, Subspace):
            raise WrongInput(f"fused updates are for the optimizers of `lowrank optimizers`; method={config.method} has torch's")
        try:
            return PerLayer(optimizer, accumulate=accumulate, clip_total=config.clip or None)
        except ValueError as error:
            raise WrongInput(f"fused: {error}") from None

    @property
    def trained(self) -> list[nn.Parameter]:
        """All parameters that have an optimizer."""
        return [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]

    def begin(self, factor: float, keep: bool = False) -> None:
        """``factor``: share of the peak learning rates; ``keep``: gradients are zeroed in place."""
        config, method = self.config, self.method
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                peak = config.lr if group["matrices"] or config.other_lr is None else config.other_lr
                lr = peak * factor * (method.lr_factor(method.steps) if group["matrices"] else 1.0)
                # torchao holds a tensor and refuses a number in its place
                group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr
            optimizer.zero_grad(set_to_none=not keep)
        self.fault = self.norm = None
        if self.fused:
            self.fused.restart()

    def backward(self, loss: Tensor) -> None:
        """Of one micro-batch; nothing more after one that was at fault."""
        if self.fault is not None:
            return
        if self.fused is None:
            loss.backward()
            return
        try:
            self.norm = self.fused.backward(loss)
        except UnusableGradient as error:
            self.fault = str(error)

    def end(self, loss: float, ended: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """The row of the step: ``kind`` "train", or "skip" where loss or gradients are not finite and nothing was updated that was not fused.
        ``ended`` is called between the update and what the method does afterwards."""
        config, trained = self.config, self.trained
        total = None if self.fused else parallel.plain(nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
        norm = self.norm if total is None else float(total)
        seen = {"loss": loss} | ({} if norm is None else {"grad_norm": norm})
        if self.fault or not all(map(math.isfinite, seen.values())):
            return {"kind": "skip", "where": self.fault or self._where(trained)} | {name: str(value) for name, value in seen.items()}
        if total is not None:  # not before: a norm that is NaN would spread to all
            nn.utils.clip_grads_with_norm_(trained, config.clip or math.inf, total)
        updates.decay(config, self.optimizers)
        for optimizer in self.optimizers:
            optimizer.step()
        ended()
        matrices = self.optimizers[0]
        self.method.after_step(matrices, 1 - float(matrices.param_groups[0]["lr"]) * config.weight_decay)
        return {"kind": "train", **seen, **self.method.observed()}

    def _where(self, trained: list[nn.Parameter]) -> str:
        """The first parameter whose gradient is not finite, or the loss."""
        for p in trained:
            if p.grad is not None and not bool(torch.isfinite(parallel.plain(p.grad)).all()):
                return self.names[id(p)]
        return "the loss"
