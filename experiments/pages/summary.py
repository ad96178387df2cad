"""What the terminal shows after a question: a table of what held, and where the files are."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.pages import advice, benches, continual, finetuning, footprints, lens, optimizers, plan, ranking, scaling
from experiments.runs import Run
from theory.memory import CATEGORIES

WIDTH = 140  # columns where the output is no terminal


def show(result: Any) -> int:
    """Print the outcome of a question's ``main``; the exit code, 1 when a check did not hold."""
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console = Console(soft_wrap=True, width=WIDTH)
    results = result if isinstance(result, list) else [result]
    code = 0
    runs = [item for item in results if isinstance(item, Run)]
    if runs:
        lines = [(run.path.name, *line) for run in runs for line in outcome(run.rows())]
        if lines:
            console.print(_table(lines))
        for run in runs:
            for line in found(run):
                console.print(line, highlight=False)
        code = int(any(holding < total for _, _, holding, total, _, _ in lines))
    for item in results:
        path = item.path if isinstance(item, Run) else item
        if isinstance(path, Path):
            console.print(f"{'run' if isinstance(item, Run) else 'wrote'}: {path}", highlight=False)
    return code


def written(result: Any) -> int:
    """The outcome of a question's ``main`` as one line of JSON: of a run its path, configuration and rows, of a file its path. The exit code."""
    results = result if isinstance(result, list) else [result]
    told: list[dict[str, Any]] = []
    for item in results:
        if isinstance(item, Run):
            told.append({"run": str(item.path), "config": item.config, "rows": item.rows()})
        elif isinstance(item, Path):
            told.append({"file": str(item)})
    print(json.dumps(_plain_numbers({"results": told}), allow_nan=False))
    runs = [item for item in results if isinstance(item, Run)]
    return int(any(holding < total for run in runs for _, holding, total, _, _ in outcome(run.rows())))


