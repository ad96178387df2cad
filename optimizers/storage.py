"""How an inner rule keeps its moments between steps: as they are, or in 8 bits a number with one float32 scale a block of 256.

8-bit codes are those of *8-bit Optimizers via Block-wise Quantization* (2110.02861): a dynamic (floating) map, signed for first moments and
unsigned for second ones, scaled by the largest magnitude of each block. The rounding is torchao's, to the nearest code, found in a table in the
place of eight comparisons.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
BLOCK = 256  # numbers that share a scale
TINY = 1e-12  # the least scale


@dataclass(frozen=True)
class Float:
    """float32, or float64 for float64 weights."""

    def read(self, state: State, name: str) -> Tensor | None:
        """The value itself: changing it in place changes the state. None if there is none."""
        return state.get(name)

    def write(self, state: State, name: str, value: Tensor) -> None:
        """Keep ``value``."""
        state[name] = value

    def drop(self, state: State, name: str) -> None:
        """Forget ``name``."""
        state.pop(name, None)


Storage = Float
FLOAT = Float()


@dataclass(frozen=True)
class EightBit(Float):
    """uint8 codes ``name`` and float32 scales ``name_scale``; moments of fewer than ``smallest`` numbers stay float32."""

    smallest: int = 4096

    def read(self, state: State, name: str) -> Tensor | None:
        value = state.get(name)
        if value is None or value.dtype != torch.uint8:
            return value
        codes = _blocks(value)
        blocks = code_table(name, value.device)[0].index_select(0, codes.reshape(-1).int()).view(codes.shape)
        return _joined(blocks.mul_(state[f"{name}_scale"].reshape(-1, 1)), value)

    def write(self, state: State, name: str, value: Tensor) -> None:
        if value.ndim < 2 or not value.numel() or value.shape[-2] * value.shape[-1] < self.smallest or value.dtype == torch.float64:
            state[name] = value
            return
        blocks = _blocks(value)
        scale = blocks.abs().amax(-1, keepdim=True).clamp_min_(TINY)
        state[name] = _joined(nearest_codes(blocks / scale, name), value)
        state[f"{name}_scale"] = scale.view(*value.shape[:-2], -1)

    def drop(self, state: State, name: str) -> None:
        state.pop(name, None)
        state.pop(f"{name}_scale", None)


def nearest_codes(x: Tensor, name: str) -> Tensor:
    """uint8 codes of float32 numbers in [−1, 1], for the moment ``name``."""
    _, edges, lowest = code_table(name, x.device)
    flat = x.reshape(-1)
    code = lowest.index_select(0, (flat.view(torch.int32) >> 16).bitwise_and_(0xFFFF))
    code += flat >= edges.index_select(0, code)
    return code.to(torch.uint8).view(x.shape)


@cache
def code_table(name: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers that the 256 codes stand for, in ascending order; the edge above each; the code of the least number of every cell, the floats
    that have their upper 16 bits in common. No cell in [−1, 1] has more than one edge inside."""
    from torchao.optim.quant_utils import create_dynamic_map

    values = torch.tensor(create_dynamic_map(signed=not name.endswith("_sq")), dtype=torch.float64)
    edges = ((values[:-1] + values[1:]) / 2).float()
    cells = torch.arange(2**16)
    least = torch.where(cells < 2**15, cells << 16, cells - 2**16 << 16 | 0xFFFF).to(torch.int32).view(torch.float32)
    lowest = torch.searchsorted(edges, least, right=True, out_int32=True)
    return values.float().to(device), torch.cat([edges, edges.new_full((1,), torch.inf)]).to(device), lowest.to(device)


def _blocks(X: Tensor) -> Tensor:
    """X (*batch, M, r), every matrix flattened and filled up with zeros to whole blocks: (blocks, 256)."""
    flat = X.flatten(-2)
    missing = -flat.shape[-1] % BLOCK
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).reshape(-1, BLOCK)


def _joined(blocks: Tensor, like: Tensor) -> Tensor:
    count = like.shape[-2] * like.shape[-1]
    return blocks.reshape(*like.shape[:-2], -1)[..., :count].reshape(like.shape).contiguous()
