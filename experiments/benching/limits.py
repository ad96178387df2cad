"""What the machine itself can do, measured in the same run as everything that is held against it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from experiments.training import cost
from experiments.training.timing import timed

NUMBERS = {"cpu": 2**24, "cuda": 2**28}  # beyond every cache
ROUNDS = 7


@dataclass(frozen=True)
class Limits:
    """``gemm``, ``gemm16``: operations a second of square products in float32 and bfloat16; ``copy``: bytes a second that a copy reads and writes;
    ``normals``: float32 normal numbers a second."""

    gemm: float
    gemm16: float
    copy: float
    normals: float

    def seconds(self, operations: float = 0.0, normals: float = 0.0, dtype: torch.dtype = torch.float32) -> float:
        """The least time of so many operations in ``dtype`` and of normal numbers, one after the other."""
        return operations / (self.gemm16 if dtype == torch.bfloat16 else self.gemm) + normals / self.normals

    def row(self) -> dict[str, Any]:
        return {"kind": "machine", **{f"{name}_per_second": value for name, value in asdict(self).items()}}


def limits(device: torch.device) -> Limits:
    """The best of some rounds of each."""
    count = NUMBERS["cuda" if device.type == "cuda" else "cpu"]
    source, target = torch.zeros(count, device=device), torch.zeros(count, device=device)
    generator = torch.Generator(device).manual_seed(0)
    copying = min(timed(lambda: target.copy_(source), device) for _ in range(ROUNDS))
    drawing = min(timed(lambda: target.normal_(generator=generator), device) for _ in range(ROUNDS))
    return Limits(
        gemm=cost.matmul_rate(device, torch.float32),
        gemm16=cost.matmul_rate(device, torch.bfloat16),
        copy=2 * source.numel() * source.element_size() / copying,
        normals=count / drawing,
    )
