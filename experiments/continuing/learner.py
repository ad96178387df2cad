"""One sequence of tasks: a shared backbone, a head for each task, and after every task the accuracy on all so far.

Batches, dropout and heads are functions of (seed, step) as in ``lowrank finetune``; the schedule of the learning rate begins anew with each task.
A sequence takes a minute: one that was interrupted begins again.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from estimators import keyed, selection
from estimators.selection import HEADS
from experiments import runs
from experiments.continuing.config import Sequence
from experiments.continuing.methods import METHODS, optimizer_of
from experiments.finetuning import pretrained, tuner
from experiments.finetuning.objectives import Classifier
from experiments.text import labelled
from experiments.training import cost
from experiments.training.advance import Advance
from experiments.training.schedule import warmup_cosine
from optimizers import Subspace
from optimizers.gorp import GORP


class Heads(nn.Module):
    """The heads of all tasks in the place of one; ``task``: whose turn it is."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.heads, self.task = nn.ModuleList(heads), 0

    def forward(self, X: Tensor) -> Tensor:
        return self.heads[self.task](X)


def backbone(name: str, labels: list[int], seed: int) -> tuple[nn.Module, Any, Heads]:
    """(model with the heads of all tasks, tokenizer, these heads). Of the model only the linear layers of the blocks and the heads are trained.

    Raises ``WrongInput`` for a model whose head is not one module of a usual name.
    """
    made = [pretrained.load(name, "classifier", count, seed + place) for place, count in enumerate(labels)]
    model, tokenizer = made[0]
    places = [place for place, _ in model.named_children() if place in HEADS]
    if len(places) != 1:
        raise runs.WrongInput(
            f"the model {name!r} has no single head ({', '.join(places) or 'none'}); tasks in sequence need one to exchange"
        )
    heads = Heads([one.get_submodule(places[0]) for one, _ in made])
    selection.replace(model, places[0], heads)
    chosen, _ = selection.choose(model, None, None)
    trained = {id(layer.weight) for layer in chosen.values()} | {id(p) for p in heads.parameters()}
    for p in model.parameters():
        p.requires_grad_(id(p) in trained)
    return model, tokenizer, heads


class Learner:
    """One run."""

    def __init__(self, config: Sequence, run: runs.Run) -> None:
        self.config, self.run = config, run
        device = runs.device(config.device)
        tasks = [labelled.find(name) for name in config.task]
        model, tokenizer, self.heads = backbone(config.model, [len(task.labels) for task in tasks], config.seed)
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and config.length > longest:
            raise runs.WrongInput(f"length={config.length} is above the {longest} positions of {config.model}")
        self.objective = Classifier(model, tokenizer, config.length).to(device)
        self.items = [self._items(task) for task in tasks]
        try:
            self.method = METHODS[config.method](model, config)
        except ValueError as error:
            raise runs.WrongInput(str(error)) from None
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.optimizer = optimizer_of(config, self.method)
        self.advance = Advance(config, self.method, [self.optimizer])
        self.step = self.skipped = self.states = 0
        self.seconds = 0.0

    def _items(self, task: labelled.Task) -> dict[str, list[dict[str, Any]]]:
        """By part."""
        k = self.config.examples // len(task.labels)
        if not k:
            raise runs.WrongInput(f"{task.name} has {len(task.labels)} classes; examples={self.config.examples} is not one of each")
        split = labelled.split(task, k, self.config.seed, self.config.tests)
        parts = {"training": split.training, "validation": split.validation, "test": split.test}
        return {part: self.objective.items(examples) if examples else [] for part, examples in parts.items()}

    def train(self) -> None:
        """All tasks, from the start. Raises ``runs.Stopped`` where it cannot go on."""
        count = len(self.items)
        stages = [list(range(count))] if self.config.method == "joint" else [[task] for task in range(count)]
        self.run.renew()
        with runs.interruptible() as wanted, runs.progress(count * self.config.steps, self.run.path.name, self.config.quiet) as bar:
            for stage in stages:
                steps = self.config.steps * len(stage)
                for t in range(steps):
                    task = stage[t % len(stage)]
                    self.run.log({"task": self.config.task[task], **self._one(task, t // len(stage), warmup_cosine(t, steps))})
                    bar.update()
                    if self.skipped > self.config.max_skipped:
                        raise runs.Diverged(f"{self.skipped} losses or gradients that are not finite; a smaller --lr may help")
                    if wanted.is_set():
                        raise runs.Stopped("interrupted; the same command begins this sequence anew", code=130)
                self._end(stage[-1])
        self.run.finish()

    def _one(self, task: int, step: int, factor: float) -> dict[str, Any]:
        """Step number ``step`` of a task; its row."""
        config, items = self.config, self.items[task]["training"]
        begun = time.perf_counter()
        self.heads.task = task
        self.objective.train()
        batch = self.objective.batch([items[place] for place in tuner.drawn(len(items), config.sequences, config.seed, step)])
        self.advance.begin(factor)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(keyed.generator(config.seed, "dropout", self.step).initial_seed() % 2**63)
            loss = self.objective(batch)
            self.advance.backward(loss)
        row = self.advance.end(float(loss.detach()))
        self.skipped += row["kind"] == "skip"
        self.seconds += time.perf_counter() - begun
        self.step += 1
        held = self.optimizer.state_bytes() if isinstance(self.optimizer, Subspace) else cost.state_bytes([self.optimizer])
        self.states = max(self.states, held)
        return {"step": self.step, **row}

    def _end(self, last: int) -> None:
        """After a task: what is protected grows, moments are forgotten, and all tasks so far are asked."""
        begun = time.perf_counter()
        if isinstance(self.optimizer, GORP):
            self.optimizer.end_task()
        else:
            self.optimizer.state.clear()
        self.seconds += time.perf_counter() - begun
        over = last == len(self.items) - 1
        for part in ["test"] if self.config.tests else ["validation"] if over else []:
            for task in range(last + 1):
                self.heads.task = task
                scores = self.objective.score(self.items[task][part], tuner.AT_ONCE)
                named = {"after": last, "task": task, "name": self.config.task[task], "part": part}
                self.run.log({"kind": "accuracy", **named, "examples": len(self.items[task][part]), **scores})
        bases = (
            [P for p in self.method.matrices() if (P := self.optimizer.basis_of(p)) is not None] if isinstance(self.optimizer, GORP) else []
        )
        protected = {
            "basis_bytes": sum(cost.bytes_of(P) for P in bases),
            "directions": sum(P.shape[1] for P in bases),
            "protected_share": sum(P.shape[1] / P.shape[0] for P in bases) / max(1, len(bases)),
        }
        self.run.log({"kind": "protected", "after": last, **protected})
        if over:
            spent = {"seconds": round(self.seconds, 3), "state_bytes": self.states, "skipped": self.skipped}
            self.run.log({"kind": "end", "step": self.step, **spent, "trained_parameters": self.trained, **protected})


def opened(config: Sequence) -> runs.Run:
    """The run directory of this configuration, begun if it is new."""
    place = "".join(c if c.isalnum() else "_" for c in config.model)
    return runs.start("sequence", f"{place}-{config.method}", config)


def learn(config: Sequence) -> runs.Run:
    """Learn all tasks, or return the finished run. Raises ``runs.Stopped`` and ``WrongInput``."""
    run = opened(config)
    return runs.trained(run, lambda: Learner(config, run))
