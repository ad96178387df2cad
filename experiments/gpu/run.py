"""Train and time the cells of ``experiments.gpu.cells`` in parts of a few minutes; the same command goes on where the last one stopped.

    python -m experiments.gpu.run --plan
    python -m experiments.gpu.run --data pack --runs-dir runs/gpu --minutes 9 --archive cells.tar.gz

A training cell that is not through when the time is over is saved and continued by the next call, as long as --runs-dir is still there.
Finished cells are in the archive; a later day begins with ``--restore cells.tar.gz`` and its empty --runs-dir. Where that is the last part
before --runs-dir is lost, ``--whole`` begins only cells that will be through. What fails is recorded, and tried again after all others.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments import pretrain, runs
from experiments.gpu import cells, measure, pack, store
from experiments.gpu.cells import Cell, Settings

MARGIN = 30.0  # seconds before the end at which work is stopped: a last step, a checkpoint of 1.3 GB, the archive
SHORTEST = 2 * cells.BEGIN  # seconds for which no training is begun
SETTLED = ("done", "diverged")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One call: where things are and how long it may take."""

    data: Path
    runs_dir: Path
    minutes: float = 9.0
    margin: float = MARGIN
    archive: Path | None = None
    restore: Path | None = None
    whole: bool = False

    @property
    def folder(self) -> Path:
        """Of the cells' run directories."""
        return self.runs_dir / "cells"


class Clock:
    """Time that is left, and an event for its end; SIGINT sets the event too, a second one ends the program."""

    def __init__(self, seconds: float) -> None:
        self.end, self.over = time.monotonic() + seconds, threading.Event()
        self.strict = False  # whether the end of the time ends what is running by a TimeoutError

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """At the end of the time SIGINT is sent to this process, again and again until the block is left: training stops at it with a checkpoint,
        even if the first one came before training listened."""
        left = threading.Event()

        def watch() -> None:
            wait = self.left()
            while not left.wait(max(0.0, wait)):
                os.kill(os.getpid(), signal.SIGINT)
                wait = 5.0

        def note(number: int, frame: Any) -> None:
            del number, frame
            if self.over.is_set() and self.left() > 0:
                raise KeyboardInterrupt
            self.over.set()
            if self.strict and self.left() <= 0:
                self.strict = False
                raise TimeoutError("it took longer than there was time")

        before = signal.signal(signal.SIGINT, note)
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            left.set()
            thread.join()
            signal.signal(signal.SIGINT, before)


def work(part: Part, settings: Settings) -> dict[str, dict[str, Any]]:
    """Work on the plan until the time is over; returns the records of all cells so far. Raises ``WrongInput`` for data or a device not there."""
    clock = Clock(60 * part.minutes - part.margin)
    device = runs.device(settings.device)
    if part.restore is not None:
        store.restore(part.restore, part.folder)
    with clock.running():
        data = pack.unpack(part.data, part.runs_dir / "tokens")
        facts = provenance(part) | {"device_kind": device.type}
        tried: set[str] = set()
        while not clock.over.is_set() and clock.left() > 0:
            found = store.records(part.folder)
            cell = following(settings, found, tried, clock.left(), part.whole)
            if cell is None:
                break
            tried.add(cell.name)
            print(f"{cell.name}: estimated {cells.seconds(settings, cell, found) / 60:.1f} min, {clock.left() / 60:.1f} left", flush=True)
            if not attempt(part, settings, cell, data, found, facts, clock):
                clock.over.set()  # the signal of its end went to the trainer
            measure.free()
            if part.archive is not None:
                store.archive(part.folder, part.archive)
    if part.archive is not None:
        store.archive(part.folder, part.archive)
    return store.records(part.folder)


