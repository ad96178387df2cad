"""What a comparison of fine-tunings found, as rows: the choice of the learning rate, accuracy by seed, paired differences, and peaks."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from experiments import runs
from experiments.comparison import search
from experiments.finetuning import tuner
from experiments.finetuning.config import Tuning
from experiments.training import footprint

NOTHING = {"accuracy": math.nan}  # of a training that diverged


def validation(cell: Tuning) -> float:
    """Validation loss of a finished training; infinite if it diverged, or if it is not a number."""
    row = _evaluated(cell, "validation")
    return row["loss"] if row and math.isfinite(row["loss"]) else float("inf")


def tuned(label: str, cells: Sequence[Tuning]) -> list[dict[str, Any]]:
    """One row a trial: its validation loss and accuracy, whether it was chosen, and whether its learning rate is the last of those tried."""
    return [
        {"kind": "trial", "label": label, "lr": cell.lr, **found, "accuracy": (_evaluated(cell, "validation") or NOTHING)["accuracy"]}
        for cell, found in zip(cells, search.judged(cells, validation), strict=True)
    ]


def tested(label: str, cell: Tuning) -> dict[str, Any]:
    """Accuracy and loss on the test examples, and what the training took; accuracy 0 and an infinite loss if it diverged."""
    row = {"kind": "tested", "label": label, "method": cell.method, "lr": cell.lr, "seed": cell.seed, "steps": cell.steps}
    test = _evaluated(cell, "test")
    if test is None:
        return row | {"accuracy": 0.0, "loss": float("inf")}
    (end,) = (line for line in tuner.opened(cell).rows() if line["kind"] == "end")
    spent = {name: end[name] for name in ("seconds", "state_bytes", "skipped", "trained_parameters")}
    return row | {"accuracy": test["accuracy"], "loss": test["loss"], "examples": test["examples"], **spent}


def peak(label: str, cell: Tuning, device: torch.device, run: runs.Run) -> dict[str, Any]:
    """The most bytes that tensors hold in a step with a new subspace, the model included."""
    few = replace(cell, refresh_every=1, steps=4)
    with footprint.watching(device) as watch:
        one = tuner.Tuner(few, run)
        one.advance()
        with watch.part("steps"):
            one.advance()
            one.advance()
    del one
    gc.collect()
    return {"kind": "peak", "label": label, "peak_bytes": watch.parts["steps"].peak}


def _evaluated(cell: Tuning, part: str) -> dict[str, Any] | None:
    """The evaluation of a finished training."""
    run = tuner.opened(cell)
    rows = [row for row in run.rows() if row["kind"] == "eval" and row["part"] == part]
    return rows[-1] if run.done and rows else None
