"""Learning rate over a run, as a pure function of the step."""

from __future__ import annotations

import math


def warmup_cosine(step: int, steps: int, warmup: float = 0.1, final: float = 0.1) -> float:
    """Share of the peak learning rate at ``step`` = 0 … steps−1: linear warm-up over the first ``warmup`` of the steps, then cosine to ``final``.

    >>> [round(warmup_cosine(t, 10), 3) for t in (0, 1, 9)]
    [1.0, 1.0, 0.127]
    """
    warm = max(1, int(steps * warmup)) if warmup else 0
    if step < warm:
        return (step + 1) / warm
    return final + (1 - final) / 2 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
