"""What is trained: a language model with its loss in one module, so that it can be compiled, wrapped and sharded as a whole."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiments.training.loss import linear_cross_entropy


class Objective(nn.Module):
    """Mean next-token cross-entropy of token ids (sequences, length), in nats.

    ``autocast``: the dtype of products, None for that of the weights; ``compile``: compile the body; a pass that
    observers watch must be ``eager``.
    """

    def __init__(self, model: PreTrainedModel, autocast: torch.dtype | None = None, compile: bool = False) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
        body: Any = model.model
        self._compiled = (torch.compile(body),) if compile else (body,)  # in a tuple: it is no second module

    def forward(self, ids: Int[Tensor, "sequences length"], eager: bool = False) -> Float[Tensor, ""]:
        body: Any = self.model.model if eager else self._compiled[0]
        head: Any = self.model.get_output_embeddings()
        # every weight is cast once in a pass: a cache of the casts would only hold them, where blocks are recomputed all of them at once
        with torch.autocast(ids.device.type, self.autocast, cache_enabled=False) if self.autocast else nullcontext():
            hidden = body(input_ids=ids[:, :-1]).last_hidden_state
            return linear_cross_entropy(hidden.flatten(0, 1), head.weight, ids[:, 1:].flatten())
