"""Bytes that an optimizer keeps between two steps for one m×n matrix at rank r, in float32 unless the rule says otherwise.

For m ≤ n (the larger dimension keeps its length, the smaller one is projected; transpose otherwise) numbers of

    AdamW 2mn · GaLore, GoLore, COAP mr + 2nr · GaLore with Adafactor mr + n + r · Flora nr + mr (reference code: + m + n) · Fira, APOLLO mr + 2nr + 1
    LDAdam mr + 2nr + mn · PLUMAGE, SpectralAdam mr + 2nr + r · Online Subspace Descent 3mr + 2nr · RSO mr + 2nr, with a pull mr + 3nr
    Grass 2nr + 2r and DCT-AdamW mn + 2nr + r, the r indices in 64 bits · Trion mn + r, likewise · Dion mn + mr · Muon mn · MoFaSGD (m + n + 1)r
    GradNormLoRP mr + 2nr + 2·rows · FOAM 2mn/2ˡ, whole blocks a row · Q-GaLore mr half bytes + 2nr bytes, and scales and zeros of the groups
    LOMO nothing · AdaLomo m + n · GradLite mr + 2nr + mn/2 + 1 with m the rows and the residual in bfloat16
    by turns: FRUGAL, LISA, BAdam 2mn, OwLore mr + 2nr for the share of matrices that have their turn; GUM mr + mn for the share q, mr + nr otherwise
    after a communication hook AdamW's, and with error feedback mn a worker; PowerSGD also (m + n)r

Sources: the memory column of each paper, with what its published code keeps beside it (APOLLO and Flora store the random matrix that their
papers count as a seed; LDAdam's error buffer hides in the gradient).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

BLOCK = 256  # numbers that share a scale, of 8-bit moments and of 4-bit projectors
SMALLEST_8BIT = 4096  # moments of fewer numbers stay in float32
KEPT = 5  # likenesses that Q-GaLore remembers
LEVEL = 2  # of FOAM, by default


class Shape(NamedTuple):
    """m×n and r, r cut to the smaller dimension."""

    rows: int
    columns: int
    rank: int

    @property
    def small(self) -> int:
        return min(self.rows, self.columns)

    @property
    def large(self) -> int:
        return max(self.rows, self.columns)

    @property
    def entries(self) -> int:
        return self.rows * self.columns


class Formula(NamedTuple):
    """``text``; bytes of a matrix that has its turn, which is every one unless ``share`` says otherwise, and of one that has not."""

    text: str
    active: Callable[[Shape], float]
    idle: Callable[[Shape], float] = lambda _: 0
    share: float = 1.0


def _frame_and_moments(s: Shape) -> float:
    return 4 * (s.small + 2 * s.large) * s.rank


def _four_bits(s: Shape) -> float:
    projector, moments = s.small * s.rank, s.large * s.rank
    groups = next((projector // size for size in range(BLOCK, BLOCK // 8, -1) if projector % size == 0), 1)
    each = 4 * moments if moments < SMALLEST_8BIT else moments + 4 * math.ceil(moments / BLOCK)
    return math.ceil(projector / 2) + 5 * groups + 4 * KEPT + 2 * each


FORMULAS: dict[str, Formula] = {
    "adamw": Formula("2mn", lambda s: 8 * s.entries),
    "galore": Formula("mr + 2nr", _frame_and_moments),
    "golore": Formula("mr + 2nr", _frame_and_moments),
    "flora": Formula("mr + nr", lambda s: 4 * (s.small + s.large) * s.rank),
    "fira": Formula("mr + 2nr + 1", lambda s: _frame_and_moments(s) + 4),
    "apollo": Formula("mr + 2nr + 1", lambda s: _frame_and_moments(s) + 4),
    "apollo_mini": Formula("m + 2n + 1", lambda s: 4 * (s.small + 2 * s.large + 1)),
    "frugal": Formula("2ρmn", lambda s: 8 * s.entries, share=0.25),
    "ldadam": Formula("mr + 2nr + mn", lambda s: _frame_and_moments(s) + 4 * s.entries),
    "plumage": Formula("mr + 2nr + r", lambda s: _frame_and_moments(s) + 4 * s.rank),
    "spectral_adam": Formula("mr + 2nr + r", lambda s: _frame_and_moments(s) + 4 * s.rank),
    "q_galore": Formula("mr/8 + 2nr/4", _four_bits),
    "coap": Formula("mr + 2nr", _frame_and_moments),
    "online_subspace": Formula("3mr + 2nr", lambda s: 4 * (3 * s.small + 2 * s.large) * s.rank),
    "grass": Formula("2nr + 3r", lambda s: 8 * s.large * s.rank + 12 * s.rank),
    "grass_sampled": Formula("2nr + 3r", lambda s: 8 * s.large * s.rank + 12 * s.rank),
    "rso": Formula("mr + 2nr", _frame_and_moments),
    "grad_norm_lorp": Formula("mr + 2nr + 2·rows", lambda s: _frame_and_moments(s) + 8 * s.rows),
    "foam": Formula("2mn/2ˡ", lambda s: 8 * s.rows * math.ceil(s.columns / 2**LEVEL)),
    "dct_adamw": Formula("mn + 2nr + 2r", lambda s: 4 * s.entries + 8 * s.large * s.rank + 8 * s.rank),
    "muon": Formula("mn", lambda s: 4 * s.entries),
    "trion": Formula("mn + 2r", lambda s: 4 * s.entries + 8 * s.rank),
    "dion": Formula("mn + mr", lambda s: 4 * s.entries + 4 * s.small * s.rank),
    "mofasgd": Formula("(m + n + 1)r", lambda s: 4 * (s.rows + s.columns + 1) * s.rank),
    "gum": Formula("mr + nr or mn", lambda s: 4 * s.small * s.rank + 4 * s.entries, lambda s: 4 * (s.small + s.large) * s.rank, share=0.5),
    "lisa": Formula("2mn·γ/L", lambda s: 8 * s.entries, share=0.25),
    "owlore": Formula("(mr + 2nr)·γ/L", _frame_and_moments, share=0.25),
    "badam": Formula("2mn/L", lambda s: 8 * s.entries, share=0.25),
    "lomo": Formula("0", lambda _: 0),
    "adalomo": Formula("m + n", lambda s: 4 * (s.rows + s.columns)),
    "gradlite": Formula("mr + 2nr + mn/2 + 1", lambda s: 4 * (s.rows + 2 * s.columns) * s.rank + 2 * s.entries + 4),
    "powersgd": Formula("2mn + mn + (m + n)r", lambda s: 12 * s.entries + 4 * (s.rows + s.columns) * s.rank),
    "law_hook": Formula("2mn", lambda s: 8 * s.entries),
    "law_hook_feedback": Formula("2mn + mn", lambda s: 12 * s.entries),
}


def state_bytes(method: str, m: int, n: int, r: int, share: float | None = None) -> float:
    """Bytes a matrix m×n, of many of which ``share`` have their turn (None: the formula's own). In the texts a number is
    four bytes, and an index in 64 bits two. ``r`` as given, cut to the smaller dimension. Raises ``ValueError`` for an unknown method, size or share.

    >>> state_bytes("galore", 512, 1376, 128) / 4
    417792.0
    """
    if method not in FORMULAS:
        raise ValueError(f"state_bytes(method={method!r}): unknown, known are {', '.join(FORMULAS)}")
    if min(m, n, r) < 1:
        raise ValueError(f"state_bytes(m={m}, n={n}, r={r}): all must be at least 1")
    formula = FORMULAS[method]
    share = formula.share if share is None else share
    if not 0 <= share <= 1:
        raise ValueError(f"state_bytes(share={share}): must be in [0, 1]")
    shape = Shape(m, n, min(m, n, r))
    return share * formula.active(shape) + (1 - share) * formula.idle(shape)
