"""Write finished runs as small CSV files with provenance, the only form in which numbers are committed.

Example:

    lowrank publish runs/compare-tiny-1a2b3c4d
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro

from experiments import runs

KEPT = {  # question → kinds of rows worth committing
    "validate": ("law", "ipa", "lr", "layer", "gradient", "model", "order"),
    "dynamics": ("curve", "stability", "lazy", "feedback"),
    "pretrain": ("train", "eval", "live", "end", "skip"),
    "compare": ("trial", "final", "paired", "curve", "cost", "init", "spike", "spike_paired"),
    "scaling": ("trial", "point", "parameter", "quality", "tokens", "check"),
    "finetune": ("trial", "tested", "paired", "peak"),
    "tuning": ("train", "eval", "end", "skip"),
    "lens": ("direction", "kept", "estimator", "layer"),
    "continual": ("trial", "accuracy", "final", "paired"),
    "sequence": ("train", "accuracy", "protected", "end", "skip"),
    "bench": ("machine", "sampling", "measure", "layer", "step", "memory", "refresh", "live", "growth", "start", "optimizer"),
    "optimizers": ("state", "path", "update", "promise"),
    "advise": ("layer", "candidate", "advice"),
    "plan": ("plan", "threshold", "point"),
    "ranks": ("spectrum", "angle", "rank", "budget", "export", "trial", "final", "paired"),
    "memory": ("memory", "communication", "measured", "footprint", "target", "agreement", "not_run"),
}
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write the rows of finished runs to experiments/results/QUESTION/LABEL-KIND.csv."""

    run: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories."""
    out: Path = RESULTS
    """Results folder."""

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("name at least one run directory")


def main(config: Config) -> list[Path]:
    """Write one CSV a kind of row and one JSON of provenance a run; returns their paths."""
    if config.out.exists() and not config.out.is_dir():
        raise runs.WrongInput(f"{config.out} is a file; results go into a folder")
    written = []
    for path in config.run:
        run = runs.load(path)
        question, label = run.path.name.split("-", 1)
        label = label.rsplit("-", 1)[0]
        folder = config.out / question
        folder.mkdir(parents=True, exist_ok=True)
        for kind in KEPT[question]:
            rows = [line for row in run.rows() if row["kind"] == kind for line in _flat(row)]
            target = folder / f"{label}-{kind}.csv"
            target.unlink(missing_ok=True)  # of an earlier run with this label, which may have had rows of other kinds
            if rows:
                pd.DataFrame(rows).to_csv(target, index=False, float_format="%.8g")
                written.append(target)
        target = folder / f"{label}.json"
        identity = {key: value for key, value in run.config.items() if key not in runs.NOT_IDENTITY}
        text = (run.path / "env.json").read_text(encoding="utf-8")
        environment = json.loads(re.sub(r" --runs-dir [^\s\"]+", "", text))  # where a run lay is nobody's concern
        runs.write_json(target, {"config": identity, "environment": environment})
        written.append(target)
    return written


def committed(name: str, results: Path = RESULTS) -> pd.DataFrame:
    """The committed rows ``question/label-kind`` as a frame; ``results`` may be another folder.

    >>> committed("compare/tiny-final").law.iloc[0]
    'gaussian'

    Raises ``FileNotFoundError`` with the names there are.
    """
    path = results / f"{name}.csv"
    if not path.exists():
        question = path.parent.name
        known = ", ".join(f"{question}/{other.stem}" for other in sorted(path.parent.glob("*.csv"))) or "none of that question"
        raise FileNotFoundError(f"no committed rows {name!r}; there are {known}")
    return pd.read_csv(path)


def committed_kinds(name: str, kinds: Iterable[str], results: Path = RESULTS) -> dict[str, pd.DataFrame]:
    """Kind → committed rows of the run ``question/label``, of the kinds that it has; nothing if it was not run."""
    return {kind: pd.read_csv(file) for kind in kinds if (file := results / f"{name}-{kind}.csv").exists()}


def _flat(row: dict[str, Any]) -> list[dict[str, Any]]:
    """One line a verdict, one line a point of a curve, else the row without its lists."""
    plain = {key: value for key, value in row.items() if not isinstance(value, list) and key != "kind"}
    if "verdicts" in row:
        return [{key: plain[key] for key in ("law", "shape", "spectrum", "rank", "draws")} | verdict for verdict in row["verdicts"]]
    if isinstance(row.get("loss"), list):
        return [{"law": row["law"], "step": step, "loss": loss} for step, loss in zip(row["step"], row["loss"], strict=True)]
    return [plain]
