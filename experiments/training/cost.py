"""What a run costs: operations of the model, the machine's own rate, bytes held."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from estimators import processes

SIZE, SMALL, SLOW = 1024, 256, 0.02  # of the square matrices whose product gives the machine's rate; seconds


class Cost:
    """Model-FLOPs utilisation: operations of a full training step of this model, 6 a matrix weight and token plus attention, over what the
    machine's own matrix product would do in that time. A method that skips work can exceed what full training reaches."""

    def __init__(self, model: PreTrainedModel, length: int, device: torch.device, dtype: torch.dtype) -> None:
        config: Any = model.config
        embedding: Any = model.get_input_embeddings()
        matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2) - embedding.weight.numel()
        self.flops_per_token = 6 * matrices + 12 * config.num_hidden_layers * config.hidden_size * length
        self.device, self.dtype = device, dtype
        self._rate: float | None = None

    @property
    def rate(self) -> float:
        """Operations a second of one matrix product in the dtype of the run, measured at first use."""
        if self._rate is None:
            self._rate = matmul_rate(self.device, self.dtype)
        return self._rate

    def utilisation(self, tokens: int, seconds: float) -> float:
        """Share of the rate of all processes' devices that the model's operations make up; ``tokens``: of all processes."""
        return self.flops_per_token * tokens / seconds / self.rate / processes.size()

    def summary(self, loss: float | str, tokens: int, seconds: float) -> str:
        """For the progress bar."""
        shown = loss if isinstance(loss, str) else f"{loss:.3f}"
        peak = peak_bytes(self.device) / 2**20
        return f"loss {shown}, {tokens / seconds:,.0f} tokens/s, MFU {100 * self.utilisation(tokens, seconds):.0f} %, peak {peak:,.0f} MiB"


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of products of square matrices, the best of 10 rounds; on a GPU with enough of them queued to hide the launch; of small
    matrices where one of those already takes SLOW, as in 16 bits on processors that have no products for them."""
    size, queued = (8192, 4) if device.type == "cuda" else (SIZE, 1)
    if device.type == "cpu" and min(_seconds_of_products(device, dtype, SMALL, 1, rounds=2)) > SLOW:
        size = SMALL
    return 2 * size**3 / min(_seconds_of_products(device, dtype, size, queued, rounds=10))


def _seconds_of_products(device: torch.device, dtype: torch.dtype, size: int, queued: int, rounds: int) -> list[float]:
    a = torch.full((size, size), 1 / size, device=device, dtype=dtype)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        torch.stack([(a @ a)[0, 0] for _ in range(queued)]).sum().item()
        times.append((time.perf_counter() - start) / queued)
    return times


def peak_bytes(device: torch.device) -> int:
    """Largest number of bytes held since ``reset_peak``: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss is of the whole life of the process
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak(device: torch.device) -> None:
    """Forget what was held before, where the system lets a process do so."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def state_bytes(optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes of all tensors in the optimizers' states."""
    return sum(bytes_of(v) for o in optimizers for state in o.state.values() for v in state.values() if isinstance(v, Tensor))


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor, of the parts of one that wraps others, or of the rows that this process holds of a sharded one."""
    tensor = processes.local(tensor)
    parts = getattr(tensor, "tensor_attrs", None)
    if parts:
        return sum(bytes_of(getattr(tensor, name)) for name in parts)
    return tensor.numel() * tensor.element_size()


@contextmanager
def _recorded(layers: list[nn.Module], keep: Callable[[Tensor], None]) -> Iterator[None]:
    """Every tensor that the forward pass of these modules saves goes through ``keep``."""

    def pack(tensor: Tensor) -> Tensor:
        keep(tensor)
        return tensor

    stacks: list[torch.autograd.graph.saved_tensors_hooks] = []

    def enter(*_: Any) -> None:
        stacks.append(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        stacks[-1].__enter__()

    def leave(*_: Any) -> None:
        stacks.pop().__exit__()

    with ExitStack() as stack:
        for module in layers:
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield


def saved_bytes(model: nn.Module, names: list[str], loss: Callable[[], Tensor]) -> tuple[int, int]:
    """Bytes that the named modules save for the backward pass of ``loss()``: (each storage once, layer by layer), no weights."""
    fixed = {t.untyped_storage().data_ptr() for m in model.modules() for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))}
    unique: dict[int, int] = {}
    separate = 0

    def keep(tensor: Tensor) -> None:
        nonlocal separate
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            unique[storage.data_ptr()] = storage.nbytes()
            separate += tensor.numel() * tensor.element_size()

    with _recorded([model.get_submodule(name) for name in names], keep):
        value = loss()
    value.backward()
    return sum(unique.values()), separate
