"""Philox4x32-10: four 32-bit words as a pure function of a 64-bit key and a 128-bit counter, in torch and in a kernel alike.

A round multiplies two words of the counter by constants and mixes the halves of the products with the other two and the key; ten rounds.
Any entry of a random matrix can so be made where it is needed, without a state and without its neighbours.
Reference: Salmon, Moraes, Dror & Shaw, Parallel random numbers: as easy as 1, 2, 3 (2011). Uniforms and normals are Triton's:
u = |word|·2⁻³¹ of the word as a signed number, normals by Box–Muller with u₁ at least 1e-7 (a normal is at most 5.7 in size, its variance
1 − 1e-7).

The words of one draw differ from those of another use of the same key by the third and fourth word of the counter, ``Stream``.
"""

from __future__ import annotations

import enum
import math
from typing import no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor

from estimators import keyed
from estimators.kernels.launch import jit, tl

WORD = 0xFFFFFFFF
MULTIPLIERS, WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)  # of the first and third word; added to the key after each round
TO_UNIFORM, LEAST = 4.6566127342e-10, 1e-7  # the largest scale that keeps every uniform below 1; least u₁ of Box–Muller
CALL, NORMAL = 100, 20  # 32-bit operations: four words; one normal of a word


class Stream(enum.IntEnum):
    """Uses of a key that must not see the same words; the third word of the counter."""

    GAUSSIAN = 0
    SIGNS = 1
    SPARSE_SIGNS = 2
    ROUNDING = 3


def key(seed: int, name: str, index: int) -> int:
    """The key (63 bits) of the draw (seed, name, index): the number that seeds its generator in estimators/keyed.py."""
    return keyed.number(seed, name, index)


def check_key(call: str, key: int) -> None:
    """Raise ``ValueError`` unless 0 ≤ ``key`` < 2⁶³."""
    if not 0 <= key < 2**63:
        raise ValueError(f"{call}: key={key} must be in [0, 2⁶³)")


def words(key: int, c0: Int[Tensor, "*a"], c1: Int[Tensor, "*b"], stream: int, c3: int = 0) -> Int[Tensor, "... 4"]:
    """The four words of the counters (c0, c1, stream, c3), as int64 in [0, 2³²); c0 and c1 are broadcast. ``key``: 64 bits, ≥ 0."""
    c0, c1 = torch.broadcast_tensors(c0, c1)
    counter = [
        c0.long() & WORD,
        c1.long() & WORD,
        torch.full_like(c0, stream, dtype=torch.int64),
        torch.full_like(c0, c3, dtype=torch.int64),
    ]
    k0, k1 = key & WORD, key >> 32
    for _ in range(10):
        a, b, c, d = counter
        first, third = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # modulo 2⁶⁴: the halves are right although the sign may not be
        counter = [(third >> 32) & WORD ^ b ^ k0, third & WORD, (first >> 32) & WORD ^ d ^ k1, first & WORD]
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return torch.stack(counter, dim=-1)


def signed(words: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The words as numbers in [−2³¹, 2³¹)."""
    return torch.where(words >= 2**31, words - 2**32, words)


def uniforms(words: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Uniforms in [0, 1), float32."""
    x = signed(words)
    return torch.where(x < 0, -x - 1, x).to(torch.float32) * TO_UNIFORM


def normals(words: Int[Tensor, "*shape 4"]) -> Float[Tensor, "*shape 4"]:
    """Four independent standard normals from four words, float32: Box–Muller of the first two and of the last two."""
    u1, u2, u3, u4 = uniforms(words).unbind(-1)
    pairs = []
    for u, v in ((u1, u2), (u3, u4)):
        radius, angle = torch.sqrt(-2 * torch.log(u.clamp_min(LEAST))), 2 * math.pi * v
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(pairs, dim=-1)


@jit
@no_type_check
def interleaved(a, b, c, d):
    """(rows, 4·q) from four (rows, q): column 4j + w is column j of the w-th."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
