"""A model under one training method with one batch, and its optimizer step as calls: what is timed and weighed, without files or schedule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from estimators import keyed
from experiments.training import models
from experiments.training.loss import CHUNK_BYTES
from experiments.training.methods import METHODS, Method
from experiments.training.objective import Objective
from experiments.training.updates import optimizers
from optimizers import Subspace, ZerothOrder, per_layer

if TYPE_CHECKING:
    from experiments.training.config import Config


@dataclass(frozen=True)
class Task:
    """What a step works on: ``loss`` makes a forward pass of ``model`` on a batch, always the same."""

    model: nn.Module
    loss: Callable[[], Tensor]


def language(settings: Config, device: torch.device, **changes: int) -> Task:
    """Next tokens of ``sequences`` × ``length`` random tokens, by a LLaMA preset; ``changes``: to its sizes."""
    model = models.build(settings.model, settings.seed, **changes).to(device)  # pyright: ignore[reportArgumentType]
    if settings.precision == "bf16_weights":
        models.in_bfloat16(model)
    objective = Objective(model, torch.bfloat16 if settings.precision == "bf16" else None, settings.compile)
    generator = keyed.generator(settings.seed, "bench", 0)
    entries = models.PRESETS[settings.model]["vocab_size"]
    ids = torch.randint(entries, (settings.sequences, settings.length), generator=generator).to(device)
    return Task(model, lambda: objective(ids) if torch.is_grad_enabled() else _by_modules(objective, ids))


def _by_modules(objective: Objective, ids: Tensor) -> Tensor:
    """The same loss with the head called as a module, as methods without gradients need it, on as many tokens at a time."""
    model: Any = objective.model
    head = model.get_output_embeddings()
    chunk = max(1, min(1024, CHUNK_BYTES // (4 * len(head.weight))))
    with torch.autocast(ids.device.type, objective.autocast) if objective.autocast else nullcontext():
        hidden, targets = model.model(input_ids=ids[:, :-1]).last_hidden_state.flatten(0, 1), ids[:, 1:].flatten()
        parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
        return sum((F.cross_entropy(head(h), t, reduction="sum") for h, t in parts), hidden.new_zeros(())) / len(targets)


class Stepper:
    """``settings``: of ``lowrank pretrain``; they say what the task is where none is given."""

    def __init__(self, settings: Config, device: torch.device, task: Task | None = None) -> None:
        self.settings = settings
        self.task = task or language(settings, device)
        self.method: Method = METHODS[settings.method](self.task.model, settings)
        self.optimizers = optimizers(settings, self.method)

    def loss(self) -> Tensor:
        """As in training."""
        return self.task.loss()

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


class FusedStepper(Stepper):
    """Every parameter is updated inside the backward pass, as soon as its gradient is complete, and the gradient is freed: by ``per_layer`` where
    the optimizer can step for one parameter, else by a step while no other parameter has a gradient. No clipping, which would need all of them."""

    def __init__(self, settings: Config, device: torch.device, task: Task | None = None) -> None:
        super().__init__(settings, device, task)
        for optimizer in self.optimizers:
            if isinstance(optimizer, Subspace):
                per_layer(optimizer)
                continue
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: _arrived(p, optimizer))

    def gradients(self) -> None:
        """Forward and backward with the updates."""
        self.loss().backward()

    def update(self) -> None:
        """What is left: of frames what no gradient arrived for, and the lift."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, Subspace):
                optimizer.step()
        self.method.after_step(self.optimizers[0], 1.0)


def _arrived(p: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    p.grad = None


class ForwardStepper:
    """A method without gradients (``ZEROTH_ORDER``) with the options that are its own; the model does not drop anything out."""

    def __init__(self, kind: type[ZerothOrder], task: Task, **options: Any) -> None:
        self.task = task
        task.model.eval()
        self.optimizers: list[torch.optim.Optimizer] = [kind(task.model, **options)]

    def step(self) -> None:
        """Forward passes and the update."""
        for optimizer in self.optimizers:
            optimizer.step(self.task.loss)  # pyright: ignore[reportCallIssue, reportArgumentType]
