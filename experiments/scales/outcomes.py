"""What is fitted: one row a finished run, from runs of its own or from committed comparisons."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import pretrain, publish, runs
from experiments.comparison import outcomes
from experiments.pages.page import records
from experiments.scales.plan import Point
from experiments.training import models

MOST_REPEATED = 4  # epochs that a reported number may take


def row(point: Point) -> dict[str, Any]:
    """Held-out loss of one run after its last step; infinite if it diverged."""
    final = outcomes.final(point.one, point.cell)
    run = pretrain.opened(point.cell)
    epochs = next((found["epochs"] for found in run.rows() if found["kind"] == "end"), None)
    return {
        "kind": "point",
        "label": point.one.label,
        "model": point.model,
        "weights": models.parameters(point.model),
        "tokens": point.tokens,
        "seed": point.cell.seed,
        "loss": final["loss"],
        "lr": point.cell.lr,
        "steps": point.cell.steps,
        "epochs": epochs,
        "touched_share": final.get("touched_share"),
        "seconds": final.get("seconds"),
    }


def committed(names: Sequence[str], results: Path = publish.RESULTS) -> list[dict[str, Any]]:
    """The last losses of committed comparisons as points; points of their curves are none, their schedule was not over.

    Raises ``WrongInput`` for a comparison that is not there, and for several vocabularies, whose losses per token say different things.
    """
    points, entries = [], {}
    for name in names:
        try:
            table = publish.committed(f"compare/{name}-final", results)
        except FileNotFoundError as error:
            raise runs.WrongInput(str(error)) from None
        config = json.loads((results / "compare" / f"{name}.json").read_text(encoding="utf-8"))["config"]
        entries[name] = models.PRESETS[config["model"]]["vocab_size"]
        batch = config["sequences"] * config["length"]
        points += [
            {
                "kind": "point",
                "label": found["label"],
                "model": config["model"],
                "weights": models.parameters(config["model"]),
                "tokens": int(found["steps"]) * batch,
                "seed": int(found["seed"]),
                "loss": float(found["loss"]),
                "lr": float(found["lr"]),
                "steps": int(found["steps"]),
                "epochs": None,
                "touched_share": found.get("touched_share"),
                "seconds": found.get("seconds"),
            }
            for found in records(table)
        ]
    if len(set(entries.values())) > 1:
        told = ", ".join(f"{name} {size:,}" for name, size in entries.items())
        raise runs.WrongInput(f"losses per token of different vocabularies cannot share a law: {told}")
    return points
