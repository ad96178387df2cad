"""Learn tasks one after the other: what is left of the earlier ones, with full AdamW, LoRA, GORP and LowRank-IPA.

A pretrained model learns labelled sets in sequence, in one backbone, each with a head of its own that stays. After every task all tasks so far are
asked: accuracy a[i][j] on task j after task i. ACC is the mean of the last row, F how far it lies below the best before
(experiments/continuing/measures.py). The learning rate of each method is the one with the highest accuracy on validation examples after the last
task, mean over the tasks, of --trials on a seed that is not compared (experiments/comparison/search.py).

    lowrank continual                       all-MiniLM-L6-v2: Rotten Tomatoes, Reuters topics, IMDB
    lowrank continual reversed              in the other order
    lowrank continual energy                GORP with other shares ε of the energy protected
    lowrank continual --task r8 imdb --method lora gorp --seed 1 2

``protected`` is full AdamW with GORP's protection and nothing else; ``joint`` learns all tasks at once, in as many steps.
A cell is a sequence in RUNS_DIR/cells; what is finished is not computed again.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from experiments import allowed, runs
from experiments.comparison import grid, outcomes, search
from experiments.continuing import learner, summary
from experiments.continuing.config import Sequence
from experiments.finetuning import tuner
from experiments.finetuning.contenders import GENTLE, TUNING_SEED

FULL = ("adamw", "protected", "joint")
VARIES = {"method", "lr", "energy", "seed", "tests"}  # between the cells of one comparison
REFERENCES = ("adamw", "lora")  # with whom all others are paired, where they take part


def trial(config: Config, label: str, lr: float) -> Sequence:
    """The tuning run of one method at one learning rate. Raises ``ValueError`` for a method that does not exist."""
    method, _, energy = label.partition(":")
    if energy and method not in ("gorp", "protected"):
        raise ValueError(f"method {label!r}: only gorp and protected have a share ε of the energy")
    try:
        share = float(energy) if energy else config.energy
    except ValueError:
        raise ValueError(f"method {label!r}: {energy!r} is not a number") from None
    values = search.common(Sequence, config, VARIES) | {"runs_dir": config.runs_dir / "cells", "quiet": True}
    return Sequence(method=method, lr=lr, energy=share, state="row_scale", tests=0, seed=TUNING_SEED, checkpoint_every=0, **values)


def first(config: Config, label: str) -> list[float]:
    """The three learning rates that the search begins with: around what ``lowrank finetune`` has for so few steps; of all entries a third of it, of
    GORP as much larger as GaLore's is."""
    method = label.partition(":")[0]
    own = GENTLE / search.FACTOR if method in FULL else GENTLE * search.start("galore" if method == "gorp" else method) / search.USUAL
    return search.around(own if config.lr is None else config.lr)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare methods by what a sequence of tasks leaves of each."""

    name: str = ""
    """Name of the run directory; the model if empty."""
    model: str = "minilm"
    """minilm, a folder or a hub name of transformers."""
    task: tuple[str, ...] = ("rotten-tomatoes", "r8", "imdb")
    """Labelled sets in the order in which they are learnt: rotten-tomatoes, imdb, r8, sst2, … (as in `lowrank finetune`), or folders."""
    data_sha256: str = ""
    """SHA-256 of the files of local tasks; filled in by the command, so that other data are another run."""
    method: tuple[str, ...] = ("adamw", "protected", "lora", "gorp", "lowrank")
    """adamw, protected (off what earlier tasks need), lora, gorp, lowrank, joint (all tasks at once); gorp:0.99 and protected:0.99 have
    another ε than --energy."""
    law: str = "haar_stiefel"
    """lowrank: law of V."""
    examples: int = 160
    """Training examples a task, and as many for validation, the same number of each of its classes."""
    tests: int = 200
    """Test examples a task at most."""
    length: int = 32
    """Tokens a text is cut to."""
    rank: int = 8
    """r of every layer: of adapters, of V, and of GORP's shared frame."""
    refresh_every: int = 20
    """K: steps between two subspaces."""
    energy: float = 0.9
    """ε: share of the energy of first moments that is protected after a task."""
    lora_scale: float = 2.0
    """lora, gorp: α/r."""
    trials: int = 4
    """Learning rates tried for each method, at least 3."""
    lr: float | None = None
    """Learning rate at which every search starts; None: the method's own."""
    other_lr: float = 3e-3
    """Peak learning rate of the heads."""
    seed: tuple[int, ...] = (13, 21, 42, 5, 8, 34)
    """Seeds of the comparison: examples, heads, order and draws. The head of task i is of seed + i: two seeds closer than there are tasks share
    heads."""
    steps: int = 120
    """Optimizer steps of each task."""
    sequences: int = 8
    """Examples in each of those steps."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    workers: int = 1
    """Sequences at a time, the cores shared between them."""
    runs_dir: Path = Path("runs")
    """Where run directories go."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        if not self.method or not self.seed:
            raise ValueError("nothing to compare: method and seed need at least one value")
        if len(set(self.method)) < len(self.method):
            raise ValueError(f"a method is named twice: {', '.join(self.method)}")
        if TUNING_SEED in self.seed:
            raise ValueError(f"seed {TUNING_SEED} is the tuning seed; any other can be compared")
        allowed.at_least(self, 3, "trials")
        allowed.at_least(self, 1, "workers", "tests")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        for label in self.method:
            trial(self, label, 1.0)  # each checks its own values


