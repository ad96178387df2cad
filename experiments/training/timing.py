"""Times of calls side by side, so that what slows the machine slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch


def pairs(peer: Callable[[], Any], others: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Seconds of ``peer`` and each other, one after the other ``repeats`` times; ratios are medians of the ratios within a round."""
    everyone = {"peer": peer, **others}
    times: dict[str, list[float]] = {name: [] for name in everyone}
    for call in everyone.values():
        call()
    for _ in range(repeats):
        for name, call in everyone.items():
            times[name].append(timed(call, device))
    rows = []
    for name, some in times.items():
        ratio = np.array(some) / np.array(times["peer"])
        low, middle, high = (float(q) for q in np.quantile(ratio, (0.25, 0.5, 0.75)))
        rows.append(
            {"name": name, "seconds": float(np.median(some)), "ratio": middle, "ratio_q1": low, "ratio_q3": high, "repeats": repeats}
        )
    return rows


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, work on the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
