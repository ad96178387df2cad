"""Several processes that train one model: the mean of a tensor over them, and the part of a sharded tensor that a process holds.

Draws need neither: V is a pure function of its key, the same everywhere. What is learned from data does: each process sees its own part of
the batch, so the full gradients that fitted laws learn from are averaged before they are reduced to directions.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

if TYPE_CHECKING or distributed.is_available():
    from torch.distributed.tensor import DTensor
else:  # torch can be built without
    DTensor = ()

FREED = 0.5  # seconds in which gloo's threads let go of what they hold of Python


def rank() -> int:
    """Number of this process, 0 when there is one."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def size() -> int:
    """How many processes train together (the default group of torch.distributed), 1 outside of it."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def barrier() -> None:
    """All processes come here before any goes on."""
    if size() > 1:
        distributed.barrier()


def leave() -> None:
    """Destroy the default group, as the last that a process does with it; for gloo, wait until its threads hold nothing of Python.

    They free what a backward pass or a DTensor sent after the caller has its result. One that the interpreter's end overtakes there aborts
    the process, done as it is (https://github.com/pytorch/pytorch/issues/190489, open in torch 2.13), and ``torchrun`` calls the run failed.
    The group itself would wait for them, but DTensor's caches keep it.
    """
    gloo = "gloo" in distributed.get_backend()
    distributed.destroy_process_group()
    if gloo:
        time.sleep(FREED)


@torch.no_grad()
def mean(tensor: Tensor) -> Tensor:
    """The mean over all processes, which must all call this in the same order; ``tensor`` itself when there is one."""
    if size() == 1:
        return tensor
    total = tensor.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total.div_(size())


@torch.no_grad()
def largest(tensor: Tensor) -> Tensor:
    """The largest of each entry over all processes."""
    if size() > 1:
        tensor = tensor.clone()
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return tensor


def anywhere(tensor: Tensor) -> bool:
    """Whether any entry of a tensor, of which each process may hold some rows, is not zero."""
    mine = local(tensor)
    return bool(mine.any()) if mine is tensor else bool(largest(mine.any().to(torch.float32)))


def agree(numbers: Tensor) -> bool:
    """Whether all processes have the same numbers, to the last bit."""
    return size() == 1 or bool((largest(numbers) == -largest(-numbers)).all())


def local(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor (DTensor) that this process holds, sharing memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A full tensor, equal on all processes, sharded as ``pattern`` (a DTensor of its shape); itself if ``pattern`` is not sharded."""
    if not isinstance(pattern, DTensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    moved = tensor.to(pattern.device_mesh.device_type)
    return distribute_tensor(moved, pattern.device_mesh, pattern.placements, src_data_rank=None)


def first_row(tensor: Tensor) -> int:
    """Index in the whole tensor of the first row that this process holds."""
    if not isinstance(tensor, DTensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1][0]