PRESETS = {
    "default": Config(),
    "reversed": Config(name="reversed", task=("imdb", "r8", "rotten-tomatoes")),
    "energy": Config(name="energy", method=("gorp:0.5", "gorp:0.9", "gorp:0.99", "protected:0.5", "protected:0.9", "protected:0.99")),
    "smoke": Config(
        name="smoke", task=("rotten-tomatoes", "imdb"), method=("lora", "gorp"), examples=4, tests=8, length=16, seed=(13,), steps=2,
        sequences=2, trials=3,
    ),
}  # fmt: skip


def main(config: Config) -> runs.Run:
    """Tune, learn, and return the run directory with rows ``trial``, ``accuracy``, ``final`` and ``paired``."""
    sums = [tuner.local_sha256(name, None) for name in config.task]
    config = replace(config, data_sha256=hashlib.sha256("".join(sums).encode()).hexdigest() if any(sums) else "")
    label = config.name or "".join(c if c.isalnum() or c in "-_" else "_" for c in config.model)
    run = runs.start("continual", label, config)
    if run.done:
        return run
    try:
        learner.Learner(trial(config, config.method[0], 1.0), run)  # refuses a task or model before there are any cells
    except runs.WrongInput:
        runs.discard_empty(run)
        raise
    run.keep([])
    job = grid.Job(learner.opened, learner.learn, lambda _: None)
    tuning = {one: [trial(config, one, lr) for lr in first(config, one)] for one in config.method}
    train = lambda cells, stage="tune": grid.train(cells, config.workers, stage, config.quiet, job)  # noqa: E731
    rows, chosen = search.tuned(tuning, config.trials - 3, summary.wrong, summary.tuned, train)
    compared = {one: [replace(cell, seed=seed, tests=config.tests) for seed in config.seed] for one, cell in chosen.items()}
    train([cell for some in compared.values() for cell in some], "compare")
    cells = [(one, cell) for one, some in compared.items() for cell in some]
    finals = [summary.final(one, cell) for one, cell in cells]
    references = {one: [other for other in REFERENCES if other in config.method and other != one] for one in config.method}
    paired = [
        {**row, "measure": measure}
        for measure in summary.MEASURES
        for row in outcomes.paired(finals, references, of=measure)
        if measure == "average" or row["label"] != "joint"
    ]
    run.log(*rows, *(row for one, cell in cells for row in summary.accuracies(one, cell)), *finals, *paired)
    run.finish()
    return run


if __name__ == "__main__":
    from experiments import cli

    sys.exit(cli.main(["continual", *sys.argv[1:]]))
