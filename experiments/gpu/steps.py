"""Whole training steps on a CUDA device, in bf16 and compiled: at one batch for all contenders and at the largest that each can hold.

    python -m experiments.gpu.steps --out steps.jsonl --minutes 9
    python -m experiments.gpu.steps --out steps.jsonl --table        # what is there as the committed CSV

Contenders: full AdamW (fused), LowRank-IPA with each unbiased law, this project's GaLore, ``galore_torch`` and ``apollo_torch`` for the
same matrices with AdamW for the rest, LoRA of peft. Rows: seconds of a step (at the common batch in pairs with full AdamW's, medians and
quartiles), tokens a second, model-FLOPs utilisation (the plain model's operations, for everyone the same) against the rate of bfloat16
products measured in the same call, peak bytes. The largest batch is known between ``sequences``, which was measured, and ``bound``, which
did not fit. Rows that are done are not measured again, failed ones are, and a search goes on from the sizes it has tried: calls of some
minutes each make the table. Nothing begins that by what was seen takes longer than is left. Steps are between redraws and refreshes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from estimators import LAWS
from experiments import pretrain, runs
from experiments.gpu import cells, pack
from experiments.gpu.measure import free, held
from experiments.gpu.steps_rows import keep, key, largest, latest, measured, read
from experiments.gpu.steps_table import FILE
from experiments.training import cost
from experiments.training.options import Precision
from experiments.training.packages import PACKAGES
from experiments.training.stepper import Stepper
from experiments.training.timing import pairs, timed

NEVER = 10**9
SHORTEST = 60.0  # seconds taken for what was never done on this model, most of them for compiling
TELLING = ("haar_stiefel", "gaussian", "coordinate", "spectral")  # laws before the packages, the others after them

CONTENDERS: dict[str, dict[str, Any]] = {  # the most telling first
    "adamw": {"method": "adamw"},
    **{name: {"method": "lowrank", "law": name} for name in TELLING},
    "galore": {"method": "galore"},
    "galore_torch": {"method": "adamw", "package": "galore exact"},
    "apollo_torch": {"method": "adamw", "package": "apollo"},
    "lora": {"method": "lora"},
    **{name: {"method": "lowrank", "law": name} for name, law in LAWS.items() if law.unbiased and name not in TELLING},
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


class Later(Exception):
    """Too little time is left; what is there so far is written, and a later call goes on."""


class Call:
    """One call of the command: its rows, its time, and full AdamW of the model at hand, built once for all beside it."""

    def __init__(self, settings: Settings, out: Path, minutes: float) -> None:
        self.settings, self.out, self.minutes = settings, out, minutes
        self.end = time.monotonic() + 60 * minutes
        self.device = runs.device(settings.device)
        asked = {"precision": settings.precision, "rank": settings.rank, "length": settings.length}
        self.facts = pack.facts(self.device) | asked
        self.rows = read(out)
        for name in ("device", *asked):
            if others := {row.get(name) for row in self.rows} - {self.facts[name]}:
                raise runs.WrongInput(f"{out} has rows of {name} {others.pop()}, this is {self.facts[name]}; name another --out")
        keep(out, self.rows)  # a line that was cut short would take the next row into it
        self.peer: tuple[str, Stepper] | None = None
        self._gemm: float | None = None

    @property
    def gemm(self) -> float:
        """Operations a second of products in the dtype of the steps, measured at first use."""
        if self._gemm is None:
            self._gemm = cost.matmul_rate(self.device, torch.bfloat16 if self.settings.precision == "bf16" else torch.float32)
        return self._gemm

    def time_for(self, model: str, kind: str) -> bool:
        """Whether as much is left as the longest of this kind took so far; what takes longer than a call may have nearly a whole one."""
        seen = [row["took"] for row in self.rows if (row["model"], row["batch"]) == (model, kind)]
        return self.end - time.monotonic() >= min(max(seen, default=min(SHORTEST, 30 * self.minutes)), 54 * self.minutes)

    def write(self, row: dict[str, Any], began: float) -> None:
        """Append the row, with what it depends on and how long it took; it replaces an earlier one of its cell."""
        row = row | {"took": time.monotonic() - began} | self.facts
        self.rows = latest([*self.rows, row])
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def drop_peer(self) -> None:
        """Give back the memory of full AdamW."""
        self.peer = None
        free()


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


def weighed(settings: Settings, model: str, name: str, sequences: int) -> tuple[Stepper, int]:
    """A contender after two steps, and its peak bytes beyond what was held before."""
    device = runs.device(settings.device)
    before = held(device)
    cost.reset_peak(device)
    made = prepared(settings, model, name, sequences)
    return made, cost.peak_bytes(device) - before


def at_equal_batch(call: Call, model: str, name: str) -> dict[str, Any]:
    """Steps in turn with full AdamW's, which stays for the next contender where both fit whichever came first."""
    settings = call.settings
    if name == "adamw" or (call.peer and call.peer[0] != model):
        call.drop_peer()
    made = _if_fits(settings, model, name) if call.peer else None
    if made is None:
        call.drop_peer()
        made = weighed(settings, model, name, settings.sequences)
    mine, peak = made
    try:
        peer = mine if name == "adamw" else call.peer[1] if call.peer else prepared(settings, model, "adamw", settings.sequences)
        row = pairs(peer.step, {name: mine.step}, call.device, settings.repeats)[1]
    except torch.OutOfMemoryError as error:
        if name == "adamw":
            raise
        raise torch.OutOfMemoryError(f"it fits, but not beside full AdamW: {error}") from None
    call.peer = model, peer
    return row | {"sequences": settings.sequences, "peak_bytes": peak} | _rates(call, model, settings.sequences, row["seconds"])