def following(settings: Settings, found: dict[str, dict[str, Any]], tried: set[str], left: float, whole: bool) -> Cell | None:
    """The next cell: first of the plan that is not settled and can begin; failed ones of earlier calls last. None when there is none.

    What cannot stop half-way, and anything when ``whole``, begins only if its estimate fits the seconds ``left``; nothing for a few seconds.
    """
    able = []
    for cell in cells.plan(settings):
        status = found.get(cell.name, {}).get("status")
        if status in SETTLED or cell.name in tried or (cell.kind == "train" and cells.learning_rate(settings, cell, found) is None):
            continue
        if cells.seconds(settings, cell, found) <= left or (cell.divisible and not whole and left > SHORTEST):
            able.append((status == "failed", cell))
    return min(able, key=lambda one: one[0])[1] if able else None


def attempt(
    part: Part, settings: Settings, cell: Cell, data: Path, found: dict[str, dict[str, Any]], facts: dict[str, Any], clock: Clock
) -> bool:
    """Work on one cell and record how it ended; no failure of one cell is one of the call. Returns whether there is time for another."""
    begun = time.monotonic()
    clock.strict = not cell.divisible and cell.kind != "tune"  # training listens itself
    failure = store.failed_path(part.folder, cell)
    try:
        if cell.kind in ("time", "memory"):
            rows = measure.rows(settings, cell, data, part.folder)
            store.record(part.folder / failure.name.removeprefix("failed-"), cell, "done", rows=[row | facts for row in rows])
        else:
            trained(part, settings, cell, data, found, facts)
    except runs.Diverged as error:  # a training cell records that itself; what is timed has no outcome then
        store.record(failure, cell, "failed", error=str(error)[:500], **facts)
    except runs.Stopped as stop:
        if stop.code != 130:
            raise
        print(f"{cell.name}: {stop}", flush=True)
        return False
    except Exception as error:  # whatever it is, the other cells do not depend on it
        traceback.print_exc()
        store.record(failure, cell, "failed", error=f"{type(error).__name__}: {error}"[:500], **facts)
    else:
        print(f"{cell.name}: {(time.monotonic() - begun) / 60:.1f} min", flush=True)
    finally:
        clock.strict = False
    return True


