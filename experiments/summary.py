"""What the terminal shows after a question: a table of what held, and where the files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.runs import Run


def show(result: Any) -> int:
    """Print the outcome of a question's ``main``; the exit code, 1 when a check did not hold."""
    console = Console(soft_wrap=True)
    results = result if isinstance(result, list) else [result]
    code = 0
    runs = [item for item in results if isinstance(item, Run)]
    if runs:
        lines = [(run.path.name, *line) for run in runs for line in outcome(run.rows())]
        if lines:
            console.print(_table(lines))
        for run in runs:
            for row in run.rows():
                if row["kind"] == "eval" and row["step"] == run.config["steps"]:
                    console.print(
                        f"{run.path.name}: held-out loss {row['loss']:.4f} nats, perplexity {row['perplexity']:.1f}", highlight=False
                    )
        code = int(any(holding < total for _, _, holding, total, _, _ in lines))
    for item in results:
        path = item.path if isinstance(item, Run) else item
        if isinstance(path, Path):
            console.print(f"{'run' if isinstance(item, Run) else 'wrote'}: {path}", highlight=False)
    return code


def outcome(rows: list[dict[str, Any]]) -> list[tuple[str, int, int, float, float]]:
    """(kind, holding, total, largest |z|, coarsest resolution) for every kind of row that holds or does not."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows if "holds" in row):
        mine = [row for row in rows if row["kind"] == kind]
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
    "step": "time of a step over full AdamW",
    "memory": "saved activations over nn.Linear",
}


def _table(lines: list[tuple[str, str, int, int, float, float]]) -> Table:
    table = Table(title="theory against measurement")
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
