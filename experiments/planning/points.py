"""Steps of full AdamW and of a low-rank method by the processes that torchrun started, with their messages and without.

Without messages (``no_sync``) a step takes t; what is sent takes s at the rate of an all-reduce alone, measured in the same run. Theory then has two
bounds for the ratio of the steps with messages. Everything is measured side by side, all processes at once, so they slow each other as in training.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import distributed, nn

from estimators import keyed, processes
from experiments import memory, pretrain
from experiments.training import models, parallel
from experiments.training.objective import Objective
from experiments.training.stepper import Stepper, Task
from experiments.training.timing import pairs, timed
from theory import step_time
from theory.communication import Traffic, traffic
from theory.llama import Setting
from theory.step_time import Link

VOCABULARY = 2560  # a small one, so that the matrices are most of the weights, as they are in large models
LARGE, ROUNDS = 2**23, 9  # float32 numbers of the all-reduce that gives the bandwidth; rounds of it
NEVER = 10**9


@dataclass(eq=False)
class Wrapped:
    """One method's step, its gradients averaged over the processes or not."""

    stepper: Stepper
    objective: nn.Module

    def together(self) -> None:
        self.stepper.step()

    def alone(self) -> None:
        with parallel.local_only(self.objective):
            self.stepper.step()


def link(device: torch.device) -> Link:
    """What an all-reduce of LARGE numbers and one of a single number say of the processes' link: medians, those of process 0 for all."""
    found = []
    for count in (LARGE, 1):
        tensor = torch.zeros(count, device=device)

        def call(tensor=tensor) -> Any:
            return distributed.all_reduce(tensor)

        call()
        found.append(statistics.median(timed(call, device) for _ in range(ROUNDS)))
    large, small = (float(processes.mean(torch.tensor(seconds, dtype=torch.float64, device=device))) for seconds in found)
    p = processes.size()
    one = Link(bandwidth=math.inf, latency=1.0).seconds(Traffic("all_reduce", 4, p))  # messages of an all-reduce, one after the other
    return Link(bandwidth=Traffic("all_reduce", 4 * LARGE, p).wire / (large - small), latency=small / one)


def wrapped(training: pretrain.Config, device: torch.device) -> Wrapped:
    """Under DDP, on random tokens that differ between the processes."""
    model = models.build(training.model, training.seed, vocab_size=VOCABULARY).to(device)  # pyright: ignore[reportArgumentType]
    objective = Objective(model, None, training.compile)
    generator = keyed.generator(training.seed, "plan", processes.rank())
    ids = torch.randint(VOCABULARY, (training.sequences, training.length), generator=generator).to(device)
    averaged: list[nn.Module] = []
    stepper = Stepper(training, device, Task(model, lambda: averaged[0](ids)))
    blocks: Any = model.model.layers
    averaged.append(parallel.wrap(objective, blocks, "ddp"))
    return Wrapped(stepper, averaged[0])


def point(training: pretrain.Config, here: Link, device: torch.device, repeats: int) -> dict[str, Any]:
    """One batch: measured ratio of the steps with messages, and the bounds from what was measured apart. ``training``: of the low-rank method."""
    training = replace(training, refresh_every=NEVER)  # redraws are not part of this
    low, full = wrapped(training, device), wrapped(replace(training, method="adamw"), device)
    others = {"low": low.together, "full alone": full.alone, "low alone": low.alone}
    rows = {row["name"]: row for row in pairs(full.together, others, device, repeats)}
    mine = replace(
        memory.setting(training, 1, "ddp", "cpu"), vocabulary=VOCABULARY, sequences=training.sequences, world_size=processes.size()
    )
    whole = replace(mine, method="adamw")
    steps = {
        name: step_time.Step(compute=rows[f"{name} alone"]["seconds"], sending=_sending(setting, here))
        for name, setting in (("full", whole), ("low", mine))
    }
    ends = sorted(step_time.bounds(steps["full"], steps["low"]))
    measured = rows["low"]
    told = {
        "model": training.model,
        "vocabulary": VOCABULARY,
        "rank": training.rank,
        "sequences": training.sequences,
        "length": training.length,
    }
    told |= {"processes": processes.size(), "bandwidth": here.bandwidth, "latency": here.latency, "repeats": repeats}
    told |= {f"{name}_compute": found.compute for name, found in steps.items()} | {
        f"{name}_sending": found.sending for name, found in steps.items()
    }
    told |= {"full_seconds": rows["peer"]["seconds"], "low_seconds": measured["seconds"]}
    told |= {
        "ratio": measured["ratio"],
        "ratio_q1": measured["ratio_q1"],
        "ratio_q3": measured["ratio_q3"],
        "low": ends[0],
        "high": ends[1],
    }
    return {"kind": "point", **told, "between": ends[0] <= measured["ratio_q3"] and measured["ratio_q1"] <= ends[1]}


def _sending(setting: Setting, here: Link) -> float:
    return sum(here.seconds(sent, step_time.calls(setting, sent)) for sent in traffic(setting))
