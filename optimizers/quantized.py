"""Affine integer codes: x ≈ scale·(code − zero) in groups of adjacent numbers, for projectors in 4 bits and weights in 8.

To the nearest: scale = (max − min)/(2ᵇ − 1) over a group and zero, and zero a code, which cuts up to half a code off one end; within scale/2.
Stochastic: right in expectation, E[code] = x/scale + zero, for which no end may be cut: the finest scale whose codes reach both. Differs from
Q-GaLore's code, which rounds in the first grid either way, and what was cut off always inwards.

``Int8Linear`` is a layer whose weight is nothing but codes between steps; the parameter that optimizers and autograd see has its shape and gradient
and takes no memory.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from estimators.selection import FUSED

GROUP = 256
SMALLEST = 1e-5  # range of a group, so that zeros have a scale
TINY = 1e-30  # codes on a side without numbers


class Codes(NamedTuple):
    """uint8 ``codes`` (groups, size), ``scale`` (groups, 1) in float32 and uint8 ``zero`` (groups, 1)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def quantize(x: Tensor, bits: int, group: int = GROUP, generator: torch.Generator | None = None, uniform: Tensor | None = None) -> Codes:
    """Codes of x, read row by row in groups of ``group_size``; stochastic with a ``generator``, or with the ``uniform`` numbers (groups, size)."""
    size = group_size(x.numel(), group)
    flat = x.reshape(-1, size).to(torch.promote_types(x.dtype, torch.float32))
    top = 2**bits - 1
    low, high = flat.amin(1, keepdim=True).clamp_max(0), flat.amax(1, keepdim=True).clamp_min(0)
    scale, zero = (nearest_grid if generator is None and uniform is None else whole_grid)(low, high, top)
    at = flat / scale
    if generator is not None:
        uniform = torch.rand(at.shape, generator=generator, device=at.device, dtype=at.dtype)
    rounded = torch.round(at) if uniform is None else torch.floor(at) + (uniform < at - torch.floor(at))
    return Codes((rounded + zero).clamp(0, top).to(torch.uint8), scale, zero.to(torch.uint8))


