"""What a redraw does to the training loss, from the rows of a run.

    spike(t) = max of the losses of the s steps after the redraw at t − mean of those of the s steps before

averaged over the redraws of a run that have s steps on both sides. The maximum of s noisy numbers is above their mean without any redraw, and a
falling loss lowers it; so the same is measured ``midway``, half a period later, where nothing happens. All contenders of a seed see the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def spike(losses: Sequence[float], t: int, window: int) -> float:
    """Of ``losses``, one a step, around step t (t steps were made before it); ``window``: s. Infinite where a loss is.

    Raises ``ValueError`` without s steps on both sides.
    """
    if not window <= t <= len(losses) - window:
        raise ValueError(f"spike({len(losses)} losses, t={t}, window={window}): needs {window} steps before and after")
    highest, before = max(losses[t : t + window]), np.mean(losses[t - window : t])
    return float(highest - before) if np.isfinite(before) else float("inf")


def measured(losses: Sequence[float], period: int, window: int) -> dict[str, Any]:
    """Means and standard errors over the redraws at every ``period`` steps, and midway between them: ``spike``, ``spike_error``, ``midway``, …"""
    told: dict[str, Any] = {"window": window}
    for name, first in (("spike", period), ("midway", period + period // 2)):
        found = [spike(losses, t, window) for t in range(first, len(losses) - window + 1, period)]
        told |= {
            f"{name}s": len(found),
            name: float(np.mean(found)) if found else float("nan"),
            f"{name}_error": float(np.std(found, ddof=1) / len(found) ** 0.5) if len(found) > 1 else float("nan"),
        }
    return told
