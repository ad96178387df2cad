"""What a comparison of sequences found, as rows: the choice of the learning rate, accuracies after each task, and what is made of them."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import Any

from experiments.comparison import search
from experiments.continuing import learner
from experiments.continuing.config import Sequence
from experiments.continuing.measures import average, forgetting, learned, transfer

MEASURES = ("average", "forgetting", "transfer")
SPENT = ("seconds", "state_bytes", "skipped", "trained_parameters", "basis_bytes", "directions", "protected_share")


def wrong(cell: Sequence) -> float:
    """Share of validation examples that a tuning run gets wrong after its last task, mean over the tasks; infinite if it diverged."""
    rows = _accuracies(cell, "validation")
    return 1 - sum(row["accuracy"] for row in rows) / len(rows) if rows else float("inf")


def tuned(label: str, cells: Several[Sequence]) -> list[dict[str, Any]]:
    """One row a trial: the share it gets wrong as ``loss``, whether it was chosen, and whether its learning rate is the last of those tried."""
    return [
        {"kind": "trial", "label": label, "lr": cell.lr, **found} for cell, found in zip(cells, search.judged(cells, wrong), strict=True)
    ]


def accuracies(label: str, cell: Sequence) -> list[dict[str, Any]]:
    """One row a task after each task; none of a training that diverged."""
    return [{**row, "label": label, "seed": cell.seed} for row in _accuracies(cell, "test")]


def final(label: str, cell: Sequence) -> dict[str, Any]:
    """Average accuracy, that of tasks just learnt and of chance, forgetting and transfer, and what the training took; accuracy 0 if it diverged.
    Of tasks learnt at once there is one row of accuracies, and nothing to forget."""
    row = {"kind": "final", "label": label, "lr": cell.lr, "seed": cell.seed, "steps": cell.steps}
    rows = _accuracies(cell, "test")
    nothing = dict.fromkeys(("learned", "forgetting", "transfer"), float("nan"))
    if not rows:
        return row | {"average": 0.0, **nothing}
    table: dict[int, list[float]] = {}
    for one in rows:
        table.setdefault(one["after"], []).append(one["accuracy"])
    (end,) = (line for line in learner.opened(cell).rows() if line["kind"] == "end")
    a = list(table.values())
    row |= {name: end[name] for name in SPENT} | {"chance": sum(one["chance"] for one in rows[-len(a[-1]) :]) / len(a[-1])}
    if cell.method == "joint":
        return row | {"average": sum(a[-1]) / len(a[-1]), **nothing}
    return row | {"average": average(a), "learned": learned(a), "forgetting": forgetting(a), "transfer": transfer(a)}


def _accuracies(cell: Sequence, part: str) -> list[dict[str, Any]]:
    run = learner.opened(cell)
    return [row for row in run.rows() if row["kind"] == "accuracy" and row["part"] == part] if run.done else []