def _plain_numbers(value: Any) -> Any:
    """What is no number is null: JSON knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def found(run: Run) -> list[Any]:
    """What a run without verdicts found: the held-out loss of a training, the tables of a comparison, a bench and a memory account."""
    rows = run.rows()
    match run.config["question"]:
        case "pretrain":
            last = [row for row in rows if row["kind"] == "eval"][-1:]
            return [f"{run.path.name}: held-out loss {row['loss']:.4f} nats, perplexity {row['perplexity']:.1f}" for row in last]
        case "compare":
            paired = [row for row in rows if row["kind"] == "paired"]
            final = pd.DataFrame([row for row in rows if row["kind"] == "final"])
            losses = [(label, f"{group.loss.mean():.4f}", str(len(group))) for label, group in final.groupby("label", sort=False)]
            differences = [
                (f"{row['label']} − {row['reference']}", f"{row['difference']:+.4f} ± {row['standard_error']:.4f}", str(row["seeds"]))
                for row in paired
            ]
            spent = [
                (
                    row["label"],
                    f"{row['state_bytes'] / 2**20:.2f}",
                    f"{row['peak_bytes'] / 2**20:.1f}",
                    f"{row['step']:.3f}",
                    "" if row["refresh"] is None else f"{row['refresh']:.3f}",
                    "" if row["over_adamw"] is None else f"{row['over_adamw']:.2f}×",
                )
                for row in rows
                if row["kind"] == "cost"
            ]
            head = ("contender", "state MiB", "peak MiB", "step s", "refresh s", "amortised / AdamW")
            return [
                _plain("held-out loss (nats/token)", ("contender", "loss", "seeds"), [*losses, *differences]),
                *([_plain("costs", head, spent)] if spent else []),
            ]
        case "scaling":
            kinds = {kind: pd.DataFrame([row for row in rows if row["kind"] == kind]) for kind in {row["kind"] for row in rows}}
            tables = (("efficiency, full AdamW 1", scaling.factors(kinds)), ("tokens of AdamW over own", scaling.saved(kinds)))
            shown = [_plain(title, tuple(told[0]), [tuple(line.values()) for line in told]) for title, told in tables if told]
            return [*shown, *scaling.told(kinds)]
        case "finetune":
            kinds = {kind: pd.DataFrame([row for row in rows if row["kind"] == kind]) for kind in {row["kind"] for row in rows}}
            told = finetuning.lines(finetuning.merged(kinds), run.config["head"] == "response")
            return [_plain("on the test examples", tuple(told[0]), [tuple(line.values()) for line in told]), finetuning.asked(run.config)]
        case "plan":
            shown = (("by devices and bandwidth", plan.main_table(rows)), ("measured", plan.point_table(rows)))
            return [
                *(_plain(title, tuple(lines[0]), [tuple(line.values()) for line in lines]) for title, lines in shown if lines),
                *plan.told(rows),
            ]
        case "continual":
            kinds = {kind: pd.DataFrame([row for row in rows if row["kind"] == kind]) for kind in {row["kind"] for row in rows}}
            told = continual.lines(continual.merged(kinds))
            return [_plain("after the last task", tuple(told[0]), [tuple(line.values()) for line in told]), continual.asked(run.config)]
        case "advise":
            told = advice.lines(rows)
            return [_plain(advice.HEADING, tuple(told[0]), [tuple(line.values()) for line in told]), *advice.reasons(rows, run.config)]
        case "lens":
            kept, said = lens.lines(rows), lens.said(rows)
            tables = [_plain("kept of a gradient, means over layers", tuple(kept[0]), [tuple(line.values()) for line in kept])]
            words = [tuple(Text(cell, justify="left") for cell in line.values()) for line in said]  # tokens may look like markup
            return [_plain("in tokens", tuple(said[0]), words), *tables, lens.asked(run.config, rows)]
        case "ranks":
            kinds = ranking.frames(rows)
            both = [(title, lines(kinds)) for title, lines in ranking.TABLES.items()]
            tables = [_plain(title, tuple(told[0]), [tuple(line.values()) for line in told]) for title, told in both if told]
            return [*tables, *ranking.findings(kinds)]
        case "bench":
            shown = [row for row in rows if "ratio" in row and row["kind"] != "regression"]
            lines = [
                (
                    row["kind"],
                    row["name"] + (f" = {row['value']}" if "value" in row else ""),
                    row.get("shape", ""),
                    row.get("over", "peer"),
                    f"{row['ratio']:.2f}×",
                    benches.asked(row),
                    f"{100 * row['share']:.0f} %" if "share" in row and row["kind"] != "live" else "",
                )
                for row in shown
            ]
            slower = [
                f"slower than before: {row['group']} {row['name']} over {row.get('over', 'peer')}, {row['before']:.2f}× → {row['ratio']:.2f}×"
                for row in rows
                if row["kind"] == "regression"
            ]
            return [_plain("side by side", ("what", "name", "shape", "over", "ratio", "target", "of the limit"), lines), *slower]
        case "memory" if any(row["kind"] in footprints.KINDS for row in rows):
            return _measured(rows)
        case "memory":
            return [*_footprints(rows), _assumed(run)]
        case "optimizers":
            titles = ("state, and tests passed", "what becomes of the gradient")
            both = zip(titles, optimizers.lines(rows), strict=True)
            tables = [_plain(title, tuple(told[0]), [tuple(line.values()) for line in told]) for title, told in both]
            return [*tables, optimizers.EXPLANATION]
    return []


def _measured(rows: list[dict[str, Any]]) -> list[Any]:
    """Bytes by category of every method, what the targets say, and what was not run."""
    told = footprints.lines([row for row in rows if row["kind"] == "footprint"])
    tables = [_plain("peak of a step, MiB", tuple(told[0]), [tuple(line.values()) for line in told])] if told else []
    real = [
        (f"{row['name']} {row['step']}", binary(row["fake"]), binary(row["allocated"]), f"{row['ratio']:.3f}")
        for row in rows
        if row["kind"] == "agreement"
    ]
    tables += [_plain("fake tensors and allocator", ("step", "fake", "allocated", "ratio"), real)] if real else []
    said = [footprints.verdict(row) for row in rows if row["kind"] == "target"]
    return [*tables, *said, *(f"{row['name']} was not run: {row['why']}" for row in rows if row["kind"] == "not_run")]


def _footprints(rows: list[dict[str, Any]]) -> list[Table]:
    """Predicted bytes by category, one column a method; bytes sent a step; measured peaks."""
    peaks = [row for row in rows if row["kind"] == "memory"]
    names = [row["name"] + (" redraw" if row["step"] == "redraw" else "") for row in peaks]
    categories = [name for name in CATEGORIES if any(row[name] for row in peaks)]
    lines = [(name, *(binary(row[name]) for row in peaks)) for name in (*categories, "total")]
    tables = [_plain("peak memory of a step on one device", ("", *names), [*lines, ("at", *(row["moment"] for row in peaks))])]
    sent = [row for row in rows if row["kind"] == "communication" and row["wire"]]
    if sent:
        lines = [(row["collective"], row["name"], binary(row["payload"]), binary(row["wire"])) for row in sent]
        tables.append(_plain("communication of a step", ("collective", "name", "payload", "a device sends"), lines))
    real = [row for row in rows if row["kind"] == "measured"]
    if real:
        lines = [
            (
                f"{row['name']} {row['precision']}"
                + ("" if row["optimizer"] == "adamw" else f" {row['optimizer']}")
                + (" recomputed" if row["checkpointed"] else "")
                + ("" if row["stored"] else " V not kept")
                + (" redraw" if row["step"] == "redraw" else ""),
                binary(row["predicted"]),
                binary(row["measured"]),
                f"{row['ratio']:.3f}",
            )
            for row in real
        ]
        tables.append(_plain("predicted and measured peak", ("step", "predicted", "measured", "ratio"), lines))
    return tables


def _assumed(run: Run) -> str:
    """What the bytes are for: a batch, its precision and the devices."""
    from experiments import memory

    training = memory.step(memory.Config(**{key: value for key, value in run.config.items() if key in memory.Config.__dataclass_fields__}))
    devices = f"{run.config['world_size']} devices, {training.shard}" if run.config["world_size"] > 1 else "1 device"
    return (
        f"for {training.sequences} sequences of {training.length} tokens a step in {training.accumulate} micro-batches, {training.precision}, "
        f"activations {'recomputed' if training.checkpoint_activations else 'kept'}, {training.optimizer}, {devices}"
    )


def binary(size: float) -> str:
    """Bytes in MiB, from 1 GiB on in GiB."""
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.2f} GiB"


def _plain(title: str, columns: tuple[str, ...], lines: Sequence[tuple[Any, ...]]) -> Table:
    table = Table(title=title)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for line in lines:
        table.add_row(*(cell if isinstance(cell, Text) else str(cell) for cell in line))
    return table


def outcome(rows: list[dict[str, Any]]) -> list[tuple[str, int, int, float, float]]:
    """(kind, holding, total, largest |z|, coarsest resolution) for every kind of row that holds or does not."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows if "holds" in row):
        mine = [row for row in rows if row["kind"] == kind and "holds" in row]
        holding = sum(bool(row["holds"]) for row in mine)
        z = max((abs(row["z"]) for row in mine if "z" in row and kind != "order"), default=float("nan"))
        resolution = max((row["resolution"] for row in mine if "resolution" in row), default=float("nan"))
        lines.append((KINDS.get(kind, kind), holding, len(mine), z, resolution))
    return lines


