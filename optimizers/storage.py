"""How an inner rule keeps its moments between steps: as they are, or in 8 bits a number with one float32 scale a block of 256.

8-bit codes are those of *8-bit Optimizers via Block-wise Quantization* (2110.02861): a dynamic (floating) map, signed for first moments and
unsigned for second ones, scaled by the largest magnitude of each block. The rounding is torchao's, to the nearest code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
BLOCK = 256  # numbers that share a scale


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
        from torchao.optim.quant_utils import dequant_with_qmap

        blocks = dequant_with_qmap(_blocks(value), _map(name, value.device), state[f"{name}_scale"].reshape(-1))
        return _joined(blocks, value)

    def write(self, state: State, name: str, value: Tensor) -> None:
        if value.ndim < 2 or not value.numel() or value.shape[-2] * value.shape[-1] < self.smallest or value.dtype == torch.float64:
            state[name] = value
            return
        from torchao.optim.quant_utils import quantize_8bit_with_qmap, scale_tensor

        scaled, scale = scale_tensor(_blocks(value), BLOCK)
        state[name] = _joined(quantize_8bit_with_qmap(scaled, _map(name, value.device)), value)
        state[f"{name}_scale"] = scale.view(*value.shape[:-2], -1)

    def drop(self, state: State, name: str) -> None:
        state.pop(name, None)
        state.pop(f"{name}_scale", None)


@cache
def _map(name: str, device: torch.device) -> Tensor:
    from torchao.optim.quant_utils import create_dynamic_map

    return torch.tensor(create_dynamic_map(signed=not name.endswith("_sq")), device=device)


def _blocks(X: Tensor) -> Tensor:
    """X (*batch, M, r), every matrix flattened and filled up with zeros to whole blocks: (blocks, 256)."""
    flat = X.flatten(-2)
    return torch.nn.functional.pad(flat, (0, -flat.shape[-1] % BLOCK)).reshape(-1, BLOCK)


def _joined(blocks: Tensor, like: Tensor) -> Tensor:
    count = like.shape[-2] * like.shape[-1]
    return blocks.reshape(*like.shape[:-2], -1)[..., :count].reshape(like.shape).contiguous()
