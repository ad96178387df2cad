"""What one fine-tuning is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from estimators.writing import Lift
from experiments import allowed
from experiments.training.methods import METHODS, Projected
from experiments.training.options import Options
from optimizers import ZEROTH_ORDER

Head = Literal["classifier", "prompt", "response"]
KNOWN = (*METHODS, *ZEROTH_ORDER)
WITH_LAWS = ("lowrank", "lowrank_lr", "tokens")  # methods that read ``law``


@dataclass(frozen=True, kw_only=True)
class Tuning(Options):
    """One model, one method, one seed, one learning rate."""

    model: str = "minilm"
    """minilm (all-MiniLM-L6-v2, 22.7 M), smollm2 (SmolLM2-135M-Instruct), a folder or a hub name of transformers."""
    task: str = "rotten-tomatoes"
    """rotten-tomatoes, imdb, r8, sst2, sst5, snli, mnli, rte, trec, or a folder; for responses: dolly or a .jsonl file."""
    folder: Path | None = None
    """train.jsonl and test.jsonl of a hub task, in its own schema, where there is no network."""
    data_sha256: str = ""
    """Of the files of a local task; filled in by the command, so that other data are another run."""
    head: Head = "classifier"
    """classifier (a linear head, new unless the model has one for as many labels), prompt (label words), response (loss on responses only)."""
    k: int = 16
    """Training examples a class, and as many for validation; for responses: in all."""
    tests: int = 1000
    """Test examples at most, the same for every seed."""
    length: int = 64
    """Tokens a text is cut to."""
    method: str = "adamw"
    """adamw, lora, relora, lowrank (LowRank-IPA), compact, tokens, rad, wta_crs, velora, an optimizer in a frame, or with forward passes only
    lowrank_lr, mezo, lozo, subzero."""
    rank: int | float = 8
    """r of every layer, or a fraction of n."""
    refresh_every: int = 20
    """K: steps between two subspaces."""
    lift: Lift = "stochastic"
    """How updates reach 16-bit weights: stochastic (rounding), nearest, or for lowrank master (float32 copy)."""
    others: Literal["all", "head"] = "all"
    """What is trained beside the matrices: all (embeddings, norms, output), or head (a classifier's head alone; the rest is frozen)."""
    lora_scale: float = 2.0
    """lora: α/r."""
    layers: int | float | None = 0.25
    """lisa, owlore, badam: layers that have their turn."""
    epsilon: float = 1e-3
    """Forward passes only: ε of the loss difference."""
    queries: int = 1
    """Forward passes only: directions a step."""
    momentum: float = 0.0
    """Forward passes only: β in the subspace."""
    lr: float = 1e-4
    """Peak learning rate of the matrices; forward passes only: of everything."""
    other_lr: float | None = 3e-4
    """Peak learning rate of embeddings, norms and head where there are gradients; lr if none."""
    steps: int = 60
    """Optimizer steps."""
    sequences: int = 8
    """Examples a step, all of them if there are fewer."""
    recompute: bool = False
    """Recompute the blocks in the backward pass."""
    save_model: bool = False
    """Write model and tokenizer at the end, for transformers to load."""

    def __post_init__(self) -> None:
        for name, known in (("method", KNOWN), ("head", get_args(Head))):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}, known are {', '.join(known)}")
        super().__post_init__()
        allowed.at_least(self, 1, "k", "tests", "queries")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if not 0 < self.epsilon < float("inf"):
            raise ValueError(f"epsilon must be positive and finite, got {self.epsilon}")
        if issubclass(METHODS.get(self.method, object), Projected) and self.optimizer not in ("adamw", "adamw8bit"):
            raise ValueError(f"method={self.method} has its own update; --optimizer adamw8bit keeps its states in 8 bits")
        if self.c == "r/n" and self.forward_only:
            raise ValueError("c=r/n is for lowrank and compact; methods without gradients take a number")
        if self.length < 4:
            raise ValueError(f"length must be at least 4 tokens, got {self.length}")

    @property
    def forward_only(self) -> bool:
        """Whether there are no gradients."""
        return self.method in ZEROTH_ORDER
