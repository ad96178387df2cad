"""What a step of every contender costs: its time, what a new choice of subspace adds, and the allocator's peak.

All contenders stand side by side and make one step each in turn, so that what slows the machine slows all of them. Those with a period K have one of
EVERY steps while they are timed, so that refreshes are many, of all kinds (COAP's are of two). A step in which any matrix got a new subspace, or its
turn, counts as a refresh; methods that choose one at every step have no other steps, and methods that never do no refresh.

    step = median of the steps between refreshes;  refresh = mean of those with one, minus step;  amortised = step + refresh/K

The learning rate is too small to leave the beginning, where no step is skipped.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from experiments import pretrain, runs
from experiments.comparison.outcomes import Contender
from experiments.training import cost, footprint
from experiments.training.stepper import Stepper
from experiments.training.timing import timed
from optimizers.frames import dct_matrix
from optimizers.storage import code_table

EVERY, CYCLE = 4, 5  # steps of a period while it is timed; refreshes of which COAP makes one another
SMALL = 1e-6


def measured(chosen: Mapping[Contender, pretrain.Config], device: torch.device, steps: int, quiet: bool) -> list[dict[str, Any]]:
    """A row a contender, of its ``steps`` after the first: seconds of a ``step``, of its ``update`` alone, of a ``refresh`` (None: there is none),
    ``amortised``, and the ratio of that to full AdamW's if that is there; ``peak_bytes`` of a step with a refresh, tables that optimizers share
    included; ``state_bytes`` the largest after a step, without them."""
    peaks = {one: _peaks(trial, device) for one, trial in chosen.items()}
    sides = {one: Stepper(replace(trial, lr=SMALL, other_lr=SMALL, refresh_every=EVERY), device) for one, trial in chosen.items()}
    times: dict[Contender, list[tuple[float, float, bool]]] = {one: [] for one in chosen}
    held = dict.fromkeys(chosen, 0)  # a layer's state is gone when its turn ends
    with runs.progress(1 + steps, "cost", quiet) as bar:
        for t in range(1 + steps):
            for one, side in sides.items():
                before = side.method.subspaces(side.optimizers[0])
                spent = timed(side.gradients, device), timed(side.update, device)
                held[one] = max(held[one], cost.state_bytes(side.optimizers))
                if t:
                    new = any(now > then for then, now in zip(before, side.method.subspaces(side.optimizers[0]), strict=True))
                    times[one].append((sum(spent), spent[1], new))
            bar.update()
    rows = [_row(one, times[one], chosen[one].refresh_every) | peaks[one] | {"state_bytes": held[one]} for one in chosen]
    full = next((row["amortised"] for row, one in zip(rows, chosen, strict=True) if one.method == "adamw"), None)
    return [row | {"over_adamw": row["amortised"] / full if full else None} for row in rows]


def _row(one: Contender, times: list[tuple[float, float, bool]], period: int) -> dict[str, Any]:
    whole, update = (np.array([some[i] for some in times]) for i in (0, 1))
    new = np.array([some[2] for some in times])
    plain = ~new if not new.all() else new
    step = float(np.median(whole[plain]))
    refresh = float(whole[new].mean()) - step if new.any() and not new.all() else None
    return {
        "kind": "cost",
        "label": one.label,
        "method": one.method,
        "step": step,
        "update": float(np.median(update[plain])),
        "refresh": refresh,
        "period": None if refresh is None else period,
        "amortised": step + (refresh or 0.0) / period,
        "steps": len(times),
    }


def _peaks(trial: pretrain.Config, device: torch.device) -> dict[str, Any]:
    for cached in (dct_matrix, code_table):  # shared by all optimizers of a process: the first would pay for the others
        cached.cache_clear()
    with footprint.watching(device) as watch:
        side = Stepper(replace(trial, lr=SMALL, other_lr=SMALL, refresh_every=1), device)
        side.step()
        with watch.part("steps"):
            for _ in range(CYCLE):
                side.step()
    del side
    gc.collect()
    return {"peak_bytes": watch.parts["steps"].peak}
