"""Rows of finished cells as CSV files, and the tables made of them; a cell without a device yet says so.

python -m experiments.gpu.table cells.tar.gz     from archives or folders of cells; without any, the tables alone
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from experiments import runs
from experiments.gpu import cells, measure, store
from experiments.gpu.cells import Settings
from experiments.pages.markers import updated
from experiments.publish import RESULTS

PAGE = RESULTS / "gpu" / "README.md"
NOT_YET = "not yet run"
BLOCK = "gpu"
KINDS = ("train", "time", "memory", "tune")
SAME = (
    "parameters",
    "touched_share",
    "device_kind",
    "python",
    "kind",
    "skipped",
)  # left out: in every row alike, or of no use beside the others


def update(found: dict[str, dict[str, Any]], settings: Settings, results: Path = RESULTS) -> list[Path]:
    """Write ``results``/gpu/KIND.csv for all cells of the plan: what is found replaces what is there, what is there stays. Returns the files."""
    folder = results / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    planned = cells.plan(settings)
    for kind in KINDS:
        file = folder / f"{kind}.csv"
        earlier = _earlier(file)
        names = [cell.name for cell in planned if cell.kind == kind]
        names += [name for name in (*earlier, *found) if name.split()[0] == kind and name not in names]
        rows: list[dict[str, Any]] = []
        for name in dict.fromkeys(names):
            known = earlier.get(name, [{"cell": name, "status": NOT_YET}])
            kept = name not in found or (
                found[name]["status"] == "failed" and known[0]["status"] == "done"
            )  # a later failure takes nothing away
            rows += known if kept else _rows(name, found[name])
        frame = pd.DataFrame(rows)
        frame.to_csv(file, index=False, float_format="%.8g")
        written.append(file)
    return written


def _rows(name: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    rows = record.get("rows") or [record.get("row", {})]
    known = {"cell": name, "status": record["status"]} | ({"error": record["error"]} if "error" in record else {})
    return [known | {key: value for key, value in row.items() if key not in SAME} for row in rows]


def _earlier(file: Path) -> dict[str, list[dict[str, Any]]]:
    if not file.exists():
        return {}
    found: dict[str, list[dict[str, Any]]] = {}
    for row in pd.read_csv(file).to_dict("records"):
        found.setdefault(str(row["cell"]), []).append({str(key): value for key, value in row.items() if pd.notna(value)})
    return found


def tables(settings: Settings, results: Path = RESULTS) -> str:
    """All tables as Markdown, from the committed rows."""
    frames = {kind: _frame(results / "gpu" / f"{kind}.csv") for kind in KINDS}
    batch = f"{settings.sequences} × {settings.length}"
    train, time, memory = frames["train"], frames["time"], frames["memory"]
    done = train[train.status == "done"]
    said = ""
    if len(done):
        epochs = " to ".join(f"{value:.2f}" for value in sorted({round(done.epochs.min(), 2), round(done.epochs.max(), 2)}))
        said = f" Device: {', '.join(sorted(set(done.device)))}. The text was seen {epochs} times; its losses are not C4 perplexities."
    lines = [
        f"Training: {settings.tokens / 1e6:g} M tokens in steps of {batch}, {settings.precision}, K = {settings.refresh_every}, c = 1, `row_scale`; "
        "held-out loss in nats/token, beside it the same over full AdamW's of equal seed. Ratios of times and peaks: from the cell below that "
        f"times everyone of this model and r/n side by side.{said}",
        "",
        "| model | method | r/n | seed | held-out loss | loss / AdamW | tokens/s | step time / AdamW | peak / AdamW | learning rate | epochs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in (cell for cell in cells.plan(settings) if cell.kind == "train"):
        row = _one(train, cell=cell.name)
        peer = _one(train, cell=cells.train_cell(settings, cell.model, "adamw", settings.ranks[0], cell.seed or 0).name)
        beside = _one(time, model=cell.model, contender=cell.contender, rank=cell.rank, compile=cell.compile)
        lines.append(_line(cell.model, cell.contender, cell.rank, cell.seed, *_trained(row, peer), *_ratios(beside), *_chosen(row)))
    lines += ["", f"Side by side ({batch} a step; quartiles of the ratios in brackets):", ""]
    lines += [
        "| model | method | r/n | compiled | step | step time / AdamW | tokens/s / AdamW | peak | peak / AdamW | target |",
        "|" + "---|" * 10,
    ]
    for cell in (cell for cell in cells.plan(settings) if cell.kind == "time"):
        for one in cells.timed(settings, cell):
            row = _one(time, cell=cell.name, contender=one)
            lines.append(_line(cell.model, one, None if one == "adamw" else cell.rank, "yes" if cell.compile else "no", *_timed(row)))
    lines += ["", f"Peak memory at equal batch, {settings.memory_sequences} × {settings.length} tokens:", ""]
    lines += ["| model | method | r/n | peak | peak / AdamW | target |", "|" + "---|" * 6]
    for cell in (cell for cell in cells.plan(settings) if cell.kind == "memory"):
        for one in cells.contenders(settings):
            row = _one(memory, cell=cell.name, contender=one)
            peak = ("", "", row.status) if row is not None and row.status != "done" else ("", "", NOT_YET)
            if row is not None and row.status == "done":
                peak = (_gib(row.peak_bytes), f"{row.peak_ratio:.2f}", _target(row))
            lines.append(_line(cell.model, one, None if one == "adamw" else cell.rank, *peak))
    targets = f"Targets: step time at most {measure.STEP_TARGET:g} of full AdamW's for `{settings.judged_model}`, "
    return "\n".join([*lines, "", f"{targets}peak at most {measure.MEMORY_TARGET:g} of it for `{settings.memory_model}` at equal batch."])


def _frame(file: Path) -> pd.DataFrame:
    return pd.read_csv(file) if file.exists() else pd.DataFrame({"cell": [], "status": []})


def _one(frame: pd.DataFrame, **where: Any) -> Any:
    """The row with these values, or None; a cell without rows of its own has only its name and its status."""
    if "cell" in where:
        named = frame[frame.cell == where["cell"]]
        if len(named) == 1 and named.status.iloc[0] != "done":
            return named.iloc[0]
    for key, value in where.items():
        if key not in frame:
            return None
        frame = frame.loc[frame[key].isna() if value is None else frame[key] == value]
    return frame.iloc[0] if len(frame) else None


def _trained(row: Any, peer: Any) -> tuple[str, str, str]:
    if row is None or row.status != "done":
        return (NOT_YET if row is None else row.status), "", ""
    ratio = f"{row.loss / peer.loss:.4f}" if peer is not None and peer.status == "done" else ""
    return f"{row.loss:.4f}", ratio, f"{row.tokens_per_second:,.0f}"


def _chosen(row: Any) -> tuple[str, str]:
    if row is None or row.status != "done":
        return "", ""
    return f"{row.lr:g}{' (edge)' if bool(row.at_edge) else ''}", f"{row.epochs:.2f}"


def _ratios(row: Any) -> tuple[str, str]:
    return ("", "") if row is None else (f"{row.ratio:.2f}", f"{row.peak_ratio:.2f}")


def _timed(row: Any) -> tuple[str, ...]:
    if row is None or row.status != "done":
        return NOT_YET if row is None else row.status, "", "", "", "", ""
    ratio = f"{row.ratio:.2f} ({row.ratio_q1:.2f}–{row.ratio_q3:.2f})"
    speed = f"{row.tokens_per_second_ratio:.2f}"
    return f"{1e3 * row.step_seconds:.1f} ms", ratio, speed, _gib(row.peak_bytes), f"{row.peak_ratio:.2f}", _target(row, "step")


def _target(row: Any, what: str = "memory") -> str:
    if row.get("judged") != what:
        return ""
    return f"{'met' if bool(row.holds) else 'missed'} (at most {row.target:g})"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def _line(*values: Any) -> str:
    return "| " + " | ".join("" if value is None else f"{value:g}" if isinstance(value, float) else str(value) for value in values) + " |"


def main(arguments: list[str] | None = None, settings: Settings | None = None, results: Path = RESULTS) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gpu.table", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cells", nargs="*", type=Path, help="archives of experiments.gpu.run, or folders cells/ of its runs")
    options = parser.parse_args(arguments)
    settings, found = settings or Settings(), {}
    try:
        for path in options.cells:
            with tempfile.TemporaryDirectory() as folder:
                if not path.is_dir():
                    store.restore(path, Path(folder))
                found |= store.records(path if path.is_dir() else Path(folder))
    except runs.WrongInput as error:
        print(f"table: {error}", file=sys.stderr)
        return 2
    update(found, settings, results)
    page = results / "gpu" / PAGE.name
    page.write_text(updated(page.read_text(encoding="utf-8"), {BLOCK: lambda: tables(settings, results)}), encoding="utf-8")
    print(f"{len(found)} cells read; {page} and {results / 'gpu'} are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