KINDS = {
    "law": "moments of a law",
    "ipa": "error of ĜVVᵀ",
    "lr": "error of the zeroth-order estimate",
    "model": "error on real gradients (law × rank)",
    "order": "order of the laws",
    "curve": "expected loss curve",
    "stability": "growth around the stable step",
    "lazy": "lazy-loop contraction",
    "feedback": "error feedback converges, literal diverges",
    "estimator": "token energies of estimates, and their means",
    "step": "time of a step over full AdamW",
    "memory": "saved activations over nn.Linear",
    "sampling": "time of drawing V within its target",
    "measure": "time of many draws within its target",
    "layer": "time of one layer within its target",
    "optimizer": "time of an update within its target",
    "start": "time until the package answers within its target",
    "regression": "times no slower than before",
    "state": "state bytes are the formula's",
    "promise": "mean of the gradient path is what the method promises",
    "live": "share of a run for live measurement",
    "measured": "predicted peak memory within 10 % of measured",
    "target": "peak memory over full AdamW within its target",
    "agreement": "peak on fake tensors within 10 % of the allocator's",
}


def _table(lines: list[tuple[str, str, int, int, float, float]]) -> Table:
    table = Table(title="what holds")
    table.add_column("what", no_wrap=True)
    for name in ("hold", "largest |z|", "would have seen"):
        table.add_column(name, justify="right")
    shown = ""
    for run, kind, holding, total, z, resolution in lines:
        if run != shown:
            table.add_section()
            table.add_row(f"[bold]{run}[/]")
            shown = run
        table.add_row(
            f"  {kind}",
            f"[{'green' if holding == total else 'bold red'}]{holding}/{total}[/]",
            "" if z != z else f"{z:.2f}",
            "" if resolution != resolution else f"{100 * resolution:.2g} %",
        )
    return table
