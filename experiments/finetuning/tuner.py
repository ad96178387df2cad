"""The fine-tuning loop: the same batches, schedule and evaluation for methods with gradients and for those that only ask for losses.

Batches are a function of (seed, step), and so are dropout's draws: an interrupted training goes on from its checkpoint as if nothing had happened.
Methods that only ask for losses are without dropout, which would differ between the two losses of a difference.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from estimators import keyed
from experiments import runs
from experiments.finetuning import instructions, pretrained
from experiments.finetuning.config import WITH_LAWS, Tuning
from experiments.finetuning.objectives import Classifier, Objective, Prompt, Response
from experiments.finetuning.ways import Differences, Gradients
from experiments.text import labelled
from experiments.training import checkpoint, cost, models, tensorboard
from experiments.training.schedule import warmup_cosine

AT_ONCE = 64  # examples of an evaluation at a time; of responses, which have a row of logits a token, a quarter


class Tuner:
    """One run. ``step`` counts batches that were tried; ``skipped`` what of them had no finite loss: steps, or queries of a loss difference."""

    def __init__(self, config: Tuning, run: runs.Run) -> None:
        self.config, self.run = config, run
        self.device = runs.device(config.device)
        self.objective, self.split = asked(config)
        self.objective.to(self.device)
        model = self.objective.model
        if config.precision == "bf16_weights":
            models.in_bfloat16(model)
        if config.recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # pyright: ignore[reportCallIssue]
        if config.others == "head":
            pretrained.freeze(model, biases=True)
        self.items = [self.objective.items(part) for part in (self.split.training, self.split.validation, self.split.test)]
        self.way: Gradients | Differences = (Differences if config.forward_only else Gradients)(config, self.objective)
        self.step, self.seconds, self.states = 0, 0.0, 0

    def train(self) -> None:
        """From the last checkpoint, or from the start, to the end. Raises ``runs.Stopped`` where it cannot go on."""
        config = self.config
        self._resume()
        with runs.interruptible() as wanted, runs.progress(config.steps, self.run.path.name, config.quiet, self.step) as bar:
            while self.step < config.steps:
                row = self.advance()
                self.run.log(row)
                bar.update()
                if self.way.skipped > config.max_skipped * (config.queries if config.forward_only else 1):
                    raise runs.Diverged(
                        f"{self.way.skipped} losses or gradients that are not finite up to step {self.step}; a smaller --lr may help"
                    )
                last = self.step == config.steps
                if (wanted.is_set() and not last) or (config.checkpoint_every and self.step % config.checkpoint_every == 0):
                    self._save()
                if wanted.is_set() and not last:
                    raise runs.Stopped(f"interrupted after step {self.step}, saved; the same command continues it", code=130)
        self._finish()

    def advance(self) -> dict[str, Any]:
        """One step; its row."""
        config, factor = self.config, warmup_cosine(self.step, self.config.steps, self.config.warmup, self.config.final_lr)
        row, seconds = stepped(self.way, self.items[0], self._places(), factor, config.seed, self.step)
        self.seconds += seconds
        self.step += 1
        self.states = max(self.states, cost.state_bytes(self.way.optimizers))
        return {"kind": "train", "step": self.step, "lr": config.lr * factor, **row, "seconds": round(self.seconds, 4)}

    def _places(self) -> list[int]:
        return drawn(len(self.items[0]), self.config.sequences, self.config.seed, self.step)

    def _examples(self) -> str:
        """The SHA-256 of all tokens and labels."""
        said = json.dumps([(item["input_ids"], item["labels"]) for part in self.items for item in part])
        return hashlib.sha256(said.encode()).hexdigest()

    def _state(self) -> dict[str, Any]:
        return {
            "examples": self._examples(),
            "model": self.objective.model.state_dict(),
            "way": self.way.state_dict(),
            "counters": {"seconds": self.seconds, "states": self.states},
        }

    def _save(self) -> None:
        try:
            checkpoint.save(self.run.path / "checkpoints", self.step, self._state(), 1)
        except checkpoint.CheckpointError as error:
            raise runs.Stopped(str(error)) from None

    def _resume(self) -> None:
        found = checkpoint.load_latest(self.run.path / "checkpoints", (lambda _: None) if self.config.quiet else print)
        if found is None:
            self.run.renew()
            return
        step, state = found
        if state["examples"] != self._examples():
            raise runs.WrongInput(f"the examples of {self.config.task} are no longer those of the checkpoint; start in another --runs-dir")
        self.step, self.seconds, self.states = step, state["counters"]["seconds"], state["counters"]["states"]
        self.objective.model.load_state_dict(state["model"])
        self.way.load_state_dict(state["way"])
        self.run.keep([row for row in self.run.rows() if row["step"] <= step])

    def _finish(self) -> None:
        at_once = AT_ONCE // 4 if self.config.head == "response" else AT_ONCE
        for part, items in zip(("validation", "test"), self.items[1:], strict=True):
            self.run.log({"kind": "eval", "step": self.step, "part": part, "examples": len(items), **self.objective.score(items, at_once)})
        said = {
            "seconds": round(self.seconds, 4),
            "state_bytes": self.states,
            "skipped": self.way.skipped,
            "trained_parameters": self.way.trained,
        }
        self.run.log({"kind": "end", "step": self.step, **said})
        if self.config.save_model:
            model: Any = self.way.finalize()
            with models.quietly():
                model.save_pretrained(self.run.path / "model")
            self.objective.tokenizer.save_pretrained(self.run.path / "model")
        shutil.rmtree(self.run.path / "checkpoints", ignore_errors=True)
        self.run.finish()


def stepped(
    way: Gradients | Differences, items: Sequence[dict[str, Any]], places: list[int], factor: float, seed: int, step: int
) -> tuple[dict[str, Any], float]:
    """One step on the ``items`` at ``places``: its row, and its seconds. ``factor``: share of the peak learning rates; dropout's draws are those of
    (seed, step)."""
    begun = time.perf_counter()
    batch = way.objective.batch([items[place] for place in places])
    if isinstance(way, Gradients):
        way.method.visit(torch.tensor(places))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(keyed.generator(seed, "dropout", step).initial_seed() % 2**63)
        row = way.step(batch, factor)
    if batch["labels"].is_cuda:
        torch.cuda.synchronize(batch["labels"].device)
    return row, time.perf_counter() - begun


def drawn(n: int, size: int, seed: int, step: int) -> list[int]:
    """Which of n examples are those of a step, all of them if there are fewer than ``size``: each once an epoch, in an order that depends on (seed,
    epoch) only."""
    size = min(n, size)
    orders: dict[int, list[int]] = {}
    found = []
    for number in range(step * size, (step + 1) * size):
        epoch, place = divmod(number, n)
        if epoch not in orders:
            orders[epoch] = torch.randperm(n, generator=keyed.generator(seed, "examples", epoch)).tolist()
        found.append(orders[epoch][place])
    return found


def asked(config: Tuning) -> tuple[Objective, labelled.Split]:
    """The model with its question on the CPU, and the examples."""
    autocast = torch.bfloat16 if config.precision == "bf16" else None
    if config.head == "response":
        split = instructions.split(config.task, config.k, config.seed, config.tests)
        model, tokenizer = pretrained.fitting(config.model, config.head, 0, config.seed, config.length)
        return Response(model, tokenizer, config.length, autocast), split
    task = labelled.find(config.task, config.folder)
    split = labelled.split(task, config.k, config.seed, config.tests, config.folder)
    model, tokenizer = pretrained.fitting(config.model, config.head, len(task.labels), config.seed, config.length)
    if config.head == "prompt":
        return Prompt(model, tokenizer, config.length, autocast, task), split
    return Classifier(model, tokenizer, config.length, autocast), split


def local_sha256(task: str, folder: Path | None) -> str:
    """Of the local files that a task is read from; empty for packages and the hub."""
    places = [place for place in (folder, Path(task)) if place is not None and place.exists()]
    files = [file for place in places for file in (sorted(place.glob("*.jsonl")) if place.is_dir() else [place])]
    return hashlib.sha256("".join(runs.sha256(file) for file in files).encode()).hexdigest() if files else ""


def opened(config: Tuning) -> runs.Run:
    """The run directory of this configuration, begun if it is new."""
    law = f"-{config.law}" if config.method in WITH_LAWS else ""
    place = "".join(c if c.isalnum() else "_" for c in f"{config.model}-{config.task}".replace("/", "-"))
    return runs.start("tuning", f"{place}-{config.method}{law}", config)


def tune(config: Tuning) -> runs.Run:
    """Train, or continue to train, and return the finished run directory. Raises ``runs.Stopped`` and ``WrongInput``."""
    run = opened(config)
    with tensorboard.followed(run, config.tensorboard) as followed:
        runs.trained(followed, lambda: Tuner(config, followed))
    return run
