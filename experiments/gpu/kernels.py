"""Times of the kernels of estimators/kernels beside their plain versions, these compiled, and what training does today.

    python -m experiments.gpu.kernels --out kernels.json                 # the same command goes on where the last one stopped
    python -m experiments.gpu.kernels --out kernels.json --publish       # rows → results/gpu/kernels.csv; then `make readme`

Fixed before any of it was run: the shapes in ``kernel_cases``; a kernel first has to agree with its plain version on the device; then all
are timed in turn, ``repeats`` rounds of as many queued calls as fill 2 ms, after two that are not counted. ``holds``: the median over the
rounds of the time over that of the compiled plain version is below 1, and over that of what training does today where that is something
else; a kernel of which this is not true in the shapes it is for goes. The
floor of a row is its ``Cost`` at the bandwidth of a copy and the rates of large matrix products, measured in the same call; operands that
stay in the cache from one call to the next may beat it. ``compiled`` has its key compiled in, so it is timed at its best.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from estimators.kernels.launch import MISSING
from experiments import runs
from experiments.benching import limits
from experiments.gpu import pack
from experiments.gpu.kernel_cases import CASES, SMALL, Case, Contenders
from experiments.publish import RESULTS
from experiments.training.timing import timed

FILE = RESULTS / "gpu" / "kernels.csv"
REPEATS, MINUTES = 7, 9.0
SHORTEST = 60.0  # seconds of which a case may need that many, most of them for compiling
SAMPLE = 2e-3  # seconds that the calls of one round take together


def machine(device: torch.device) -> dict[str, float]:
    """``limits`` by the names of the columns."""
    found = limits.limits(device)
    return {"bandwidth": found.copy, "fp32_flops": found.gemm, "bf16_flops": found.gemm16}


def measured(case: Case, device: torch.device, rates: dict[str, float], repeats: int) -> dict[str, Any]:
    """The row of one case. Raises ``ValueError`` when the kernel does not agree with its plain version."""
    with torch.no_grad():
        contenders = case.make(case, device)
        difference = contenders.difference()
        if not difference <= contenders.tolerance:  # NaN is no agreement
            raise ValueError(f"the kernel differs from its plain version by {difference:.3g}, more than {contenders.tolerance:g}")
        times = rounds(calls(contenders), device, repeats)
    needs = contenders.cost
    products = rates["bf16_flops"] if case.dtype == "bfloat16" else rates["fp32_flops"]
    floor = needs.floor(rates["bandwidth"], products, rates["fp32_flops"])
    row: dict[str, Any] = {
        "bytes": needs.bytes,
        "products": needs.products,
        "others": needs.others,
        "floor": floor,
        "difference": difference,
    }
    for name, some in times.items():
        low, middle, high = (float(q) for q in np.quantile(some, (0.25, 0.5, 0.75)))
        row |= {f"{name}_seconds": middle, f"{name}_q1": low, f"{name}_q3": high}
    row["of_floor"], holds = floor / row["kernel_seconds"], True
    for peer, name in (("compiled", "ratio"), ("today", "today_ratio")):
        if peer in times:
            ratio = np.array(times["kernel"]) / np.array(times[peer])
            low, middle, high = (float(q) for q in np.quantile(ratio, (0.25, 0.5, 0.75)))
            row |= {name: middle, f"{name}_q1": low, f"{name}_q3": high}
            holds = holds and middle < 1
    return row | {"holds": holds, "repeats": repeats, **rates}


def calls(contenders: Contenders) -> dict[str, Callable[[], Any]]:
    """Who is timed, by name."""
    compiled = torch.compile(contenders.plain, dynamic=False)
    everyone = {"kernel": contenders.kernel, "plain": contenders.plain, "compiled": compiled, "today": contenders.today}
    return {name: call for name, call in everyone.items() if call is not None}


def rounds(everyone: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of one call of everyone in each of ``repeats`` rounds."""
    counts = {}
    for name, call in everyone.items():
        call()  # compiles
        counts[name] = max(1, min(500, round(SAMPLE / max(timed(call, device), 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in everyone}
    for _ in range(repeats):
        for name, call in everyone.items():
            times[name].append(timed(functools.partial(_often, call, counts[name]), device) / counts[name])
    return times


def _often(call: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        call()


def work(
    out: Path, cases: tuple[Case, ...], device: torch.device, *, minutes: float = MINUTES, repeats: int = REPEATS
) -> list[dict[str, Any]]:
    """Measure what ``out`` does not have yet until the time is over; returns all rows. A failure is recorded, and tried again next time."""
    end = time.monotonic() + 60 * minutes
    rows = read(out)
    done = {row["case"] for row in rows if row["status"] == "done"}
    known_of_all = pack.facts(device) | {"triton": _version()}
    rates: dict[str, float] = {}
    for case in cases:
        if case.name in done or end - time.monotonic() < min(SHORTEST, 30 * minutes):
            continue
        rates = rates or machine(device)
        known = {"case": case.name, "kernel": case.kernel, "dtype": case.dtype, **case.shape}
        try:
            row = known | {"status": "done"} | measured(case, device, rates, repeats)
        except Exception as error:  # the other cases do not depend on it
            traceback.print_exc()
            row = known | {"status": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
        rows = [other for other in rows if other["case"] != case.name] + [row | known_of_all]
        runs.write_json(out, rows)
        print(f"{case.name}: {said(row)}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        torch.compiler.reset()
    return rows


def said(row: dict[str, Any]) -> str:
    """A row in a few words."""
    if row["status"] != "done":
        return row["error"]
    return f"{1e6 * row['kernel_seconds']:.1f} µs, {row['of_floor']:.0%} of the floor's speed, {row['ratio']:.2f} of compiled"


def read(out: Path) -> list[dict[str, Any]]:
    """The rows of ``out``, none where it is not there. Raises ``WrongInput`` for a file that holds something else."""
    if not out.exists():
        return []
    try:
        rows = json.loads(out.read_text(encoding="utf-8"))
    except ValueError:
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {"case", "status"} <= set(row) for row in rows):
        raise runs.WrongInput(f"{out} holds no rows of this command")
    return rows


def publish(rows: list[dict[str, Any]], file: Path = FILE) -> None:
    """Write the rows as CSV, in the order of the plan."""
    order = {case.name: place for place, case in enumerate(CASES)}
    rows = sorted(rows, key=lambda row: order.get(row["case"], len(order)))
    names = list(dict.fromkeys(name for row in rows for name in row))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as target:
        writer = csv.DictWriter(target, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{value:.8g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows)


def _version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        raise runs.WrongInput(MISSING) from None


def _left(rows: list[dict[str, Any]], cases: tuple[Case, ...]) -> Iterator[str]:
    done = {row["case"] for row in rows if row["status"] == "done"}
    yield from (case.name for case in cases if case.name not in done)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 0 when it ended well, 2 for wrong input."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gpu.kernels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("kernels.json"), help="rows that are there stay, new ones are added")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of this call, all included but the imports")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="rounds, at least 5")
    parser.add_argument("--device", default="cuda", help="cpu: small shapes, with TRITON_INTERPRET=1; their times say nothing")
    parser.add_argument("--publish", action="store_true", help="only write the rows of --out to experiments/results/gpu/kernels.csv")
    options = parser.parse_args(arguments)
    try:
        if options.repeats < 5:
            raise runs.WrongInput(f"--repeats must be at least 5, got {options.repeats}")
        if options.publish:
            rows = read(options.out)
            if not rows or any(str(row.get("device", "")).startswith("cpu") for row in rows):
                raise runs.WrongInput(f"{options.out} has no rows of a CUDA device")
            publish(rows, FILE)
            return 0
        device = runs.device(options.device)
        cases = CASES if device.type == "cuda" else SMALL
        rows = work(options.out, cases, device, minutes=options.minutes, repeats=options.repeats)
    except runs.WrongInput as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 2
    left = list(_left(rows, cases))
    print(f"{len(cases) - len(left)} of {len(cases)} cases done{': left are ' + ', '.join(left) if left else ''}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
