"""Published packages of methods that are here too, and how each makes its optimizer: what ``updating`` compares times with."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

Made = Callable[[list[nn.Parameter], int, int], torch.optim.Optimizer]
"""From parameters, rank and steps between two refreshes. Raises ``ImportError`` where the package is not, or is not for these parameters."""


def part_of(package: str, name: str) -> Any:
    """The module ``name`` of a package that cannot be imported as a whole, for what its other parts need. Raises ``ImportError`` without it."""
    whole = sys.modules.pop(package, None)
    try:
        spec = find_spec(package)
        if spec is None:
            raise ImportError(f"part_of({package!r}, {name!r}): the package is not installed")
        outer = ModuleType(package)
        outer.__path__ = list(spec.submodule_search_locations or [])
        sys.modules[package] = outer
        return import_module(f"{package}.{name}")
    finally:
        sys.modules.pop(package, None)
        if whole is not None:
            sys.modules[package] = whole


def _grouped(module: str, name: str, **group: Any) -> Made:
    return lambda ps, rank, every: getattr(import_module(module), name)(
        [{"params": ps, "rank": rank, "update_proj_gap": every, "proj_type": "std"} | group], lr=1e-3
    )


def _q_galore(ps: list[nn.Parameter], rank: int, every: int) -> torch.optim.Optimizer:
    """It takes what bitsandbytes has renamed from ``args`` alone, and waits for a GPU at every parameter."""
    own = {"params": ps, "rank": rank, "update_proj_gap": every, "proj_type": "std", "scale": 0.25, "weight_decay": 0.0}
    lazy = {"quant": True, "quant_n_bit": 4, "quant_group_size": 256, "cos_threshold": 0.4, "gamma_proj": 2, "queue_size": 5}
    arguments = SimpleNamespace(optim_bits=8, min_8bit_size=4096, max_unorm=0.0, skip_zeros=False)
    peer = import_module("q_galore_torch").QGaLoreAdamW8bit_simulate([own | lazy], lr=1e-3, args=arguments)
    if not torch.cuda.is_available():
        peer.step = patch("torch.cuda.synchronize", lambda *_: None)(peer.step)
    return peer


def _dct_adamw(ps: list[nn.Parameter], rank: int, every: int) -> torch.optim.Optimizer:
    """It has one cosine matrix, of the smaller side of the first matrix, and a line to say about every parameter."""
    if len({min(p.shape) for p in ps}) > 1:
        raise ImportError("ista_daslab_optimizers: matrices of several smaller sides")
    package = part_of("ista_daslab_optimizers", "fft_low_rank.dct_adamw")
    package.print = lambda *_: None
    return package.DCTAdamW(ps, lr=1e-3, weight_decay=0.0, rank=rank, proj="dct", use_ef=True, update_proj_gap=every, rotate_subspace=True)


def _badam(ps: list[nn.Parameter], rank: int, every: int) -> torch.optim.Optimizer:  # noqa: ARG001
    """Seven matrices a block, as in LLaMA, the last block first. It warns of float32 weights, which ours are."""
    named = [(f"layers.{i // 7}.{i % 7}.weight", p) for i, p in enumerate(ps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        base = torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.0)
        return import_module("badam").BlockOptimizer(base, named, switch_block_every=every, switch_mode="descending", verbose=0)


CODE = {"variant": "reference-code"}
PACKAGES: dict[str, tuple[str, Made, dict[str, Any]]] = {  # method, and which form → package, how it is made, our options for the same rule
    "galore exact": ("galore_torch", _grouped("galore_torch", "GaLoreAdamW", scale=0.25), CODE | {"basis": "exact"}),
    "galore": ("galore_torch", _grouped("galore_torch", "GaLoreAdamW", scale=0.25), CODE | {"basis": "randomized"}),
    "fira": ("fira", _grouped("fira", "FiraAdamW", alpha=0.25), CODE),
    "apollo": ("apollo_torch", _grouped("apollo_torch", "APOLLOAdamW", proj="random", scale_type="channel", scale=1.0), CODE),
    "apollo_mini": (
        "apollo_torch",
        _grouped("apollo_torch", "APOLLOAdamW", proj="random", scale_type="tensor", scale=128.0, rank=1),
        CODE,
    ),
    "flora": ("flora_opt", lambda ps, rank, every: import_module("flora_opt").Flora(ps, lr=1e-3, rank=rank, kappa=every, beta1=0.9), CODE),
    "q_galore": ("q_galore_torch", _q_galore, CODE),
    "dct_adamw": ("ista_daslab_optimizers", _dct_adamw, CODE),
    "badam": ("badam", _badam, {}),
    "muon": ("torch", lambda ps, rank, every: torch.optim.Muon(ps, lr=1e-3, weight_decay=0.0), {}),  # noqa: ARG005
}
