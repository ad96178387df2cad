"""What crosses the network: every collective that is issued while a block runs, by name, with its bytes.

``payload``: bytes of the tensor that is reduced or made whole; ``wire``: bytes that one process sends for it by the ring algorithms, which no
algorithm that divides the work evenly undercuts: all_reduce 2(p−1)/p of the payload, reduce_scatter and all_gather (p−1)/p of the whole,
broadcast (p−1)/p (each process passes it on, but the last).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHARE: dict[str, Callable[[int], float]] = {  # what one of p processes sends of the payload
    "all_reduce": lambda p: 2 * (p - 1) / p,
    "reduce_scatter": lambda p: (p - 1) / p,
    "all_gather": lambda p: (p - 1) / p,
    "broadcast": lambda p: (p - 1) / p,
}
OPERATORS = {  # of torch.distributed's two families; the second gets the input only
    "c10d.allreduce_": "all_reduce",
    "c10d._reduce_scatter_base_": "reduce_scatter",
    "c10d._allgather_base_": "all_gather",
    "c10d.broadcast_": "broadcast",
    "_c10d_functional.all_reduce": "all_reduce",
    "_c10d_functional.reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional.all_gather_into_tensor": "all_gather",
    "_c10d_functional.broadcast": "broadcast",
}
SILENT = ("c10d.barrier", "_c10d_functional.wait_tensor", "_c10d_functional._wrap_tensor_autograd")


class Traffic(TorchDispatchMode):
    """``with Traffic(p) as seen: …``; then ``seen.rows()``. A collective it does not know is listed by torch's name, with unknown ``wire``."""

    def __init__(self, processes: int) -> None:
        super().__init__()
        self.processes = processes
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own collectives come here when it is taken apart
        name = str(func).rsplit(".", 1)[0]
        if name.startswith(("c10d.", "_c10d_functional.")) and name not in SILENT:
            sizes = [leaf.numel() * leaf.element_size() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            collective = OPERATORS.get(name, name)
            self.calls[collective] += 1
            if name not in OPERATORS or collective in ("all_reduce", "broadcast"):
                self.bytes[collective] += sum(sizes)
            elif collective == "all_gather" and len(sizes) == 1:
                self.bytes[collective] += self.processes * sizes[0]
            else:
                self.bytes[collective] += max(sizes)  # of the whole and the part
        return func(*args, **(kwargs or {}))

    def rows(self) -> list[dict[str, Any]]:
        """One row a collective: calls, payload bytes, and bytes that one process sends."""
        return [
            {
                "collective": name,
                "calls": self.calls[name],
                "payload": self.bytes[name],
                "wire": int(SHARE[name](self.processes) * self.bytes[name]) if name in SHARE else None,
            }
            for name in sorted(self.calls)
        ]
