"""State elements of the projected optimizers for one m×n matrix at rank r: what each keeps between two steps.

For m ≤ n (the larger dimension keeps its length, the smaller one is projected; transpose otherwise):

    AdamW 2mn · GaLore, GoLore mr + 2nr · GaLore with Adafactor mr + n + r · Flora nr + mr (reference code: + m + n) · Fira, APOLLO mr + 2nr + 1
    FRUGAL by blocks 2mn for the share of matrices that have their turn · LDAdam mr + 2nr + mn · PLUMAGE, SpectralAdam mr + 2nr + r

Sources: the memory column of each paper, with what its published code keeps beside it (APOLLO and Flora store the random matrix that their
papers count as a seed; LDAdam's error buffer hides in the gradient).
"""

from __future__ import annotations

from collections.abc import Callable

FORMULAS: dict[str, tuple[str, Callable[[int, int, int], int]]] = {
    "adamw": ("2mn", lambda m, n, r: 2 * m * n),  # noqa: ARG005
    "galore": ("mr + 2nr", lambda m, n, r: m * r + 2 * n * r),
    "golore": ("mr + 2nr", lambda m, n, r: m * r + 2 * n * r),
    "flora": ("mr + nr", lambda m, n, r: m * r + n * r),
    "fira": ("mr + 2nr + 1", lambda m, n, r: m * r + 2 * n * r + 1),
    "apollo": ("mr + 2nr + 1", lambda m, n, r: m * r + 2 * n * r + 1),
    "apollo_mini": ("m + 2n + 1", lambda m, n, r: m + 2 * n + 1),  # noqa: ARG005
    "frugal": ("2ρmn on average", lambda m, n, r: 2 * m * n),  # noqa: ARG005
    "ldadam": ("mr + 2nr + mn", lambda m, n, r: m * r + 2 * n * r + m * n),
    "plumage": ("mr + 2nr + r", lambda m, n, r: m * r + 2 * n * r + r),
    "spectral_adam": ("mr + 2nr + r", lambda m, n, r: m * r + 2 * n * r + r),
}


def elements(method: str, m: int, n: int, r: int) -> int:
    """Numbers kept for one m×n matrix. ``r`` as given, cut to the smaller dimension. Raises ``ValueError`` for an unknown method or size.

    >>> elements("galore", 512, 1376, 128)
    417792
    """
    if method not in FORMULAS:
        raise ValueError(f"elements(method={method!r}): unknown, known are {', '.join(FORMULAS)}")
    if min(m, n, r) < 1:
        raise ValueError(f"elements(m={m}, n={n}, r={r}): all must be at least 1")
    small, large = sorted((m, n))
    return FORMULAS[method][1](small, large, min(r, small))
