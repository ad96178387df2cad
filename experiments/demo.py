"""The tour: validate on synthetic matrices and on the gradients of a small LLaMA in training, dynamics, the optimizers in a frame, a short
training run, one report.

    lowrank demo
    lowrank demo --smoke
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments import dynamics, optimizers, pretrain, report, runs, validate


@dataclass(frozen=True, kw_only=True)
class Config:
    """Run the questions with their defaults (a short training) and write the report."""

    seed: int = 0
    """Seed of everything random."""
    smoke: bool = False
    """Smallest sizes, to see that everything runs."""
    runs_dir: Path = Path("runs")
    """Where run directories and the report go."""
    quiet: bool = False
    """No progress bars."""


def main(config: Config) -> list[runs.Run | Path]:
    """The runs and the path of the report."""
    small = {**vars(validate.PRESETS["smoke"])} if config.smoke else {}
    small_dynamics = {**vars(dynamics.PRESETS["smoke"])} if config.smoke else {}
    common = {"seed": config.seed, "runs_dir": config.runs_dir, "quiet": config.quiet}
    training = pretrain.Config(refresh_every=20, steps=4 if config.smoke else 60, measure_every=10, eval_every=20, **common)
    stages: dict[str, Callable[[], runs.Run]] = {
        "every law on synthetic matrices": lambda: validate.main(validate.Config(**{**small, **common})),
        "every law on the gradients of a small LLaMA": lambda: validate.main(validate.Config(**{**small, **common, "model": "tiny"})),
        "loss curves and stable steps": lambda: dynamics.main(dynamics.Config(**{**small_dynamics, **common})),
        "optimizers in a frame": lambda: optimizers.main(optimizers.Config(draws=64 if config.smoke else 128, period=4, **common)),
        "a short training": lambda: pretrain.main(training),
    }
    done: list[runs.Run] = []
    for number, (title, stage) in enumerate(stages.items(), 1):
        if not config.quiet:
            print(f"{number}/{len(stages)} {title}", file=sys.stderr, flush=True)
        done.append(stage())
    return [*done, report.main(report.Config(run=tuple(run.path for run in done), out=config.runs_dir / "report.html"))]
