"""What one fine-tuning is: the fields of the command, of which methods of training read theirs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from estimators import LAWS
from estimators.transport import Policy
from estimators.writing import Lift
from experiments.training.config import Optimizer, Precision
from experiments.training.methods import METHODS
from optimizers import OPTIMIZERS, ZEROTH_ORDER

Head = Literal["classifier", "prompt", "response"]
KNOWN = (*METHODS, *ZEROTH_ORDER)


@dataclass(frozen=True, kw_only=True)
class Tuning:
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
    """classifier (a new linear head), prompt (label words at the masked or next token), response (loss on responses only)."""
    k: int = 16
    """Training examples a class, and as many for validation; for responses: in all."""
    tests: int = 1000
    """Test examples at most, the same for every seed."""
    length: int = 64
    """Tokens a text is cut to."""
    method: str = "adamw"
    """adamw, lora, relora, lowrank (LowRank-IPA), an optimizer in a frame, or lowrank_lr, mezo, lozo, subzero (forward passes only)."""
    law: str = "haar_stiefel"
    """Law of V in lowrank and lowrank_lr."""
    rank: int | float = 8
    """r of every layer, or a fraction of n."""
    c: float = 1.0
    """Isotropy constant: E[VVᵀ] = cI."""
    refresh_every: int = 20
    """K: steps between two subspaces."""
    lift_every: int = 1
    """lowrank: steps between two lifts."""
    state: Policy = "reset"
    """lowrank: optimizer state when V changes."""
    lift: Lift = "stochastic"
    """How updates reach 16-bit weights: stochastic (rounding), nearest, or for lowrank master (float32 copy)."""
    store: bool = True
    """lowrank: keep V."""
    keep: float = 2.0
    """Fitted laws: directions known, as a multiple of the rank."""
    basis_every: int = 1
    """Fitted laws: redraws between two full gradients."""
    online: float = 0.0
    """Fitted laws: weight of what sketches showed."""
    others: Literal["all", "head"] = "all"
    """What is trained beside the matrices: all (embeddings, norms, output), or head (a classifier's head alone; the rest is frozen)."""
    lora_scale: float = 2.0
    """lora: α/r."""
    alpha: float | None = None
    """Scale of the update of galore and others; the method's own if none."""
    variant: str = "paper"
    """paper, or reference-code."""
    random_from: int = 0
    """golore: steps after which directions are random."""
    layers: int | float | None = 0.25
    """lisa, owlore, badam: layers that have their turn."""
    epsilon: float = 1e-3
    """Forward passes only: ε of the loss difference."""
    queries: int = 1
    """Forward passes only: directions a step."""
    momentum: float = 0.0
    """Forward passes only: β in the subspace."""
    optimizer: Optimizer = "adamw"
    """adamw, sgd, muon, adamw8bit, for methods without an update of their own."""
    lr: float = 1e-4
    """Peak learning rate of the matrices; forward passes only: of everything."""
    other_lr: float | None = 3e-4
    """Peak learning rate of embeddings, norms and head where there are gradients; lr if none."""
    warmup: float = 0.1
    """Share of the steps in warm-up."""
    final_lr: float = 0.1
    """Share of the peak learning rate at the end."""
    weight_decay: float = 0.0
    """Decoupled."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 for none."""
    steps: int = 60
    """Optimizer steps."""
    sequences: int = 8
    """Examples a step, all of them if there are fewer."""
    precision: Precision = "fp32"
    """fp32, bf16 (products in bfloat16), bf16_weights."""
    seed: int = 0
    """Of the few examples, their order, the head and all draws."""
    max_skipped: int = 10
    """Steps without a finite loss that a run survives; each is skipped and counted."""
    checkpoint_every: int = 100
    """Steps between checkpoints; 0 for one at an interruption only."""
    save_model: bool = False
    """Write model and tokenizer at the end, for transformers to load."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    runs_dir: Path = Path("runs")
    """Where run directories go."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        for name, known in (("method", KNOWN), ("law", LAWS), ("head", get_args(Head))):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}, known are {', '.join(known)}")
        for name in ("lr", "c", "epsilon", "lora_scale", "other_lr", "alpha", "layers"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if self.method in OPTIMIZERS and self.optimizer not in ("adamw", "adamw8bit"):
            raise ValueError(f"method={self.method} has its own update; --optimizer adamw8bit keeps its states in 8 bits")
        for name in ("k", "tests", "steps", "sequences", "refresh_every", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.length < 4:
            raise ValueError(f"length must be at least 4 tokens, got {self.length}")
        if self.rank <= 0 or (isinstance(self.rank, float) and self.rank >= 1):
            raise ValueError(f"rank must be a positive integer or a fraction in (0, 1), got {self.rank}")

    @property
    def forward_only(self) -> bool:
        """Whether there are no gradients."""
        return self.method in ZEROTH_ORDER
