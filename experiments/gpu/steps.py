"""Whole training steps on a CUDA device, in bf16 and compiled: at one batch for all contenders and at the largest that each can hold.

    python -m experiments.gpu.steps --out steps.jsonl --minutes 9
    python -m experiments.gpu.steps --out steps.jsonl --table        # what is there as the committed CSV

Contenders: full AdamW (fused), LowRank-IPA with each law, this project's GaLore, ``galore_torch`` and ``apollo_torch`` for the same matrices with
AdamW for the rest, LoRA of peft. Rows: seconds of a step (median and quartiles of pairs with full AdamW's), tokens a second, model-FLOPs utilisation
against the rate of bfloat16 products measured in the same call, peak bytes. Rows that are in the file already are not measured again, so calls
of some minutes each make the table; what a device cannot hold is a row that says so. Steps are between redraws and refreshes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from experiments import pretrain, runs
from experiments.gpu.measure import free, held
from experiments.pages.page import records
from experiments.publish import RESULTS
from experiments.training import cost
from experiments.training.options import Precision
from experiments.training.packages import PACKAGES
from experiments.training.stepper import Stepper
from experiments.training.timing import pairs

FILE = RESULTS / "gpu" / "steps.csv"
NEVER = 10**9
AT_LEAST = {
    "utilisation": 0.45,
    "step": 0.9,
    "batch": 1.5,
}  # full AdamW at 350M; LowRank-IPA over it at 100M and above; its largest batch at 1B
CONTENDERS: dict[str, dict[str, Any]] = {
    "adamw": {"method": "adamw"},
    "haar_stiefel": {"method": "lowrank", "law": "haar_stiefel"},
    "gaussian": {"method": "lowrank", "law": "gaussian"},
    "coordinate": {"method": "lowrank", "law": "coordinate"},
    "spectral": {"method": "lowrank", "law": "spectral"},
    "galore": {"method": "galore"},
    "galore_torch": {"method": "adamw", "package": "galore exact"},
    "apollo_torch": {"method": "adamw", "package": "apollo"},
    "lora": {"method": "lora"},
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """``sequences``: of the common batch; ``largest``: where the search for the largest batch of a device ends."""

    models: tuple[str, ...] = ("100m", "350m", "1b", "60m")
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    rank: float = 0.125
    sequences: int = 16
    length: int = 256
    largest: int = 4096
    repeats: int = 7
    precision: Precision = "bf16"
    compile: bool = True
    device: str = "cuda"


def prepared(settings: Settings, model: str, name: str, sequences: int) -> Stepper:
    """A contender after two steps: compiled, with its state. Raises ``ImportError`` without its package."""
    fields = dict(CONTENDERS[name])
    package = fields.pop("package", None)
    base = replace(pretrain.PRESETS[model], sequences=sequences, accumulate=1, length=settings.length, refresh_every=NEVER, measure_every=0)
    made = replace(
        base,
        precision=settings.precision,
        compile=settings.compile,
        device=settings.device,
        rank=settings.rank,
        state="row_scale",
        **fields,
    )
    device = runs.device(settings.device)
    bench = Stepper(made, device)
    if name == "adamw" and device.type == "cuda":
        bench.optimizers[:] = [torch.optim.AdamW(bench.task.model.parameters(), lr=made.lr, fused=True)]
    if package:
        matrices = bench.method.matrices()
        rank = max(1, round(settings.rank * min(min(p.shape) for p in matrices)))
        bench.optimizers[:] = [PACKAGES[package][1](matrices, rank, NEVER)]
        bench.optimizers.append(torch.optim.AdamW(bench.method.others(), lr=made.lr))
    for _ in range(2):
        bench.step()
    return bench


def at_equal_batch(settings: Settings, model: str, name: str, rates: dict[str, float]) -> dict[str, Any]:
    """Steps in turn with full AdamW's."""
    device = runs.device(settings.device)
    before = held(device)
    cost.reset_peak(device)
    mine = prepared(settings, model, name, settings.sequences)
    peak = cost.peak_bytes(device) - before
    peer = mine if name == "adamw" else prepared(settings, model, "adamw", settings.sequences)
    row = pairs(peer.step, {name: mine.step}, device, settings.repeats)[1]
    return row | {"sequences": settings.sequences, "peak_bytes": peak} | _rates(mine, settings, settings.sequences, row["seconds"], rates)


