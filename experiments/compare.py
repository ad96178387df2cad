"""Laws and baselines in one fair grid: same initialisation, data order, batch and budget; the learning rate tuned for each on equal budgets.

First every contender trains for ``tune_steps`` from its own seed at each pair of a learning rate and a second knob: c for the laws, the scale of
LoRA. Full AdamW has no second knob and gets as many learning rates over the same range. The best, by mean training loss over the last
fifth, trains for ``steps`` with every seed. Contenders are compared by held-out loss after the last step, in pairs of equal seed.
A cell of the grid is a run of ``lowrank pretrain``; what is finished is not computed again. The run directory holds the losses against tokens and
against seconds as ``curves.svg``; ``lowrank report`` shows everything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from estimators import LAWS
from estimators.transport import Policy
from experiments import figures, figures_training, grid, pretrain, runs
from experiments.methods import METHODS

TUNING_SEED = 1000  # none of the seeds that are compared
TAIL = 0.2  # share of the steps whose training loss decides the tuning
EVALUATIONS = 10  # points of a loss curve


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare laws and baselines by held-out loss."""

    model: str = "tiny"
    """Preset of lowrank pretrain."""
    law: tuple[str, ...] = ("gaussian", "haar_stiefel", "coordinate", "dct", "spectral")
    """Laws of LowRank-IPA."""
    baselines: tuple[str, ...] = ("adamw", "lora")
    """Other methods: adamw, lora, relora."""
    rank: tuple[float, ...] = (0.25,)
    """r of every layer; fractions in (0, 1) are r/n."""
    refresh_every: tuple[int, ...] = (20,)
    """K: steps between two draws of V (relora: between two merges)."""
    state: Policy = "row_scale"
    """Optimizer state when V changes."""
    lr: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    """Peak learning rates to choose from."""
    c: tuple[float, ...] = (1.0, 0.25)
    """Isotropy constants to choose from."""
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
    data: str = "movie-reviews"
    """Text, as in lowrank pretrain."""
    precision: pretrain.Precision = "fp32"
    """fp32, bf16, bf16_weights."""
    optimizer: pretrain.Optimizer = "adamw"
    """adamw, sgd, muon, adamw8bit, for everyone."""
    weight_decay: float = 0.0
    """Decoupled, for everyone."""
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
            raise ValueError(f"seed {TUNING_SEED} is the tuning seed")
        if min(self.workers, self.tune_steps, self.steps, self.eval_tokens) < 1:
            raise ValueError("workers, tune_steps, steps and eval_tokens must be at least 1")
        for contender in contenders(self):
            for trial in trials(self, contender):
                del trial  # each checks its own values


@dataclass(frozen=True)
class Contender:
    """One row of the comparison. ``label``: a law or a baseline, with rank and K where these vary."""

    label: str
    method: str
    law: str
    rank: float
    refresh_every: int


def contenders(config: Config) -> list[Contender]:
    """Laws first, then baselines; full AdamW has neither rank nor K."""
    found: dict[Contender, None] = {}
    names = [("lowrank", law) for law in config.law] + [(method, "haar_stiefel") for method in config.baselines]
    for (method, law), rank, period in product(names, config.rank, config.refresh_every):
        needs = METHODS[method].needs
        label = law if method == "lowrank" else method
        rank = rank if "rank" in needs else next(iter(config.rank))
        period = period if "refresh_every" in needs else next(iter(config.refresh_every))
        label += f" r={rank:g}" if "rank" in needs and len(config.rank) > 1 else ""
        label += f" K={period}" if "refresh_every" in needs and len(config.refresh_every) > 1 else ""
        found[Contender(label, method, law, int(rank) if rank >= 1 else rank, period)] = None
    return list(found)


def trials(config: Config, contender: Contender) -> list[pretrain.Config]:
    """The tuning runs of one contender: as many as any other's, if all second knobs have as many values."""
    base = replace(
        pretrain.PRESETS[config.model],
        method=contender.method,
        law=contender.law,
        rank=contender.rank,
        refresh_every=contender.refresh_every,
        state=config.state,
        steps=config.tune_steps,
        sequences=config.sequences,
        accumulate=1,
        length=config.length,
        seed=TUNING_SEED,
        data=config.data,
        precision=config.precision,
        optimizer=config.optimizer,
        weight_decay=config.weight_decay,
        device=config.device,
        measure_every=0,
        checkpoint_every=0,
        eval_tokens=config.length,
        save_model=False,
        quiet=True,
    )
    needs = METHODS[contender.method].needs
    for knob in ("c", "lora_scale"):
        if knob in needs:
            return [replace(base, lr=lr, **{knob: value}) for lr, value in product(config.lr, getattr(config, knob))]
    rates = np.geomspace(min(config.lr), max(config.lr), len(config.lr) * max(len(config.c), len(config.lora_scale)))
    return [replace(base, lr=float(f"{rate:.3g}")) for rate in rates]


PRESETS = {
    "tiny": Config(),
    "9m": Config(model="9m", law=("gaussian", "haar_stiefel", "spectral"), baselines=("adamw",)),
    "smoke": Config(
        law=("haar_stiefel",), lr=(5e-3,), c=(1.0,), lora_scale=(1.0,), seed=(0, 1), steps=4, tune_steps=2, sequences=2, length=16
    ),
}


