"""Gradients that travel before the optimizer sees them: communication hooks of ``DistributedDataParallel``, in one process.

``powersgd``: torch's PowerSGD with its error feedback, from the third step on (torch's earliest); ``law_hook``: ours with Haar–Stiefel at c = 1;
``law_hook_feedback``: the same law at c = r/n, with what it left out added to the next gradient. Several processes average before or after, which is
linear; what one process sees is the hook.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from estimators import HaarStiefel
from optimizers import LawState, law_hook

HOOKS = {"powersgd": "1905.13727", "law_hook": "2603.20632", "law_hook_feedback": "2603.20632"}  # and their papers
FIRST = 2  # steps that PowerSGD leaves alone: DDP has not arranged its buckets yet
Give = Callable[[Sequence[Tensor] | Tensor], int]


class Given(nn.Module):
    """A model whose gradients are the tensors that it is called with."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(parameters)

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        return torch.stack([(p * G).sum() for p, G in zip(self.weights, gradients, strict=True)]).sum()


@contextmanager
def travelling(hook: str | None, parameters: Sequence[nn.Parameter], rank: int, seed: int) -> Iterator[Give]:
    """A function that sets the ``.grad`` of ``parameters`` to what arrives of given gradients, and returns the bytes that the hook keeps after it.

    ``hook``: of HOOKS, None for gradients that stay where they are; ``rank``: r of every matrix. Raises ``ValueError`` for an unknown hook.
    """
    if hook is None:
        yield lambda gradients: _stay(parameters, gradients)
        return
    if hook not in HOOKS:
        raise ValueError(f"travelling(hook={hook!r}): unknown, known are {', '.join(HOOKS)}")
    with _alone():
        # one bucket: PowerSGD waits for its second all-reduce in the answer to its first, and several would wait for each other in gloo's two threads
        size = sum(p.numel() * p.element_size() for p in parameters)
        model = DistributedDataParallel(Given(parameters), bucket_cap_mb=size // 2**20 + 1)
        kept = _register(model, hook, rank, seed)

        def travel(gradients: Sequence[Tensor] | Tensor) -> int:
            model.zero_grad()
            model(list(gradients)).backward()
            return sum(held.numel() * held.element_size() for part in kept() for held in part.values())

        yield travel


def _stay(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor] | Tensor) -> int:
    for p, G in zip(parameters, gradients, strict=True):
        p.grad = G
    return 0


def _register(model: DistributedDataParallel, hook: str, rank: int, seed: int) -> Callable[[], list[dict[Any, Tensor]]]:
    """Registers the hook; what is returned tells what it keeps."""
    if hook == "powersgd":
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

        power = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=FIRST, min_compression_rate=1, random_seed=seed)
        model.register_comm_hook(power, powerSGD_hook)
        return lambda: [power.error_dict, power.p_memory_dict, power.q_memory_dict]
    state = LawState.of(model, HaarStiefel, rank=rank, seed=seed, feedback=hook == "law_hook_feedback")
    model.register_comm_hook(state, law_hook)
    return lambda: [state.errors]


@contextmanager
def _alone() -> Iterator[None]:
    """A group of this process only; none may be there."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    _kept.append(distributed.group.WORLD)
    try:
        yield
    finally:
        distributed.destroy_process_group()


# A group whose own thread is the last to know it ends the process, and torch's closures hold it longer than the step, as long as threads wait.
_kept: deque[Any] = deque(maxlen=64)