def at_largest_batch(settings: Settings, model: str, name: str, rates: dict[str, float]) -> dict[str, Any]:
    """The largest multiple of a quarter of a power of two that fits, and its steps alone. Raises ``OutOfMemoryError`` if not one sequence does."""
    device = runs.device(settings.device)
    found = largest(lambda sequences: _fits(settings, model, name, sequences), settings.largest)
    if not found:
        raise torch.OutOfMemoryError("not one sequence fits")
    bench = prepared(settings, model, name, found)
    row = pairs(bench.step, {name: bench.step}, device, settings.repeats)[1]
    return {"name": name, "seconds": row["seconds"], "repeats": settings.repeats, "sequences": found} | _rates(
        bench, settings, found, row["seconds"], rates
    )


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest batch up to ``limit`` that fits, to a quarter of a power of two; 0 if none does. Fitting is taken to be monotone."""
    size = 1
    if not fits(size):
        return 0
    while 2 * size <= limit and fits(2 * size):
        size *= 2
    for step in (size // 2, size // 4):  # of the power of two
        if step and (bigger := size + step) <= limit and fits(bigger):
            size = bigger
    return size


def _fits(settings: Settings, model: str, name: str, sequences: int) -> bool:
    try:
        prepared(replace(settings, compile=False), model, name, sequences)
    except torch.OutOfMemoryError:
        return False
    finally:
        free()
    return True


def _rates(bench: Stepper, settings: Settings, sequences: int, seconds: float, rates: dict[str, float]) -> dict[str, Any]:
    model: Any = bench.task.model
    tokens = sequences * settings.length
    flops = cost.Cost(model, settings.length, torch.device(settings.device), torch.bfloat16).flops_per_token * tokens
    return {"tokens_per_second": tokens / seconds, "utilisation": flops / seconds / rates["gemm16"], "gemm16_per_second": rates["gemm16"]}


def plan(settings: Settings) -> list[tuple[str, str, str]]:
    """(model, batch, contender), full AdamW first."""
    return [(model, batch, name) for model in settings.models for batch in ("equal", "largest") for name in settings.contenders]


def work(settings: Settings, out: Path, minutes: float) -> list[dict[str, Any]]:
    """Measure what is not in ``out`` yet, one JSON line a cell, until the time is over; all rows."""
    begun = time.monotonic()
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
    done = {(row["model"], row["batch"], row["contender"]) for row in rows}
    device = runs.device(settings.device)
    rates = {"gemm16": cost.matmul_rate(device, torch.bfloat16 if settings.precision == "bf16" else torch.float32)}
    measures = {"equal": at_equal_batch, "largest": at_largest_batch}
    for model, batch, name in (cell for cell in plan(settings) if cell not in done):
        if time.monotonic() - begun > 60 * minutes:
            break
        row: dict[str, Any] = {"model": model, "batch": batch, "contender": name, "device": runs.environment()["device"]}
        try:
            row |= {"status": "done"} | measures[batch](settings, model, name, rates)
        except (ImportError, torch.OutOfMemoryError) as error:
            row |= {"status": "failed", "error": f"{type(error).__name__}: {error}".splitlines()[0]}
        free()
        rows.append(row)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return rows


def table(file: Path = FILE) -> str:
    """As Markdown, with the targets; "not yet run" without results."""
    if not file.exists():
        return "not yet run"
    rows = pd.read_csv(file)
    lines = ["| model | batch | contender | step over full AdamW | tokens/s | utilisation | sequences |", "|---|---|---|---|---|---|---|"]
    for row in records(rows):
        if row["status"] != "done":
            lines.append(f"| {row['model']} | {row['batch']} | `{row['contender']}` | {row['error']} | | | |")
            continue
        over = float(row.get("ratio", math.nan))
        ratio = "" if math.isnan(over) else f"{over:.2f}×"
        lines.append(
            f"| {row['model']} | {row['batch']} | `{row['contender']}` | {ratio} | {row['tokens_per_second']:,.0f} | "
            f"{100 * row['utilisation']:.0f} % | {row['sequences']:.0f} |"
        )
    return "\n".join([*lines, "", *verdicts(rows)])


def verdicts(rows: pd.DataFrame) -> list[str]:
    """Each target that the rows can decide, and whether it holds."""
    done = rows[rows.status == "done"].set_index(["model", "batch", "contender"])
    told = []
    if ("350m", "equal", "adamw") in done.index:
        best = max(float(done.utilisation[key]) for key in [("350m", "equal", "adamw"), ("350m", "largest", "adamw")] if key in done.index)
        told.append(_told("full AdamW at 350m, utilisation", best, AT_LEAST["utilisation"], best >= AT_LEAST["utilisation"], "at least"))
    for model in ("100m", "350m", "1b"):
        if (model, "equal", "haar_stiefel") in done.index:
            ratio = float(done.ratio[model, "equal", "haar_stiefel"])
            told.append(
                _told(f"Haar–Stiefel at {model}, step over full AdamW", ratio, AT_LEAST["step"], ratio <= AT_LEAST["step"], "at most")
            )
    keys = [("1b", "largest", "haar_stiefel"), ("1b", "largest", "adamw")]
    if all(key in done.index for key in keys):
        more = float(done.sequences[keys[0]]) / float(done.sequences[keys[1]])
        told.append(
            _told("Haar–Stiefel at 1b, largest batch over full AdamW's", more, AT_LEAST["batch"], more >= AT_LEAST["batch"], "at least")
        )
    return told


def _told(what: str, value: float, limit: float, holds: bool, side: str) -> str:
    return f"- {what}: {value:.2f}, {side} {limit:g}: {'holds' if holds else 'missed'}."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a cell; continued where it is")
    parser.add_argument("--minutes", type=float, default=9.0, help="no cell begins later (default: 9)")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--table", action="store_true", help="write the committed CSV from what is there, measure nothing")
    asked = parser.parse_args(arguments)
    if asked.table:
        rows = [json.loads(line) for line in asked.out.read_text(encoding="utf-8").splitlines()]
        pd.DataFrame(rows).to_csv(FILE, index=False, float_format="%.8g")
        return 0
    try:
        work(Settings(device=asked.device), asked.out, asked.minutes)
    except runs.WrongInput as error:
        print(f"experiments.gpu.steps: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
