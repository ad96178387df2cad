"""The user's model and text: what is trained, with which loss, on which mini-batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from experiments.finetuning import pretrained
from experiments.runs import WrongInput
from experiments.text import batches, corpus, tokens
from experiments.training import models

if TYPE_CHECKING:
    from experiments.advise import Config

MASKED = 0.15  # share of tokens that a masked language model has to guess
IGNORED = -100


@dataclass(frozen=True)
class Subject:
    """``model`` in float32 in training mode without dropout; ``stream``: token ids of the text, (tokens,)."""

    model: nn.Module
    stream: np.ndarray
    mask: int | None  # id of the mask token of a masked language model, None for one that continues text
    seed: int
    sequences: int
    length: int

    def batch(self, index: int) -> Tensor:
        """Token ids of mini-batch ``index``, (sequences, length)."""
        return batches.batch(self.stream, self.seed, "advise", index, self.sequences, self.length)

    def loss(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Mean cross-entropy in nats: of next tokens, or of 15 % masked ones, which are the same for the same ids."""
        if self.mask is None:
            return models.loss_of(model, ids)
        generator = torch.Generator().manual_seed(self.seed)  # places, not tokens
        hidden = torch.rand(ids.shape, generator=generator) < MASKED
        hidden[:, 0] = True  # never none
        device = next(model.parameters()).device
        labels = torch.where(hidden, ids, IGNORED).to(device)
        return model(input_ids=torch.where(hidden, self.mask, ids).to(device), labels=labels).loss

    def again(self) -> nn.Module:
        """The same model, another object."""
        return copy.deepcopy(self.model)

    def unweighted(self) -> Callable[[], nn.Module]:
        """Builds a model of this shape, with whatever weights; for fake tensors."""
        kind, config = type(self.model), copy.deepcopy(self.model.config)
        return lambda: kind(config)  # pyright: ignore[reportCallIssue]


def load(config: Config) -> Subject:
    """Model and text. Raises ``WrongInput`` for a model without the output of a language model, or less text than ``batches`` need."""
    needed = config.batches * config.sequences * config.length
    mask = None
    if config.model in models.PRESETS:
        model: nn.Module = models.build(config.model, config.seed)
        if config.data != corpus.MOVIE_REVIEWS:
            raise WrongInput(
                f"{config.model} has random weights and a tokenizer of the default corpus; for data={config.data} name a model folder"
            )
        stream = tokens.tokens(models.PRESETS[config.model]["vocab_size"]).training
    else:
        model, tokenizer = pretrained.load(config.model, "prompt", 2, config.seed)
        mask = tokenizer.mask_token_id
        separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        stream = _encoded(
            config.data, lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"], separator, needed
        )
    if len(stream) < needed:
        raise WrongInput(
            f"{config.data} has {len(stream):,} tokens; batches={config.batches} × sequences={config.sequences} × length={config.length} "
            f"need {needed:,}"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and config.length > limit:
        raise WrongInput(f"length={config.length} is above the {limit} positions of {config.model}")
    _without_dropout(model)
    model.train()
    return Subject(model, stream, mask, config.seed, config.sequences, config.length)


def _encoded(data: str, encode: Callable[[list[str]], list[list[int]]], separator: int | None, needed: int) -> np.ndarray:
    """Token ids of whole documents, separated, until there are enough to choose mini-batches from."""
    found: list[np.ndarray] = []
    count = 0
    for texts in corpus.batched(corpus.read((data,)), 64, 10**6):
        for ids in encode([document.text for document in texts]):
            found.append(np.array(ids if separator is None else [*ids, separator], dtype=np.int64))
            count += len(found[-1])
        if count >= 4 * needed:
            break
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def _without_dropout(model: nn.Module) -> None:
    """Its noise would be counted as that of the text."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in ("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