def trained(part: Part, settings: Settings, cell: Cell, data: Path, found: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
    """Train, or go on with, a ``tune`` or ``train`` cell and record its outcome."""
    lr, at_edge = (cell.lr, None) if cell.lr is not None else cells.learning_rate(settings, cell, found) or (None, None)
    assert lr is not None
    config = cells.config(settings, cell, data, part.folder, lr)
    run = pretrain.opened(config)
    facts = facts | {"allocated_before": measure.held(runs.device(settings.device))}
    try:
        pretrain.main(config)
    except runs.Diverged as error:
        store.record(run.path, cell, "diverged", row=cells.as_fields(cell) | facts | {"lr": lr, "at_edge": at_edge}, error=str(error))
        return
    store.record(run.path, cell, "done", row=outcome(settings, cell, run) | facts | {"lr": lr, "at_edge": at_edge})


def outcome(settings: Settings, cell: Cell, run: runs.Run) -> dict[str, Any]:
    """The row of a finished cell: held-out loss (of a trial: its tail), speed, peak and sizes. ``step_seconds`` is the median of single steps."""
    rows, known = run.rows(), run.read("facts.json")
    (end,) = (row for row in rows if row["kind"] == "end")
    held_out = [row for row in rows if row["kind"] == "eval"][-1]
    clock = [row["seconds"] for row in rows if row["kind"] in ("train", "skip")]
    tuning = cell.kind == "tune"
    loss = cells.tail_loss(rows, settings.tune_steps) if tuning else held_out["loss"]
    return cells.as_fields(cell) | {
        "steps": end["step"],
        "tokens": end["step"] * settings.sequences * settings.length,
        "epochs": end["epochs"],
        "loss": loss,
        "perplexity": None if tuning else math.exp(min(loss, 50.0)),
        "step_seconds": float(np.median(np.diff(clock))) if len(clock) > 1 else None,
        **{name: end[name] for name in ("tokens_per_second", "model_flops_utilisation", "peak_bytes", "state_bytes", "skipped")},
        **{name: known[name] for name in ("parameters", "trained_parameters", "touched_share", "tokens_sha256")},
    }


def provenance(part: Part) -> dict[str, Any]:
    """What every row says of where it is from. ``stretch``: one value as long as --runs-dir lasts; times of different ones are not compared.

    The commit is that of the pack where the code is the code that was packed; elsewhere only its hash is known.
    """
    marker = part.runs_dir / "stretch"
    part.runs_dir.mkdir(parents=True, exist_ok=True)
    if not marker.exists():
        marker.write_text(uuid.uuid4().hex[:8], encoding="ascii")
    code, environment = pack.code(), runs.environment()
    if not code["git_sha"] and (part.data / "pack.json").exists():
        packed = pack.read(part.data)
        if packed["code_sha256"] == code["code_sha256"]:
            code = {name: packed[name] for name in code}
    return {"stretch": marker.read_text(encoding="ascii"), **code, **{name: environment[name] for name in ("device", "torch", "python")}}


def show(settings: Settings, found: dict[str, dict[str, Any]]) -> str:
    """The plan as lines: status and estimated minutes of each cell, and their sums."""
    lines, total, left = [], 0.0, 0.0
    for number, cell in enumerate(cells.plan(settings), 1):
        status, minutes = found.get(cell.name, {}).get("status", "not yet run"), cells.seconds(settings, cell, found) / 60
        total, left = total + minutes, left + minutes * (status not in SETTLED)
        lines.append(f"{number:3d}  {cell.name:<48} {minutes:6.1f} min  sum {total:6.1f}  {status}")
    return "\n".join([*lines, f"estimated: {total:.0f} min in all, {left:.0f} left"])


def main(arguments: list[str] | None = None, settings: Settings | None = None) -> int:
    """The command; returns its exit code: 0 when a part ended well, 2 for wrong input, 1 when no room was left."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gpu.run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--plan", action="store_true", help="print cells, order, status and estimated minutes, and end")
    parser.add_argument("--data", type=Path, default=Path("pack"), help="a pack, or a token folder")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/gpu"), help="of this stretch of device time: runs, checkpoints, tokens")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call, all included but the imports")
    parser.add_argument("--archive", type=Path, help=".tar.gz of finished cells to write")
    parser.add_argument("--restore", type=Path, help=".tar.gz of cells finished earlier, to begin with")
    parser.add_argument("--whole", action="store_true", help="begin only cells that will be finished in this call")
    parser.add_argument("--compile", action="store_true", help="torch.compile in all cells; not to be mixed with cells without it")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    settings = settings or Settings(compile=options.compile, device=options.device)
    names = ("data", "runs_dir", "minutes", "archive", "restore", "whole")
    part = Part(**{name: getattr(options, name) for name in names})
    try:
        if options.plan:
            if part.restore is not None:
                store.restore(part.restore, part.folder)
            print(show(settings, store.records(part.folder)))
            return 0
        found = work(part, settings)
    except runs.WrongInput as error:
        print(f"run: {error}", file=sys.stderr)
        return 2
    except runs.Stopped as stop:
        print(f"run: {stop}", file=sys.stderr)
        return stop.code
    everything = cells.plan(settings)
    settled = sum(found.get(cell.name, {}).get("status") in SETTLED for cell in everything)
    print(f"{settled} of {len(everything)} cells done, about {sum_left(settings, found):.0f} min left", flush=True)
    return 0


def sum_left(settings: Settings, found: dict[str, dict[str, Any]]) -> float:
    """Estimated minutes of all cells that are not settled."""
    open_cells = [cell for cell in cells.plan(settings) if found.get(cell.name, {}).get("status") not in SETTLED]
    return sum(cells.seconds(settings, cell, found) for cell in open_cells) / 60


if __name__ == "__main__":
    sys.exit(main())
