"""Gradients of the linear layers of one block of a LLaMA, in the middle: of a small one in training, or of a trained one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from experiments import runs
from experiments.text import batches, tokens
from experiments.training import models
from experiments.validation.gradients import linear_layers, populations

if TYPE_CHECKING:
    from experiments.optimizers import Config


def gradients_of_a_block(config: Config, run: runs.Run) -> Iterator[tuple[str, Tensor]]:
    """(name of a layer, its gradients (batches, m, n) in float32 on the CPU) for every linear layer of the middle block."""
    if config.model == "tiny":
        text = tokens.tokens(models.PRESETS["tiny"]["vocab_size"])
        model = models.build("tiny", config.seed)
        losses = models.train(model, text.training, steps=config.steps, lr=3e-3, seed=config.seed, quiet=config.quiet)
        run.write("training.json", {"loss": losses, "tokens_sha256": text.sha256})
        stream = text.training
    else:
        model, stream = models.smollm2()
    model.to(runs.device("auto")).eval()  # pyright: ignore[reportArgumentType]
    blocks = sorted({int(name.split(".layers.")[1].split(".")[0]) for name in linear_layers(model) if ".layers." in name})
    names = [name for name in linear_layers(model) if f".layers.{blocks[len(blocks) // 2]}." in name]

    def batch(i: int) -> Tensor:
        return batches.batch(stream, config.seed, "gradients", i, config.sequences, config.length)

    for name, gradients in populations(model, batch, config.batches, names=names):
        yield name, gradients.to(torch.device("cpu"))
