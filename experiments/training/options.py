"""The fields that trainings have in common, those that methods read among them, and their limits."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from estimators import LAWS
from estimators.law import Constant
from estimators.transport import Policy, Second
from estimators.writing import Lift
from experiments import allowed
from optimizers import OPTIMIZERS

Precision = Literal["fp32", "bf16", "bf16_weights"]
Optimizer = Literal["adamw", "sgd", "muon", "adamw8bit"]
RULES = {  # also where the method does not read them: a slip should not pass unseen
    "variant": OPTIMIZERS["galore"].choices["variant"],
    **{name: OPTIMIZERS["gradlite"].choices[name] for name in ("feedback", "residual", "inner")},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of a training by one method."""

    method: str = "lowrank"
    """lowrank (LowRank-IPA), adamw (every weight), lora, relora, compact, an estimate from a compressed input: tokens, rad, wta_crs,
    velora; or an optimizer of `lowrank optimizers`: galore, golore, flora, …"""
    law: str = "haar_stiefel"
    """Law of V, a name from LAWS: those of `lowrank validate`."""
    rank: int | float = 0.25
    """r of every layer; a fraction in (0, 1) is r/n of each layer (tokens, wta_crs: of the tokens of its input; velora: groups of features)."""
    ranks: Path | None = None
    """lowrank, compact, lora, relora: JSON file with r by layer name, as `lowrank advise` and `lowrank ranks` write it, in the place of --rank;
    layers that it leaves out keep their full gradient."""
    ranks_sha256: str = ""
    """SHA-256 of that file; filled in by the command, so that other ranks are another run."""
    c: Constant = 1.0
    """Isotropy constant: E[VVᵀ] = cI. A step of Adam moves a projected layer by ‖ΔW‖ ≈ η√(c·mn), at every rank √c times as far as another weight;
    r/n (lowrank, compact): that of each layer, where the columns of V have length 1 and a smaller rank means shorter steps, η√(mr)."""
    refresh_every: int = 200
    """K: steps between two draws of V (relora: between two merges; galore and others: between two refreshes of the projector)."""
    lift_every: int = 1
    """Steps between two lifts W ← W + BVᵀ."""
    state: Policy = "reset"
    """Optimizer state when V changes: reset, keep, reproject_first, reproject_both, row_scale."""
    second_moment: Second | None = None
    """Adam's second moment when V (the frame) changes: zero, keep, reproject, row_scale, random, first_batch; by ``state`` (the method) if none."""
    coupled: float = 0.0
    """lowrank, lora, relora: a step does not shrink a factor's column below this share of its partner's norm; 0 for none. At --lift-every 1
    it does nothing for lowrank, whose B is zero before every step."""
    lift: Lift = "master"
    """How lifts reach 16-bit weights: master (float32 copy), stochastic (rounding), nearest (small lifts are lost)."""
    store: bool = True
    """Keep V in memory; otherwise draw it from its key at each use."""
    keep: float = 2.0
    """Fitted laws: directions known a layer, as a multiple of its rank."""
    basis_every: int = 1
    """Fitted laws: redraws between two full gradients of a micro-batch."""
    online: float = 0.0
    """Fitted laws: weight of what the sketches between full gradients showed, 0 for none."""
    lora_scale: float = 1.0
    """LoRA: s in W + s·BA (α/r)."""
    alpha: float | None = None
    """α, scale of the projected update of galore and others; None: the method's own."""
    variant: str = "paper"
    """Rule of galore and others: paper, or reference-code where the published code differs."""
    random_from: int = 0
    """golore: steps after which directions are random."""
    layers: int | float | None = None
    """lisa, owlore, badam: layers that have their turn in a period of K steps, a number or a share; None: the method's own."""
    feedback: str = "ef14"
    """gradlite: ef14, ef21, literal (diverges), none."""
    residual: str = "bf16"
    """gradlite: precision of what is fed back: fp32, bf16, 8bit."""
    inner: str = "adam"
    """gradlite: step in its directions: adam, sgd (for ef21 and literal)."""
    optimizer: Optimizer = "adamw"
    """adamw, sgd (momentum 0.9), muon (matrices; AdamW for the rest), adamw8bit (torchao)."""
    lr: float = 3e-3
    """Peak learning rate: linear warm-up, then cosine."""
    other_lr: float | None = None
    """Peak learning rate of embeddings, head and norms; None: that of --lr."""
    warmup: float = 0.1
    """Share of the steps in warm-up."""
    final_lr: float = 0.1
    """Share of the peak learning rate at the end."""
    weight_decay: float = 0.0
    """λ of the decoupled weight decay W ← (1 − lr·λ)W; on W + BVᵀ, not on B alone. LoRA decays its factors."""
    clip: float = 1.0
    """Largest norm of the gradient of all trained parameters together (with the sketches ĜV in the place of Ĝ); 0 for none."""
    fused: bool = False
    """Update every parameter inside the backward pass and free its gradient: optimizers of `lowrank optimizers`, one process, one micro-batch.
    Clipping takes a second backward pass."""
    steps: int = 600
    """Optimizer steps."""
    sequences: int = 16
    """Sequences a step, of all processes together."""
    precision: Precision = "fp32"
    """fp32; bf16 (products in bfloat16, weights float32); bf16_weights (all weights in bfloat16; --lift protects the projected ones only)."""
    seed: int = 0
    """Seed of initialisation, data order and draws."""
    max_skipped: int = 10
    """Steps with a loss or gradient that is not finite that a run survives; each is skipped and counted."""
    checkpoint_every: int = 100
    """Steps between checkpoints; 0 for none."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    runs_dir: Path = Path("runs")
    """Where run directories go."""
    tensorboard: bool = False
    """Write the rows of the run as scalars for TensorBoard too, into its folder ``tensorboard``."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        if self.tensorboard and find_spec("tensorboard") is None:
            raise ValueError("tensorboard is not installed: pip install 'lowrank-gradients[tensorboard]', or leave --tensorboard out")
        for name, known in (("law", LAWS), ("optimizer", get_args(Optimizer)), ("precision", get_args(Precision))):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}, known are {', '.join(known)}")
        for name in ("lr", "c", "lora_scale", "keep"):
            value = 1.0 if name == "c" and self.c == "r/n" else getattr(self, name)
            if isinstance(value, str) or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        allowed.at_least(self, 1, "steps", "sequences", "refresh_every", "lift_every", "basis_every")
        for name in ("alpha", "other_lr", "layers"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if self.coupled == float("inf"):
            raise ValueError("coupled must be finite, got inf")
        allowed.at_least(self, 0, "coupled", "weight_decay", "clip", "checkpoint_every", "max_skipped")
        for name, known in RULES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}, known are {', '.join(known)}")
        for name in ("warmup", "final_lr", "online"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        object.__setattr__(self, "ranks_sha256", allowed.ranks_sha256(self.ranks))
        if self.rank <= 0 or (isinstance(self.rank, float) and self.rank >= 1):
            raise ValueError(f"rank must be a positive integer or a fraction in (0, 1), got {self.rank}")
