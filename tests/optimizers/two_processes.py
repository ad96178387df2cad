"""Started by ``torchrun``: given gradients go through ``DistributedDataParallel`` and a hook; what comes out of every step becomes a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from estimators import processes
from experiments.training.traffic import Traffic
from experiments.validation.travelling import Given
from optimizers import LawState, law_hook


@dataclass
class Scenario:
    """``gradients``: of each parameter (workers, steps, *shape). ``powersgd``: torch's hook in the place of ours. ``resumed``: the step before which
    the state goes into a new one. ``bucket``: at most so many MB, torch's default if None."""

    gradients: list[Tensor]
    options: dict[str, Any]
    powersgd: bool = False
    resumed: int | None = None
    bucket: float | None = None


@dataclass
class Outcome:
    """``gradients``: after every step, of each parameter; ``calls`` and ``bytes`` of the collectives of each backward pass in this thread; ``asked``:
    bytes of each all-reduce in any thread; ``errors`` after the last step."""

    gradients: list[list[Tensor]] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    asked: list[list[int]] = field(default_factory=list)
    errors: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def asking() -> Iterator[list[int]]:
    """Bytes of each all-reduce that is asked for, also by the threads that go on where one is done; ``Traffic`` sees its own thread only."""
    sizes: list[int] = []
    reduce = distributed.all_reduce

    def counting(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *args, **options)

    with patch.object(distributed, "all_reduce", counting):
        yield sizes


def play(scenario: Scenario) -> Outcome:
    """What this worker sees."""
    mine = [G[distributed.get_rank()] for G in scenario.gradients]
    model = DistributedDataParallel(Given([nn.Parameter(torch.zeros_like(G[0])) for G in mine]), bucket_cap_mb=scenario.bucket)
    outcome, state = Outcome(), None
    if scenario.powersgd:
        model.register_comm_hook(PowerSGDState(None, **scenario.options), powerSGD_hook)
    else:
        state = LawState.of(model, **scenario.options)
        model.register_comm_hook(state, law_hook)
    for step in range(len(mine[0])):
        if state is not None and step == scenario.resumed:
            fresh = LawState.of(model, **scenario.options)
            fresh.load_state_dict(state.state_dict())
            model = DistributedDataParallel(model.module, bucket_cap_mb=scenario.bucket)
            model.register_comm_hook(state := fresh, law_hook)
        model.zero_grad()
        loss = model([G[step] for G in mine])
        with Traffic(2) as seen, asking() as asked:
            loss.backward()
        outcome.gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        outcome.calls.append(seen.calls.total())
        outcome.bytes.append(seen.bytes.total())
        outcome.asked.append(asked)
    outcome.errors = {} if state is None else state.errors
    return outcome


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    scenarios = torch.load(folder / "scenarios.pt", weights_only=False)
    torch.save({name: vars(play(scenario)) for name, scenario in scenarios.items()}, folder / f"{distributed.get_rank()}.pt")
    processes.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
