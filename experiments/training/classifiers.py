"""Sequence classifiers of the RoBERTa family, built from a configuration with random weights: for memory and time, which weights do not change."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from estimators import keyed
from experiments.training.stepper import Task


def _roberta(hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
    }


PRESETS = {  # "roberta-large" as published (1907.11692); "roberta-tiny" for tests
    "roberta-large": _roberta(1024, 4096, 24, 16, vocabulary=50265),
    "roberta-tiny": _roberta(64, 256, 2, 4, vocabulary=1000),
}
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


def classification(preset: str, sequences: int, length: int, seed: int, precision: str, device: torch.device) -> Task:
    """Two classes of ``sequences`` × ``length`` random tokens without padding; without dropout. Raises ``ValueError`` for a precision that is not
    fp32 or bf16, and for more tokens a sequence than there are positions."""
    if precision not in PRECISIONS:
        raise ValueError(f"classification(precision={precision!r}): known are {', '.join(PRECISIONS)}")
    if not 1 <= length <= (limit := PRESETS[preset]["max_position_embeddings"] - 2):
        raise ValueError(f"classification(length={length}): must be between 1 and the model's {limit}")
    fields: dict[str, Any] = {
        "num_labels": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "sdpa",
    }
    config = RobertaConfig(**PRESETS[preset], **fields)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = RobertaForSequenceClassification(config).to(device)  # pyright: ignore[reportArgumentType]
    generator = keyed.generator(seed, "footprint", 0)
    ids = torch.randint(3, PRESETS[preset]["vocab_size"], (sequences, length), generator=generator).to(device)
    labels = torch.randint(2, (sequences,), generator=generator).to(device)
    kind = PRECISIONS[precision]

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, kind) if kind else nullcontext():
            return model(input_ids=ids, labels=labels).loss

    return Task(model, loss)
