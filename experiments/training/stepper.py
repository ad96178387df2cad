"""A model under one training method with one batch, and its optimizer step as calls: what is timed and weighed, without files or schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from estimators import keyed
from experiments.training import models
from experiments.training.methods import METHODS, Method
from experiments.training.objective import Objective
from experiments.training.updates import optimizers

if TYPE_CHECKING:
    from experiments.training.config import Config


class Stepper:
    """``settings``: of ``lowrank pretrain``; a batch of ``sequences`` × ``length`` random tokens, always the same."""

    def __init__(self, settings: Config, device: torch.device) -> None:
        self.settings = settings
        model = models.build(settings.model, settings.seed).to(device)  # pyright: ignore[reportArgumentType]
        if settings.precision == "bf16_weights":
            model.to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
        self.objective = Objective(model, torch.bfloat16 if settings.precision == "bf16" else None)
        self.method: Method = METHODS[settings.method](model, settings)
        self.optimizers = optimizers(settings, self.method)
        generator = keyed.generator(settings.seed, "bench", 0)
        entries = models.PRESETS[settings.model]["vocab_size"]
        self.ids = torch.randint(entries, (settings.sequences, settings.length), generator=generator).to(device)

    def loss(self) -> Tensor:
        """As in training."""
        return self.objective(self.ids)

    def gradients(self) -> None:
        """Forward, backward, clipping."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        trained = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, 1.0)

    def update(self) -> None:
        """What the optimizer does, and the lift."""
        for optimizer in self.optimizers:
            optimizer.step()
        self.method.after_step(self.optimizers[0], 1.0)

    def step(self) -> None:
        """Both."""
        self.gradients()
        self.update()
