"""One run by several processes, started by ``torchrun``: who is who, how the model is wrapped, and states that fit any number of processes.

Every process builds the same model from the same seed, takes its part of each micro-batch, and makes the same draws. ``ddp`` keeps the model
everywhere and averages gradients; ``fsdp`` (``fully_shard``, one group a decoder block and one for embeddings, head and norm) keeps of every
weight, gradient and optimizer state the rows of one process. Process 0 alone writes files.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from estimators import processes
from experiments.runs import WrongInput
from experiments.training.methods import METHODS, Projected

PATIENCE = timedelta(hours=1)  # while process 0 builds tokens or writes a checkpoint

if TYPE_CHECKING:
    from experiments.training.config import Config, Shard


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """The process group of ``torchrun`` (gloo on CPUs, NCCL on GPUs) while this lasts; nothing where one process runs or a group exists."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    cuda = device.type == "cuda"
    distributed.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None, timeout=PATIENCE)
    yield
    processes.leave()  # not after an error: another process may wait in a collective for ever


@contextmanager
def first() -> Iterator[None]:
    """Process 0 goes first, the others when it is through: for files that are made once."""
    if processes.rank() != 0:
        processes.barrier()
    try:
        yield
    finally:  # what process 0 cannot make, the others find missing too
        if processes.rank() == 0:
            processes.barrier()


def part(sequences: int) -> int:
    """Sequences of a micro-batch that one process takes. Raises ``WrongInput`` unless all take as many."""
    if sequences % processes.size():
        raise WrongInput(f"a micro-batch of {sequences} sequences cannot be divided among {processes.size()} processes")
    return sequences // processes.size()


def check(config: Config, size: int) -> None:
    """Raises ``WrongInput`` for what cannot be sharded over ``size`` processes."""
    if size == 1 or config.shard != "fsdp":
        return
    if config.precision == "bf16_weights" and config.method != "adamw":
        raise WrongInput("bf16_weights has float32 factors beside its weights, which fully_shard does not take; use bf16, or --shard ddp")
    if issubclass(METHODS[config.method], Projected):
        raise WrongInput(
            f"the projector of {config.method} needs whole gradients, which no process has under fsdp; use --shard ddp, or lowrank"
        )
    if config.optimizer == "adamw8bit":
        raise WrongInput("the states of adamw8bit cannot be sharded by rows; use --optimizer adamw, or --shard ddp")
    if config.coupled:
        raise WrongInput("coupled compares whole columns, which no process has under fsdp; use --coupled 0, or --shard ddp")
    if config.online:
        raise WrongInput("online learning sees whole sketches, which no process has under fsdp; use --online 0, or --shard ddp")


def wrap(objective: nn.Module, blocks: nn.ModuleList, shard: Shard) -> nn.Module:
    """``objective`` so that its gradients are those of all processes: itself, in DDP, or sharded in place."""
    if processes.size() == 1:
        return objective
    if shard == "ddp":
        with warnings.catch_warnings():  # the name that follows it is not in all supported versions of torch
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            # V is a buffer, equal everywhere already; by default DDP sends it in every forward pass
            return DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)
    for block in blocks:
        fully_shard(block)
    fully_shard(objective)
    gc.collect()  # the whole parameters are in cycles of references, which may be collected much later
    return objective


def bucketed(wrapped: nn.Module) -> bool:
    """Whether gradients are views of DDP's buckets, to be zeroed and not freed: else those of early micro-batches lie beside the buckets."""
    return isinstance(wrapped, DistributedDataParallel)


def local_only(wrapped: nn.Module) -> AbstractContextManager[None]:
    """Backward passes that keep their gradients to themselves, for all micro-batches but the last. Sharded gradients always travel: no
    process has room for whole ones."""
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()


def full(state: Any) -> Any:
    """A nested state with every sharded tensor whole, on the CPU of process 0; the others, which must call this too, get empty ones."""
    if isinstance(state, dict):
        return {key: full(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(full(value) for value in state)
    if not isinstance(state, DTensor):
        return state
    whole = plain(state.detach())
    return whole.cpu() if processes.rank() == 0 else whole.new_empty(0)


def load_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a full state into a model that may be sharded."""
    own = model.state_dict()
    model.load_state_dict({name: processes.like(value, own[name]) if name in own else value for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a full state into an optimizer whose parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]  # a state dict numbers them in this order

    def mine(parameter: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        whole = {key for key, value in values.items() if isinstance(value, Tensor) and value.shape == parameter.shape}
        return {key: processes.like(value, parameter) if key in whole else value for key, value in values.items()}

    optimizer.load_state_dict({**state, "state": {i: mine(parameters[i], values) for i, values in state["state"].items()}})


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether it is set in any process; all must ask together."""
    return flag if processes.size() == 1 else bool(processes.mean(torch.tensor(float(flag), device=device)) > 0)


def plain(tensor: Tensor) -> Tensor:
    """A number that was computed from sharded tensors, as an ordinary tensor."""
    return cast(Tensor, tensor.full_tensor()) if isinstance(tensor, DTensor) else tensor
