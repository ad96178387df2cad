"""Fine-tune a pretrained model on few examples: with gradients, whole or low-rank, and with forward passes alone; every method beside the others.

Every contender gets --trials learning rates, three around its own start and the others where the search leads (experiments/comparison/search.py),
on the examples of a seed that is not compared; the smallest validation loss decides. Then it trains with every seed: other examples, head, order and
draws. What is compared is the accuracy on the same test examples. Embeddings, norms and head train alike where there are gradients
(--other-lr; --others head freezes all but the head). Methods that only ask for losses have a batch, a number of steps and, as published, a constant
learning rate.

    lowrank finetune                        all-MiniLM-L6-v2 on Rotten Tomatoes, thirteen methods
    lowrank finetune every                  the same for every method there is
    lowrank finetune smollm2                SmolLM2-135M with a new head
    lowrank finetune instructions --task FILE.jsonl   SmolLM2-135M on prompts and responses; dolly: the full set
    lowrank finetune backward               what the backward pass keeps and when it updates: LOMO, GradLite and its ablations
    lowrank finetune backward-instructions --task FILE.jsonl   the same with SmolLM2-135M
    lowrank finetune roberta                RoBERTa-large from the hub, SST-2 by prompts, k = 16, 100 000 steps of forward passes: for a GPU
    lowrank finetune --model FOLDER --task FOLDER --method adamw lowrank:spectral --k 32

A cell is a training in RUNS_DIR/cells, shared by all comparisons; what is finished is not computed again, and what was interrupted goes on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from estimators.transport import Policy
from estimators.writing import Lift
from experiments import allowed, runs
from experiments.comparison import grid, outcomes, search
from experiments.finetuning import summary, tuner
from experiments.finetuning.config import Head
from experiments.finetuning.contenders import BACKWARD, EVERY, FORWARDS, LEADING, TUNING_SEED, VARIED, first, trial
from experiments.training.options import Optimizer, Precision

PROTOCOL = (13, 21, 42, 87, 100)  # seeds of 2305.17333


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare methods by the accuracy they fine-tune to."""

    name: str = ""
    """Name of the run directory; model and task if empty."""
    model: str = "minilm"
    """minilm, smollm2, a folder or a hub name of transformers."""
    task: str = "rotten-tomatoes"
    """rotten-tomatoes, imdb, r8, sst2, sst5, snli, mnli, rte, trec, or a folder; for responses: dolly or a .jsonl file."""
    folder: Path | None = None
    """Folder with train.jsonl and test.jsonl of a hub task, in its own schema, where there is no network."""
    data_sha256: str = ""
    """SHA-256 of the files of a local task; filled in by the command, so that other data are another run."""
    head: Head = "classifier"
    """classifier (a linear head), prompt (label words), response (loss on responses only)."""
    method: tuple[str, ...] = (*VARIED, *LEADING, *FORWARDS)
    """adamw, lora, relora, lowrank:LAW, tokens:LAW, rad, wta_crs, velora, compact, optimizers in a frame, lowrank_lr:LAW, mezo, lozo, subzero;
    with +recomputed the blocks are computed again in the backward pass, with +fused updates are made inside it, with +ranks each layer has its
    rank from --ranks."""
    k: int = 64
    """Training examples a class, and as many for validation; for responses: in all."""
    tests: int = 1000
    """Test examples at most."""
    length: int = 64
    """Tokens a text is cut to."""
    rank: int | float = 8
    """r of every layer; a fraction in (0, 1) is r/n."""
    ranks: Path | None = None
    """JSON file with r by layer name, for the contenders that end in +ranks."""
    ranks_sha256: str = ""
    """SHA-256 of that file; filled in by the command, so that other ranks are another run."""
    refresh_every: int = 20
    """K: steps between two subspaces."""
    state: Policy = "row_scale"
    """lowrank: optimizer state when V changes."""
    layers: int | float | None = 0.25
    """lisa, owlore, badam: layers that have their turn at a time, a number or a share; None: each one's own."""
    others: Literal["all", "head"] = "all"
    """What is trained beside the matrices: all, or head."""
    other_lr: float | None = 3e-4
    """Peak learning rate of embeddings, norms and head where there are gradients; None: the contender's own."""
    trials: int = 4
    """Learning rates tried for each contender, at least 3."""
    lr: float | None = None
    """Learning rate at which every search starts; None: the contender's own."""
    seed: tuple[int, ...] = PROTOCOL
    """Seeds of the comparison."""
    steps: int = 30
    """Optimizer steps of methods with gradients."""
    sequences: int = 8
    """Examples in each of those steps."""
    forward_steps: int = 20
    """Steps of methods that only ask for losses."""
    forward_sequences: int = 16
    """Examples in each of those steps."""
    epsilon: float = 1e-3
    """Methods that only ask for losses: ε of the loss difference [F(W + εD) − F(W − εD)]/2ε."""
    queries: int = 1
    """Methods that only ask for losses: directions a step."""
    momentum: float = 0.0
    """Methods that only ask for losses: β of the momentum in the subspace."""
    weight_decay: float = 0.0
    """λ of the decoupled weight decay W ← (1 − lr·λ)W."""
    feedback: str = "ef14"
    """gradlite: ef14, ef21, literal (diverges), none."""
    residual: str = "bf16"
    """gradlite: precision of what is fed back: fp32, bf16, 8bit."""
    inner: str = "adam"
    """gradlite: step in its directions: adam, sgd (for ef21 and literal)."""
    precision: Precision = "fp32"
    """fp32, bf16, bf16_weights, as in lowrank pretrain."""
    lift: Lift = "stochastic"
    """How updates reach 16-bit weights: stochastic (rounding), nearest, or for lowrank master (float32 copy)."""
    optimizer: Optimizer = "adamw"
    """adamw, sgd, muon, adamw8bit, for methods without an update of their own."""
    checkpoint_every: int = 100
    """Steps between checkpoints of a training; 0 for one at an interruption only."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    workers: int = 2
    """Trainings at a time, the cores shared between them."""
    runs_dir: Path = Path("runs")
    """Where run directories go."""
    tensorboard: bool = False
    """Write the rows of each training that is still to be made as scalars for TensorBoard too, into its folder ``tensorboard``."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        if not self.method or not self.seed:
            raise ValueError("nothing to compare: method and seed need at least one value")
        allowed.at_least(self, 3, "trials")
        if TUNING_SEED in self.seed:
            raise ValueError(f"seed {TUNING_SEED} is the tuning seed; any other can be compared")
        if len(set(self.seed)) < len(self.seed):
            raise ValueError(f"a seed is named twice: {', '.join(map(str, self.seed))}")
        allowed.at_least(self, 1, "workers", "tests", "forward_steps", "forward_sequences")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        object.__setattr__(self, "ranks_sha256", allowed.ranks_sha256(self.ranks))
        for label in self.method:
            trial(self, label, 1.0)  # each checks its own values


