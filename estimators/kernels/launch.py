"""What all kernels share: Triton where it is installed, the checks before a launch, and the two numbers of a kernel.

Without Triton everything here can be imported; a launch then raises ``ImportError``. With TRITON_INTERPRET=1 set before this is imported,
kernels run on a CPU, slowly, operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, no_type_check

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton import knobs
except ImportError:
    triton = tl = knobs = None

INTERPRETED = knobs is not None and bool(knobs.runtime.interpret)
BY_BITS = tl.constexpr(INTERPRETED) if tl is not None else None  # as a constant of kernels
MISSING = "the kernels need Triton: pip install 'lowrank-gradients[kernels]'"


class Cost(NamedTuple):
    """What a computation cannot avoid.

    ``bytes``: read and written once; ``products``: operations of matrix products, 2 a multiply-add; ``others``: other 32-bit operations.
    """

    bytes: int
    products: int
    others: int = 0

    def floor(self, bandwidth: float, products: float, others: float) -> float:
        """Seconds at ``bandwidth`` bytes a second and these operations a second, when all three overlap perfectly."""
        return max(self.bytes / bandwidth, self.products / products, self.others / others)


class _Missing:
    """In the place of a kernel without Triton: raises ``ImportError`` when it is launched."""

    def __getitem__(self, grid: Any) -> Any:
        raise ImportError(MISSING)


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """``triton.jit``, or a kernel that says what is missing."""
    if triton is None:
        return _Missing() if function is not None else lambda _: _Missing()
    return triton.jit(**options) if function is None else triton.jit(function)


@jit
@no_type_check
def dot(a, b, total):
    """total + ab, products and sums in float32. Triton's interpreter multiplies the bit patterns of bfloat16, so it is given float32
    copies, in which such products are exact."""
    if BY_BITS:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@jit
@no_type_check
def nearest(bits):
    """The upper 16 bits of finite float32 ``bits``, rounded to the nearest, ties to even: uint32 below 2¹⁶."""
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@jit
@no_type_check
def narrowed(x, DTYPE: tl.constexpr):
    """x (float32, finite) as DTYPE, rounded to nearest; Triton's interpreter would cut off to bfloat16."""
    y = x.to(DTYPE)
    if BY_BITS and y.dtype == tl.bfloat16:
        y = nearest(x.to(tl.uint32, bitcast=True)).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return y


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size`` ≥ 1."""
    return 1 << (size - 1).bit_length()


def check(call: str, tensors: Mapping[str, Tensor], dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise ``ValueError`` unless the tensors lie on one device that kernels run on, are of ``dtypes`` and are not to be differentiated."""
    if triton is None:
        raise ImportError(MISSING)
    first, *rest = tensors.items()
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes:
            raise ValueError(f"{call}: {name} is {tensor.dtype}, the kernel knows {', '.join(str(dtype) for dtype in dtypes)}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{call}: {name} requires a gradient, and the kernel has none; call it under torch.no_grad()")
        if not tensor.is_cuda and not (INTERPRETED and tensor.device.type == "cpu"):
            raise ValueError(f"{call}: {name} is on {tensor.device}; kernels run on CUDA devices, or on a CPU with TRITON_INTERPRET=1")
    for name, tensor in rest:
        if tensor.device != first[1].device:
            raise ValueError(f"{call}: {first[0]} is on {first[1].device} and {name} on {tensor.device}")
