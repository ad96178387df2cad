"""The training loop: micro-batches, clipping, schedule, evaluation, live measurement, checkpoints, and what happens when something breaks."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from estimators import processes
from experiments import runs
from experiments.training import checkpoint, cost, feed, models, parallel, updates
from experiments.training.advance import Advance
from experiments.training.live import Live
from experiments.training.methods import METHODS
from experiments.training.objective import Objective
from experiments.training.schedule import warmup_cosine
from experiments.training.traffic import Traffic

if TYPE_CHECKING:
    from experiments.training.config import Config

REPEATED = 4  # epochs that a reported number may take
# fields that a run begun from another's checkpoint may have changed: none of them bends the trajectory, and the schedule is that of the new steps
FREE = (
    "steps",
    "checkpoint_every",
    "keep_checkpoints",
    "eval_every",
    "eval_tokens",
    "measure_every",
    "max_skipped",
    "resume",
    "save_model",
)


class Trainer:
    """One run. ``step`` counts batches that were tried, ``skipped`` those among them that left no trace in the weights."""

    def __init__(self, config: Config, run: runs.Run) -> None:
        self.config, self.run = config, run
        self.quiet = config.quiet or processes.rank() > 0
        self.device = runs.device(config.device)
        self.batches, self.held_out, self.data = feed.open_data(config)
        model = models.build(config.model, config.seed)
        model.to(self.device)  # pyright: ignore[reportArgumentType]
        if config.precision == "bf16_weights":
            models.in_bfloat16(model)
        if config.checkpoint_activations:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = model  # its operations are counted before a method adds factors of its own
        self.cost = cost.Cost(model, config.length, self.device, torch.float32 if config.precision == "fp32" else torch.bfloat16)
        try:
            self.method = METHODS[config.method](model, config)
        except ValueError as error:
            raise runs.WrongInput(str(error)) from None
        autocast = torch.bfloat16 if config.precision == "bf16" else None
        objective = Objective(model, autocast, config.compile)
        self.facts = {**self.data, **self.method.facts(), "parameters": models.parameters(config.model)}
        parallel.check(config, processes.size())
        self.wrapped = parallel.wrap(objective, model.model.layers, config.shard)
        self.optimizers = updates.optimizers(config, self.method)
        sequences = parallel.part(config.sequences // config.accumulate)
        measured = self.method.handle if config.measure_every and sequences > 1 else None
        self.live = Live(measured, sequences, config.accumulate) if measured else None
        self.advance = Advance(config, self.method, self.optimizers, config.accumulate)
        self.step, self.skipped, self.seconds = 0, 0, 0.0
        self.taken = 0  # steps since this process began
        self.states = 0  # bytes of the optimizers' states at their largest since then: layers by turns have none between two periods

    def train(self) -> None:
        """From the last checkpoint, or from the start, to the end. Raises ``runs.Stopped`` where it cannot go on."""
        try:
            self._train()
        except OSError as error:
            if error.errno not in runs.NO_ROOM:
                raise
            raise runs.Stopped(
                f"no room left at {self.run.path}: {error.strerror}; the same command continues from the last checkpoint"
            ) from None

    def _train(self) -> None:
        config = self.config
        self._resume()
        self._announce()
        cost.reset_peak(self.device)
        with runs.interruptible() as asked, runs.progress(config.steps, self.run.path.name, self.quiet, self.step) as bar:
            while self.step < config.steps:
                start = time.perf_counter()
                row = self._measured_step()
                self.seconds += time.perf_counter() - start
                self.run.log(*self._rows(row))
                bar.set_postfix_str(self.cost.summary(row["loss"], config.sequences * config.length, time.perf_counter() - start))
                bar.update()
                if row["kind"] == "skip" and self.skipped > config.max_skipped:
                    raise runs.Diverged(
                        f"{self.skipped} steps without a finite loss and gradient, the last at step {self.step} in {row['where']}; "
                        f"a smaller --lr or --clip may help"
                    )
                last, interrupted = self.step == config.steps, parallel.any_of(asked.is_set(), self.device)
                if last or (config.eval_every and self.step % config.eval_every == 0):
                    self.run.log(self._evaluate())
                if not last and (interrupted or (config.checkpoint_every and self.step % config.checkpoint_every == 0)):
                    self._save()
                if interrupted and not last:
                    raise runs.Stopped(f"interrupted after step {self.step}, saved; the same command continues it", code=130)
        self._finish()

    # one step

    def _measured_step(self) -> dict[str, Any]:
        """One step; with several processes the third since they started, when the buckets of DDP stand, also counts what crosses the
        network, unless something is compiled (the body, or the update of adamw8bit), which an observer of operations prevents."""
        self.taken += 1
        if processes.size() == 1 or self.taken != 3 or self.config.compile or self.config.optimizer == "adamw8bit":
            return self._step()
        with Traffic(processes.size()) as traffic:
            row = self._step()
        self.run.log(*({"kind": "traffic", "step": self.step, **seen} for seen in traffic.rows()))
        return row

    def _step(self) -> dict[str, Any]:
        config, factor = self.config, warmup_cosine(self.step, self.config.steps, self.config.warmup, self.config.final_lr)
        self.advance.begin(factor, keep=parallel.bucketed(self.wrapped))
        if self.live and self.step % config.measure_every == 0:
            self.live.arm()
        loss = torch.zeros((), device=self.device)
        for i in range(config.accumulate):
            with parallel.local_only(self.wrapped) if i + 1 < config.accumulate else nullcontext():
                part = self._loss(self.batches.next()) / config.accumulate
                self.advance.backward(part)
            loss += part.detach()
        row = self.advance.end(float(processes.mean(loss)), self._ended)
        self.step += 1
        self.skipped += row["kind"] == "skip"
        return {**row, "step": self.step, "lr": config.lr * factor}

    def _ended(self) -> None:
        self.states = max(self.states, cost.state_bytes(self.optimizers))

    def _loss(self, ids: Tensor) -> Tensor:
        """Mean next-token cross-entropy of (sequences, length), in nats."""
        watching = self.method.handle is not None and self.method.handle.watching
        return self.wrapped(ids.to(self.device, non_blocking=True), eager=watching)

    def _rows(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        row |= {"tokens": self.step * self.config.sequences * self.config.length, "seconds": round(self.seconds, 4)}
        measured = self.live.rows() if self.live else []
        share = self.live.seconds / self.seconds if self.live else 0.0
        return [row, *({"kind": "live", "step": self.step, **line, "cost_share": round(share, 5)} for line in measured)]

    @torch.no_grad()
    def _evaluate(self) -> dict[str, Any]:
        self.model.eval()
        total = count = 0.0
        for ids in self.held_out:
            predicted = ids.shape[0] * (ids.shape[1] - 1)
            total += float(self._loss(ids)) * predicted
            count += predicted
        self.model.train()
        loss = total / count
        return {"kind": "eval", "step": self.step, "loss": loss, "perplexity": math.exp(min(loss, 50.0)), "tokens": count} | {
            "trained_tokens": self.step * self.config.sequences * self.config.length,
            "seconds": round(self.seconds, 4),
        }

    # begin, save, end

    def _announce(self) -> None:
        facts = self.facts | {
            "device": str(self.device),
            "planned_epochs": self.batches.planned(self.config.steps * self.config.accumulate),
        }
        self.run.write("facts.json", facts | {"left_alone": self.method.left_alone})
        if not self.quiet:
            print(
                f"{self.run.path.name}: {facts['parameters']:,} weights, {facts['trained_parameters']:,} trained numbers; "
                f"{100 * facts['touched_share']:.1f} % of the weights move by a low-rank update"
            )
            if (facts["planned_epochs"] or 0) > REPEATED:
                print(
                    f"the data will be seen {facts['planned_epochs']:.1f} times; more than {REPEATED} are too many for a number to report"
                )

    def _state(self) -> dict[str, Any]:
        return {
            "identity": runs.identity(self.config),
            "data": self.data,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "method": self.method.state_dict(),
            "batches": self.batches.state_dict(),
            "counters": {"skipped": self.skipped, "seconds": self.seconds, "measuring": self.live.seconds if self.live else 0.0},
        }

    def _save(self) -> None:
        state = parallel.full(self._state())
        try:
            if self.run.recording:
                checkpoint.save(self.run.path / "checkpoints", self.step, state, self.config.keep_checkpoints)
        except checkpoint.CheckpointError as error:
            raise runs.Stopped(str(error)) from None
        processes.barrier()

    def _resume(self) -> None:
        """Load the newest intact checkpoint of this run, or of ``resume`` if this run has none, and drop the rows that came after it."""
        say = (lambda _: None) if self.quiet else print
        found = checkpoint.load_latest(self.run.path / "checkpoints", say)
        if found is None and self.config.resume is not None:
            found = checkpoint.load_latest(self.config.resume / "checkpoints", say)
            if found is None:
                raise runs.WrongInput(
                    f"{self.config.resume} has no checkpoint to resume from; name the directory of a run of lowrank pretrain"
                )
        if found is None:
            self.run.renew()
            return
        self.step, state = found
        mine = runs.identity(self.config)
        differing = [name for name, value in mine.items() if name not in FREE and state["identity"].get(name) != value]
        if differing:
            theirs = ", ".join(f"{name}={state['identity'].get(name)!r} (now {mine[name]!r})" for name in differing)
            raise runs.WrongInput(f"the checkpoint is of another configuration: {theirs}")
        if state["data"] != self.data:
            raise runs.WrongInput(
                f"the text of {self.config.data} is no longer that of the checkpoint; restore it, or start in another --runs-dir"
            )
        if self.step >= self.config.steps:
            raise runs.WrongInput(f"the checkpoint is of step {self.step}, nothing is left to do with steps={self.config.steps}")
        parallel.load_model(self.model, state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            parallel.load_optimizer(optimizer, saved)
        self.method.load_state_dict(state["method"])
        self.batches.load_state_dict(state["batches"])
        self.skipped, self.seconds = state["counters"]["skipped"], state["counters"]["seconds"]
        if self.live:
            self.live.seconds = state["counters"]["measuring"]
        self.run.keep([row for row in self.run.rows() if row["step"] <= self.step])

    def _finish(self) -> None:
        self.run.log({"kind": "end", "step": self.step, "skipped": self.skipped, "epochs": self.batches.epochs} | self._costs())
        if self.config.save_model:
            self._export()
        self.run.finish()

    def _export(self) -> None:
        """The plain model, as transformers load it; of a sharded one a whole twin is made on the CPU."""
        model, method = self.model, self.method
        if processes.size() > 1 and self.config.shard == "fsdp":
            state = parallel.full({"model": self.model.state_dict(), "method": self.method.state_dict()})
            if not self.run.recording:
                return
            model = models.build(self.config.model, self.config.seed)
            method = METHODS[self.config.method](model, self.config)
            model.load_state_dict(state["model"])
            method.load_state_dict(state["method"])
        if self.run.recording:
            method.finalize()
            transformers.utils.logging.disable_progress_bar()
            model.save_pretrained(self.run.path / "model")

    def _costs(self) -> dict[str, Any]:
        tokens = self.step * self.config.sequences * self.config.length
        return {
            "seconds": self.seconds,
            "tokens_per_second": tokens / self.seconds,
            "matmul_flops": self.cost.rate,
            "model_flops_utilisation": self.cost.utilisation(tokens, self.seconds),
            "peak_bytes": cost.peak_bytes(self.device),
            "state_bytes": self.states,
            "fitting_bytes": self.method.handle.fitting.bytes() if self.method.handle else 0,
            "measuring_share": self.live.seconds / self.seconds if self.live else 0.0,
        }