PRESETS = {
    "default": Config(),
    "every": Config(name="every", method=EVERY),
    "smollm2": Config(
        name="smollm2", model="smollm2", method=("adamw", "lora", "lowrank:haar_stiefel", "lowrank_lr:haar_stiefel"), k=8, tests=100, length=32,
        seed=(13, 21), steps=10, sequences=4, forward_steps=10, forward_sequences=8, lr=3e-5,
    ),
    "instructions": Config(
        name="instructions", model="smollm2", task="dolly", head="response", method=("adamw", "lora", "lowrank:haar_stiefel"), k=1000, length=256,
        seed=(13,), steps=200, lr=3e-5,
    ),
    "backward": Config(name="backward", method=BACKWARD, seed=PROTOCOL[:3]),
    "backward-instructions": Config(
        name="backward-instructions", model="smollm2", task="dolly", head="response", method=BACKWARD, k=1000, length=256,
        seed=PROTOCOL[:3], trials=3, steps=200, lr=3e-5,
    ),
    "roberta": Config(
        name="roberta-sst2", model="FacebookAI/roberta-large", task="sst2", head="prompt", method=("adamw", "lora", *FORWARDS), k=16, length=128,
        rank=4, refresh_every=50, other_lr=None, steps=1000, forward_steps=100_000, forward_sequences=64, lr=1e-5,
    ),
    "smoke": Config(name="smoke", method=("adamw", "mezo"), k=4, tests=16, length=16, seed=(13, 21), steps=2, forward_steps=2, trials=3),
}  # fmt: skip


def main(config: Config) -> runs.Run:
    """Tune, train, and return the run directory with rows ``trial``, ``tested``, ``paired`` and ``peak``."""
    config = replace(config, data_sha256=tuner.local_sha256(config.task, config.folder))
    label = config.name or "".join(c if c.isalnum() or c in "-_" else "_" for c in f"{config.model}-{Path(config.task).stem}")
    run = runs.start("finetune", label, config)
    if run.done:
        return run
    try:
        if config.ranks is not None:
            allowed.ranks(config.ranks)
        tuner.asked(trial(config, config.method[0], 1.0))  # refuses a task or model before there are any cells
    except runs.WrongInput:
        runs.discard_empty(run)
        raise
    run.keep([])
    job = grid.Job(tuner.opened, tuner.tune, lambda _: None)
    tuning = {one: [trial(config, one, lr) for lr in first(config, one)] for one in config.method}
    train = lambda cells, stage="tune": grid.train(cells, config.workers, stage, config.quiet, job)  # noqa: E731
    rows, chosen = search.tuned(tuning, config.trials - 3, summary.validation, summary.tuned, train)
    compared = {one: [replace(cell, seed=seed, tests=config.tests) for seed in config.seed] for one, cell in chosen.items()}
    train([cell for some in compared.values() for cell in some], "compare")
    tested = [summary.tested(one, cell) for one, some in compared.items() for cell in some]
    references = {one: [] if one == config.method[0] else [config.method[0]] for one in config.method}
    run.log(*rows, *tested, *outcomes.paired(tested, references, of="accuracy"))
    device = runs.device(config.device)
    with runs.progress(len(chosen), "peak", config.quiet) as bar:
        for one, cell in chosen.items():
            run.log(summary.peak(one, cell, device, run))
            bar.update()
    run.finish()
    return run


if __name__ == "__main__":
    from experiments import cli

    sys.exit(cli.main(["finetune", *sys.argv[1:]]))