def group_size(count: int, group: int) -> int:
    """The largest number from an eighth of ``group`` to ``group`` that divides ``count``; without one, all of them are one group."""
    return next((size for size in range(group, group // 8, -1) if count % size == 0), count)


def nearest_grid(low: Tensor, high: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and zero for numbers in [low, high] ∋ 0, in codes from 0 to ``top``; up to half a code of one end is cut."""
    scale = (high - low).clamp_min(SMALLEST) / top
    return scale, (-torch.round(low / scale)).clamp(0, top)


def whole_grid(low: Tensor, high: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The same with both ends in reach: zero is rounded to the side that makes the finer scale, at most top/(top − 1) of the other grid's."""
    ideal = (-low / ((high - low).clamp_min(SMALLEST) / top)).clamp(0, top)
    zero = torch.cat([ideal.floor(), ideal.ceil()], 1)
    scale = torch.maximum(-low / zero.clamp_min(TINY), high / (top - zero).clamp_min(TINY)).clamp_min(SMALLEST / top)
    best = scale.argmin(1, keepdim=True)
    return scale.gather(1, best), zero.gather(1, best)


def dequantize(coded: Codes, shape: torch.Size | tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that the codes stand for, in ``shape``."""
    exact = torch.promote_types(coded.scale.dtype, torch.float32)
    return (coded.scale * (coded.codes.to(exact) - coded.zero.to(exact))).reshape(shape).to(dtype)


def pack(codes: Tensor) -> Tensor:
    """4-bit codes (any shape), two a byte: (⌈count/2⌉,)."""
    flat = codes.reshape(-1)
    flat = torch.cat([flat, flat.new_zeros(flat.numel() % 2)])
    return flat[::2] | (flat[1::2] << 4)


def unpack(packed: Tensor, count: int) -> Tensor:
    """The inverse, (count,)."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).reshape(-1)[:count]


class Int8Linear(nn.Module):
    """A linear layer whose weight is held in 8-bit codes. ``weight`` has the shape (m, n), a gradient, and no numbers, and is left out of
    ``state_dict``; optimizers of this package read and write the codes through ``read`` and ``store``, others cannot train it. Exact in the given
    codes: products are of the dequantised weight. Scales keep their precision when the layer's is changed."""

    def __init__(self, linear: nn.Linear, group: int = GROUP) -> None:
        super().__init__()
        self.group, self.bias = group, linear.bias
        for name, value in quantize(linear.weight.detach(), 8, group)._asdict().items():
            self.register_buffer(name, value)
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=linear.weight.requires_grad)
        self._empty()

    def _empty(self) -> None:
        """Leave the weight without numbers, and known as this layer's: copies and conversions give it memory."""
        self.weight.data = self.weight.data.new_zeros(()).expand(self.weight.shape)
        cast(Any, self.weight).quantized = self

    def read(self, dtype: torch.dtype | None = None) -> Float[Tensor, "m n"]:
        """The weight in ``dtype``, or in the parameter's precision."""
        codes = Codes(cast(Tensor, self.codes), cast(Tensor, self.scale), cast(Tensor, self.zero))
        return dequantize(codes, self.weight.shape, dtype or self.weight.dtype)

    @torch.no_grad()
    def store(self, W: Float[Tensor, "m n"], generator: torch.Generator | None = None, uniform: Tensor | None = None) -> None:
        """Codes of W, with new scales; stochastic with a generator."""
        for name, value in quantize(W, 8, self.group, generator, uniform)._asdict().items():
            cast(Tensor, getattr(self, name)).copy_(value)

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        y = cast(Tensor, _Product.apply(x, self.weight, self))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        scale = cast(Tensor, self.scale)
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        self._empty()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._empty()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}weight"]

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        weight = self._parameters.pop("weight")
        super()._load_from_state_dict(*args, **options)
        self._parameters["weight"] = weight

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}, bias={self.bias is not None}, group={self.group}"


class _Product(torch.autograd.Function):
    """xWᵀ with W read from its codes in both passes, so that it lives in neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Int8Linear) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(x)
        ctx.layer = layer
        return x @ layer.read().to(x.dtype).mT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (D,), (x,) = gradients, ctx.saved_tensors  # under autocast D is in its precision and x in its own
        layer: Int8Linear = ctx.layer
        into_x = (D @ layer.read().to(D.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        into_w = D.reshape(-1, D.shape[-1]).mT @ x.reshape(-1, x.shape[-1]).to(D.dtype) if ctx.needs_input_grad[1] else None
        return into_x, None if into_w is None else into_w.to(layer.weight.dtype), None


def int8_weights(model: nn.Module, chosen: set[str] | None = None, group: int = GROUP) -> list[str]:
    """Replace linear layers by ``Int8Linear``, those called ``chosen``, or all; returns their names. Embeddings, heads and norms are the caller's
    to leave out. Raises ``ValueError`` for a weight that other modules share."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    fused = {
        id(child) for module in model.modules() if isinstance(module, FUSED) for child in module.modules()
    }  # they read weights themselves
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and (chosen is None or name in chosen)
    }
    names = [name for name, module in linear.items() if id(module) not in fused]
    if chosen is not None and len(names) < len(linear):
        raise ValueError(f"int8_weights: {', '.join(linear.keys() - set(names))}: their weights are read by a fused module around them")
    for name in names:
        if uses[id(cast(nn.Linear, model.get_submodule(name)).weight)] > 1:
            raise ValueError(f"int8_weights: the weight of {name} is shared with another module")
    for name in names:
        model.set_submodule(name, Int8Linear(cast(nn.Linear, model.get_submodule(name)), group))
    return names


def float_weights(model: nn.Module) -> nn.Module:
    """The same with every ``Int8Linear`` a plain linear layer again, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Int8Linear):
            plain = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=False, device="meta")
            plain.weight, plain.bias = nn.Parameter(layer.read(), layer.weight.requires_grad), layer.bias  # pyright: ignore[reportAttributeAccessIssue]
            model.set_submodule(name, plain)
    return model