def _if_fits(settings: Settings, model: str, name: str) -> tuple[Stepper, int] | None:
    try:
        return weighed(settings, model, name, settings.sequences)
    except torch.OutOfMemoryError:
        return None


def at_largest_batch(call: Call, model: str, name: str) -> dict[str, Any]:
    """The largest batch that fits and its steps alone. Raises ``OutOfMemoryError`` if not one sequence does, ``Later`` without time."""
    call.drop_peer()
    settings = call.settings
    found, bound = largest(lambda sequences: fits(call, model, name, sequences), settings.largest, settings.sequences)
    if not found:
        raise torch.OutOfMemoryError("not one sequence fits")
    if not call.time_for(model, "largest"):
        raise Later
    began = time.monotonic()
    bench, peak = weighed(settings, model, name, found)
    times = [timed(bench.step, call.device) for _ in range(settings.repeats)]
    low, middle, high = (float(q) for q in np.quantile(times, (0.25, 0.5, 0.75)))
    row = {"name": name, "seconds": middle, "seconds_q1": low, "seconds_q3": high, "repeats": settings.repeats}
    row |= {"sequences": found, "bound": bound, "peak_bytes": peak, "measuring": time.monotonic() - began}
    return row | _rates(call, model, found, middle)


def fits(call: Call, model: str, name: str, sequences: int) -> bool:
    """Whether it does, in the mode that is measured. An answer is a row, so that no call asks twice; raises ``Later`` without time."""
    cell = {"model": model, "batch": "probe", "contender": name, "sequences": sequences}
    for row in call.rows:
        if row["status"] in ("fits", "full") and cell.items() <= row.items():
            return row["status"] == "fits"
    if not call.time_for(model, "probe"):
        raise Later
    began = time.monotonic()
    try:
        prepared(call.settings, model, name, sequences)
        status = "fits"
    except torch.OutOfMemoryError:
        status = "full"
    cleared()
    call.write(cell | {"status": status}, began)
    return status == "fits"


def cleared() -> None:
    """Forget what was compiled and free memory. Without it the ninth model that runs the same code, and every later one, would not be
    compiled, and sizes after the first would be compiled as dynamic."""
    torch.compiler.reset()
    free()


def _rates(call: Call, model: str, sequences: int, seconds: float) -> dict[str, Any]:
    """By the operations of the plain model: a contender with more or fewer parameters of its own has the same work to do."""
    tokens = sequences * call.settings.length
    flops = cells.flops_per_token(model, call.settings.length) * tokens
    return {"tokens_per_second": tokens / seconds, "utilisation": flops / seconds / call.gemm, "gemm_per_second": call.gemm}


def plan(settings: Settings) -> list[tuple[str, str, str]]:
    """(model, batch, contender): the first two contenders of every model, which the targets are about, then the others."""
    groups = (settings.contenders[:2], settings.contenders[2:])
    return [(model, batch, name) for names in groups for model in settings.models for batch in ("equal", "largest") for name in names]


def work(settings: Settings, out: Path, minutes: float) -> list[dict[str, Any]]:
    """Measure what is not done in ``out``, one JSON line a cell, while there is time; the rows of all cells. What failed comes last."""
    call = Call(settings, out, minutes)
    status = {key(row): row["status"] for row in call.rows}
    left = [cell for cell in plan(settings) if status.get((*cell, None)) != "done"]
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for model, batch, name in sorted(left, key=lambda cell: (*cell, None) in status):
            if not call.time_for(model, "equal" if batch == "equal" else "probe"):
                continue
            _cell(call, model, batch, name)
            cleared()
    return measured(call.rows)


def _cell(call: Call, model: str, batch: str, name: str) -> None:
    row: dict[str, Any] = {"model": model, "batch": batch, "contender": name}
    began = time.monotonic()
    try:
        found = (at_equal_batch if batch == "equal" else at_largest_batch)(call, model, name)
        row |= {"status": "done"} | found
        began = time.monotonic() - row.pop("measuring", time.monotonic() - began)  # of a search its last part: the others have rows
    except Later:
        return
    except Exception as error:  # the other cells do not depend on it
        if not isinstance(error, ImportError | torch.OutOfMemoryError):
            traceback.print_exc()
        call.peer = None
        row |= {"status": "failed", "error": f"{type(error).__name__}: {error}".splitlines()[0][:500]}
    call.write(row, began)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a cell; continued where it is")
    parser.add_argument("--minutes", type=float, default=9.0, help="nothing begins that would end later (default: 9)")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--table", action="store_true", help="write the committed CSV from what is there, measure nothing")
    asked = parser.parse_args(arguments)
    try:
        if asked.table:
            rows = measured(read(asked.out))
            if not rows or any(str(row.get("device", "cpu")).startswith("cpu") for row in rows):
                raise runs.WrongInput(f"{asked.out} has no rows of a CUDA device")
            FILE.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows).to_csv(FILE, index=False, float_format="%.8g")
            return 0
        work(Settings(device=asked.device), asked.out, asked.minutes)
    except runs.WrongInput as error:
        print(f"experiments.gpu.steps: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
