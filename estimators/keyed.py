"""Keyed randomness: a draw is a pure function of (seed, name, index), the same in every process and on every rank.

The key is hashed (SHA-256) to the seed of a fresh generator, so draws of different parameters and steps are independent streams and none
depends on how many were made before it. Equal keys give equal draws on devices of one kind; a CPU and a GPU generator differ.
Laws that factorise (Haar, spectral) do so to the last bit at an equal number of threads; at another number the linear algebra may
round differently, by about 1e-7 in float32.

The CPU generator of torch (mt19937) uses 32 bits of its seed: among N keys about N²/2³³ pairs share a stream. Each draw keeps its exact
law, so unbiasedness is untouched; only the independence of those two is lost. GPU generators use all 64 bits.
"""

from __future__ import annotations

import hashlib

import torch

from estimators.law import Law


def generator(seed: int, name: str, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on ``device`` that depends on (seed, name, index) only. ``index``: the draw's number, ``name``: the parameter's.

    >>> a, b = generator(0, "layers.0.q_proj", 3), generator(0, "layers.0.q_proj", 3)
    >>> bool((torch.rand(4, generator=a) == torch.rand(4, generator=b)).all())
    True
    """
    return torch.Generator(device=device).manual_seed(number(seed, name, index))


def number(seed: int, name: str, index: int) -> int:
    """63 bits that depend on (seed, name, index) only: the seed of ``generator``, the key of a counter-based draw."""
    digest = hashlib.sha256(f"{seed}\x1f{name}\x1f{index}".encode()).digest()
    # the low 32 bits first: they are all that the CPU generator looks at
    return int.from_bytes(digest[:8], "little") & (2**63 - 1)


def draw(
    law: Law, seed: int, name: str, index: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The one V (n×r) of ``law`` that belongs to the key (seed, name, index)."""
    return law.sample(generator=generator(seed, name, index, device), dtype=dtype)