def main(config: Config) -> runs.Run:
    """Tune, compare, and return the run directory with rows ``trial``, ``final``, ``paired`` and ``curve``."""
    run = runs.start("compare", config.model, config)
    if run.done:
        return run
    run.keep([])
    everyone = contenders(config)
    tuning = {one: [replace(trial, runs_dir=run.path / "tuning") for trial in trials(config, one)] for one in everyone}
    grid.train([trial for some in tuning.values() for trial in some], config.workers, "tune", config.quiet)
    chosen = {}
    for one, some in tuning.items():
        rows = [_trial(one, trial) for trial in some]
        best = min(range(len(rows)), key=lambda i: rows[i]["loss"])
        edges = (min(t.lr for t in some), max(t.lr for t in some))
        run.log(*({**row, "chosen": i == best, "at_edge": i == best and some[i].lr in edges} for i, row in enumerate(rows)))
        chosen[one] = some[best]
    compared = {one: [_compared(config, run, trial, seed) for seed in config.seed] for one, trial in chosen.items()}
    grid.train([cell for some in compared.values() for cell in some], config.workers, "compare", config.quiet)
    finals = [_final(one, cell) for one, some in compared.items() for cell in some]
    points = curves(compared)
    run.log(*finals, *paired(finals), *points)
    (run.path / "curves.svg").write_text(figures.svg(figures_training.curves(pd.DataFrame(points))), encoding="utf-8")
    run.finish()
    return run


def _compared(config: Config, run: runs.Run, trial: pretrain.Config, seed: int) -> pretrain.Config:
    return replace(
        trial,
        seed=seed,
        steps=config.steps,
        eval_every=max(1, config.steps // EVALUATIONS),
        eval_tokens=config.eval_tokens,
        measure_every=max(1, config.steps // 4),
        checkpoint_every=100,
        keep_checkpoints=1,
        runs_dir=run.path / "cells",
    )


# outcomes


def _trial(one: Contender, trial: pretrain.Config) -> dict[str, Any]:
    run = pretrain.opened(trial)
    losses = [row["loss"] for row in run.rows() if row["kind"] == "train"]
    tail = losses[-max(1, int(TAIL * trial.steps)) :]
    loss = float(np.mean(tail)) if run.done and tail else float("inf")  # a short run may end with every step skipped
    return {"kind": "trial", **_names(one, trial), "steps": trial.steps, "loss": loss}


def _final(one: Contender, cell: pretrain.Config) -> dict[str, Any]:
    run = pretrain.opened(cell)
    if not run.done:
        return {"kind": "final", **_names(one, cell), "seed": cell.seed, "steps": cell.steps, "loss": float("inf")}
    rows = run.rows()
    (end,) = (row for row in rows if row["kind"] == "end")
    (held_out,) = (row for row in rows if row["kind"] == "eval" and row["step"] == cell.steps)
    facts = run.read("facts.json")
    return {
        "kind": "final",
        **_names(one, cell),
        "seed": cell.seed,
        "steps": cell.steps,
        "loss": held_out["loss"],
        "perplexity": held_out["perplexity"],
        **{name: end[name] for name in ("seconds", "tokens_per_second", "peak_bytes", "state_bytes", "fitting_bytes", "measuring_share")},
        **{name: facts[name] for name in ("parameters", "trained_parameters", "touched_share")},
    }


def _names(one: Contender, cell: pretrain.Config) -> dict[str, Any]:
    needs = METHODS[one.method].needs
    knobs = {name: getattr(cell, name) if name in needs else None for name in ("rank", "refresh_every", "c", "lora_scale")}
    return {"label": one.label, "method": one.method, "law": one.law if one.method == "lowrank" else None, "lr": cell.lr, **knobs}


def paired(finals: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean difference of held-out loss in pairs of equal seed, contender minus reference, with standard error and 95 % interval (Student).

    References are full AdamW and Haar–Stiefel where they take part. With one seed there is no standard error.
    """
    table: dict[str, dict[int, float]] = {}
    for row in finals:
        table.setdefault(row["label"], {})[row["seed"]] = row["loss"]
    rows = []
    for reference in [label for label in table if label.split(" ")[0] in ("adamw", "haar_stiefel")]:
        for label, losses in table.items():
            if label == reference:
                continue
            differences = np.array([losses[seed] - table[reference][seed] for seed in losses])
            n, mean = len(differences), float(differences.mean())
            error = float(differences.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
            half = float(stats.t.ppf(0.975, n - 1)) * error if n > 1 else float("nan")
            bounds = {"low": mean - half, "high": mean + half}
            rows.append(
                {
                    "kind": "paired",
                    "label": label,
                    "reference": reference,
                    "seeds": n,
                    "difference": mean,
                    "standard_error": error,
                    **bounds,
                }
            )
    return rows


def curves(compared: dict[Contender, list[pretrain.Config]]) -> list[dict[str, Any]]:
    """Held-out loss along the way, mean and standard error over seeds, against tokens and seconds of training."""
    rows = []
    for one, cells in compared.items():
        points: dict[int, list[dict[str, Any]]] = {}
        for cell in cells:
            for row in pretrain.opened(cell).rows():
                if row["kind"] == "eval":
                    points.setdefault(row["step"], []).append(row)
        for step, found in sorted(points.items()):
            losses = np.array([row["loss"] for row in found])
            error = float(losses.std(ddof=1) / np.sqrt(len(losses))) if len(losses) > 1 else float("nan")
            means = {name: float(np.mean([row[name] for row in found])) for name in ("trained_tokens", "seconds", "loss")}
            rows.append({"kind": "curve", "label": one.label, "step": step, **means, "standard_error": error, "seeds": len(losses)})
    return rows
