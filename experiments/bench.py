"""How fast and how small: one run measures the machine, then everything as ratios to a named peer, in pairs taken side by side.

``sampling``: V of every law, single and for all matrices of a model. ``measure``: 100 000 draws of every law. ``layer``: LowRankLinear forward
and backward over nn.Linear with its weight gradient. ``step``: one optimizer step of each method on the same batches, over that of full AdamW; the
lift is part of it, redraws are timed apart and added at their share 1/K. ``memory``: bytes that the linear layers of the blocks save for the backward
pass, each storage counted once, over those of ``nn.Linear``. ``refresh``: what a redraw costs, for laws fitted to the gradient with its full gradient
or its online updates. ``live``: a step that is measured live over one that is not, and its share of a run. ``growth``: seconds against r, n, blocks
and K, beside theory/operations.py. ``start``: imports and ``lowrank --help``. ``optimizer``: updates of the optimizers in a frame alone, over their
two products and over published packages.

The machine's limits come first: rates of products, copies and normal numbers; ``share`` of a row is the time that they allow over the time it took.
Every run leaves a ``bench.json``; ``--compare`` takes one of before.

    lowrank bench
    lowrank bench primitives --compare runs/bench-60m-primitives-1a2b3c4d/bench.json
    lowrank bench optimizers
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments import allowed, runs
from experiments.benching import growth, measuring, regressions, sampling, start, training
from experiments.benching.limits import Limits, limits
from experiments.training import models, updating

GROUPS = ("sampling", "measure", "layer", "step", "memory", "refresh", "live", "growth", "start", "optimizer")
DEFAULT = ("layer", "step", "memory", "refresh", "live")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Time and memory of LowRank-IPA beside its peers."""

    group: tuple[str, ...] = DEFAULT
    """What to measure: sampling, measure, layer, step, memory, refresh, live, growth, start, optimizer."""
    model: str = "60m"
    """Preset of lowrank pretrain."""
    law: tuple[str, ...] = ("haar_stiefel", "spectral")
    """Laws of LowRank-IPA whose steps are timed."""
    rank: float = 0.125
    """r of every layer; a fraction in (0, 1) is r/n."""
    refresh_every: int = 200
    """K: steps between two draws of V, over which the cost of a redraw is spread."""
    sequences: int = 8
    """Sequences a step."""
    length: int = 256
    """Tokens a sequence."""
    repeats: int = 7
    """Pairs of measurements, at least 5."""
    sampled: str = "1b"
    """Preset whose matrices group sampling draws V for."""
    compare: Path | None = None
    """bench.json of an earlier run, or its directory: ratios that are larger beyond the noise of both are named, and the exit code is 1."""
    seed: int = 0
    """Seed of weights and draws."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    runs_dir: Path = Path("runs")
    """Where run directories go."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        for name in self.group:
            if name not in GROUPS:
                raise ValueError(f"unknown group {name!r}, known are {', '.join(GROUPS)}")
        allowed.at_least(self, 5, "repeats")
        for name in ("model", "sampled"):
            if getattr(self, name) not in models.PRESETS:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}, known are {', '.join(models.PRESETS)}")
        if self.rank >= 1 and self.rank % 1:
            raise ValueError(f"rank must be a positive integer or a fraction in (0, 1), got {self.rank}")
        for law in self.law:
            training.settings(self, law)


PRESETS = {
    "tiny": Config(model="tiny", sequences=16, length=128),
    "60m": Config(),
    "optimizers": Config(group=("optimizer",), rank=0.25, length=128, repeats=31),
    "primitives": Config(group=("sampling", "measure", "layer", "growth", "start")),
}


def main(config: Config) -> runs.Run:
    """Measure every group and return the run directory. Times belong to one stretch of work: groups that a run which was cut short has finished are
    kept, each with limits of its own stretch; a finished run is measured again."""
    old = regressions.load(config.compare, config) if config.compare else []
    named = {DEFAULT: "", **{PRESETS[name].group: f"-{name}" for name in ("optimizers", "primitives")}}
    run = runs.start("bench", config.model + named.get(config.group, ""), config)
    if run.done:
        run.renew()
    device = runs.device(config.device)
    parts: dict[str, Callable[[Limits], list[dict[str, Any]]]] = {
        "sampling": lambda limits: sampling.sampling(config, device, limits),
        "measure": lambda limits: measuring.measuring(config, device, limits),
        "layer": lambda limits: training.layer(config, device, limits),
        "step": lambda limits: training.step(config, device, limits),
        "memory": lambda _: training.memory(config, device),
        "refresh": lambda _: training.refresh(config, device),
        "live": lambda _: training.live(config, device),
        "growth": lambda limits: growth.growth(config, device, limits),
        "start": lambda _: start.start(config),
        "optimizer": lambda _: updating.rows(training.settings(config, "gaussian", "adamw"), device, config.repeats),
    }
    open_ = [name for name in config.group if name not in {row["kind"] for row in run.rows()}]
    found = limits(device) if open_ else None
    if found:
        run.log(found.row() | {"groups": " ".join(open_), "threads": torch.get_num_threads()})
        with runs.progress(len(open_), "bench", config.quiet) as bar:
            for name in open_:
                bar.set_postfix_str(name)
                run.log(*({"kind": name, **row} for row in parts[name](found)))
                bar.update()
    run.log(*regressions.found(old, run.rows()))
    run.write("bench.json", {"config": run.config, "environment": run.read("env.json"), "rows": run.rows()})
    run.finish()
    return run
