"""One sequence of tasks: a shared backbone, a head for each task, and after every task the accuracy on all so far.

Batches, dropout and heads are functions of (seed, step) as in ``lowrank finetune``; the schedule of the learning rate begins anew with each task.
A sequence takes a minute: one that was interrupted begins again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence as Several
from typing import Any

from torch import Tensor, nn

from estimators import selection
from experiments import runs
from experiments.continuing.config import Sequence
from experiments.continuing.methods import METHODS
from experiments.finetuning import pretrained, tuner
from experiments.finetuning.objectives import Classifier
from experiments.finetuning.ways import Gradients
from experiments.text import labelled
from experiments.training import cost
from experiments.training.schedule import warmup_cosine
from optimizers.protected import Protecting


class Heads(nn.Module):
    """The heads of all tasks in the place of one; ``task``: whose turn it is."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.heads, self.task = nn.ModuleList(heads), 0

    def forward(self, X: Tensor) -> Tensor:
        return self.heads[self.task](X)


def backbone(config: Sequence, labels: list[int]) -> tuple[nn.Module, Any, Heads]:
    """(model with the heads of all tasks, tokenizer, these heads). Of the model only the linear layers of the blocks and the heads are trained.

    Raises ``WrongInput`` for a model whose head is not one module of a usual name, or whose positions are too few.
    """
    made = [pretrained.fitting(config.model, "classifier", n, config.seed + place, config.length) for place, n in enumerate(labels)]
    model, tokenizer = made[0]
    places = [place for place, _ in model.named_children() if place in selection.HEADS]
    if len(places) != 1:
        raise runs.WrongInput(
            f"the model {config.model!r} has no single head ({', '.join(places) or 'none'}); tasks in sequence need one to exchange"
        )
    heads = Heads([one.get_submodule(places[0]) for one, _ in made])
    selection.replace(model, places[0], heads)
    pretrained.freeze(model, biases=False)
    return model, tokenizer, heads


class Learner:
    """One run. ``moments``: the most bytes that the optimizer kept in a task beside P."""

    def __init__(self, config: Sequence, run: runs.Run) -> None:
        self.config, self.run = config, run
        tasks = [labelled.find(name) for name in config.task]
        model, tokenizer, self.heads = backbone(config, [len(task.labels) for task in tasks])
        self.objective = Classifier(model, tokenizer, config.length).to(runs.device(config.device))
        self.items = [self._items(task) for task in tasks]
        self.way = Gradients(config, self.objective, METHODS)
        (self.optimizer,) = self.way.optimizers
        self.step = self.moments = 0
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
                    factor = warmup_cosine(t, steps, self.config.warmup, self.config.final_lr)
                    self.run.log({"task": self.config.task[task], **self._one(task, t // len(stage), factor)})
                    bar.update()
                    if self.way.skipped > self.config.max_skipped:
                        raise runs.Diverged(f"{self.way.skipped} losses or gradients that are not finite; a smaller --lr may help")
                    if wanted.is_set():
                        raise runs.Stopped("interrupted; the same command begins this sequence anew", code=130)
                self._end(stage[-1])
        self.run.finish()

    def _one(self, task: int, step: int, factor: float) -> dict[str, Any]:
        """Step number ``step`` of a task; its row."""
        config, items = self.config, self.items[task]["training"]
        self.heads.task = task
        places = tuner.drawn(len(items), config.sequences, config.seed, step)
        row, seconds = tuner.stepped(self.way, items, places, factor, config.seed, self.step)
        self.seconds += seconds
        self.step += 1
        self.moments = max(self.moments, cost.state_bytes([self.optimizer]) - sum(map(cost.bytes_of, self._bases())))
        return {"step": self.step, **row}

    def _bases(self) -> list[Tensor]:
        """P of every weight that has one."""
        if not isinstance(self.optimizer, Protecting):
            return []
        return [P for W in self.optimizer.protected() if (P := self.optimizer.basis_of(W)) is not None]

    def _end(self, last: int) -> None:
        """After a task: what is protected grows, moments are forgotten, and all tasks so far are asked."""
        begun = time.perf_counter()
        if isinstance(self.optimizer, Protecting):
            self.optimizer.end_task()
        else:
            self.optimizer.state.clear()
        self.seconds += time.perf_counter() - begun
        over = last == len(self.items) - 1
        for part in ["test"] if self.config.tests else ["validation"] if over else []:
            for task in range(last + 1):
                self.heads.task = task
                items = self.items[task][part]
                named = {"after": last, "task": task, "name": self.config.task[task], "part": part, "examples": len(items)}
                self.run.log({"kind": "accuracy", **named, **self.objective.score(items, tuner.AT_ONCE), "chance": chance(items)})
        bases = self._bases()
        protected = {
            "basis_bytes": sum(cost.bytes_of(P) for P in bases),
            "directions": sum(P.shape[1] for P in bases),
            "protected_share": sum(P.shape[1] / P.shape[0] for P in bases) / max(1, len(bases)),
        }
        self.run.log({"kind": "protected", "after": last, **protected})
        if over:
            spent = {"seconds": round(self.seconds, 3), "state_bytes": self.moments + protected["basis_bytes"], "skipped": self.way.skipped}
            self.run.log({"kind": "end", "step": self.step, **spent, "trained_parameters": self.way.trained, **protected})


def chance(items: Several[dict[str, Any]]) -> float:
    """Accuracy of one answer for all items, the most frequent."""
    return max(Counter(item["labels"] for item in items).values()) / len(items)


def opened(config: Sequence) -> runs.Run:
    """The run directory of this configuration, begun if it is new."""
    place = "".join(c if c.isalnum() else "_" for c in config.model)
    return runs.start("sequence", f"{place}-{config.method}", config)


def learn(config: Sequence) -> runs.Run:
    """Learn all tasks, or return the finished run. Raises ``runs.Stopped`` and ``WrongInput``."""
    run = opened(config)
    return runs.trained(run, lambda: Learner(config, run))
