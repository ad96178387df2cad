"""The tables of README.md, the guides and results/README.md: facts from the registries, numbers from committed results, nothing typed by hand.

``python -m experiments.pages.readme`` rewrites every table between its markers; a test fails when a table and the results disagree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from estimators import LAWS
from experiments.gpu import steps_table
from experiments.gpu import table as gpu
from experiments.gpu.cells import Settings
from experiments.pages import (
    benches,
    comparisons,
    continual,
    finetuning,
    footprints,
    guides,
    kernels,
    lens,
    optimizers,
    plan,
    ranking,
    redraws,
    references,
    reproduce,
    scaling,
    stalling,
)
from experiments.pages.markers import updated
from experiments.pages.page import records
from experiments.publish import RESULTS, committed

README = Path(__file__).parents[2] / "README.md"
GUIDES = README.parent / "docs"
RATIO = 0.25

FORMULAS = {  # E‖ĜVVᵀ − g‖² at c = 1; t = tr S, S = E[ĜᵀĜ]
    "gaussian": "(n+r+1)/r · t − ‖g‖²",
    "rademacher": "(n+r−1)/r · t − ‖g‖²",
    "sparse_sign": "(n+r+s−2)/r · t − ‖g‖²",
    "haar_stiefel": "n/r · t − ‖g‖²",
    "coordinate": "n/r · t − ‖g‖²",
    "coordinate_replacement": "(n+r−1)/r · t − ‖g‖²",
    "dct": "n/r · t − ‖g‖²",
    "hadamard": "n/r · t − ‖g‖²",
    "spectral": "Σ σᵢ/πᵢ − ‖g‖²",
    "top_svd": "tr(QQᵀS) − 2‖gQ‖² + ‖g‖²",
    "fixed_basis": "tr(QQᵀS) − 2‖gQ‖² + ‖g‖²",
}


def law_table(results: Path = RESULTS) -> str:
    """The table as Markdown: law, unbiased?, formula, file, and error relative to ‖g‖² on the gradients of the tiny LLaMA."""
    frame = committed("validate/tiny-model", results)
    frame = frame[frame.ratio == RATIO].set_index("law")
    lines = [
        "| law | unbiased | E‖ĜVVᵀ − g‖² at c = 1 | file | exact / ‖g‖² | measured / ‖g‖² |",
        "|---|---|---|---|---|---|",
    ]
    for name, law in LAWS.items():
        row = frame.loc[name]
        signal = float(row["signal_norm2"])
        exact, measured, error = (float(row[key]) / signal for key in ("predicted", "measured", "standard_error"))
        lines.append(
            f"| `{name}` | {'yes' if law.unbiased else 'no'} | {FORMULAS[name]} | `{law.stem}.py` | "
            f"{exact:.2f} | {measured:.2f} ± {error:.2f} |"
        )
    return "\n".join(lines)


def bench_table(results: Path = RESULTS) -> str:
    """Ratios of the committed bench on 60m."""
    step, memory = (committed(f"bench/60m-{kind}", results).set_index("name") for kind in ("step", "memory"))
    config = json.loads((results / "bench" / "60m.json").read_text(encoding="utf-8"))
    lines = [
        f"LLaMA-{config['config']['model'].upper()}, r/n = {config['config']['rank']:g}, {config['config']['sequences']} × "
        f"{config['config']['length']} tokens, {config['environment']['device']}, K = {config['config']['refresh_every']}.",
        "",
    ]
    lines += ["| method | time of a step | with redraws | saved activations | optimizer state |", "|---|---|---|---|---|"]
    for name in step.index:
        row, saved = step.loc[name], f"{memory.ratio[name]:.2f}×" if name in memory.index else ""
        with_redraws = "" if pd.isna(row.ratio_with_redraws) else f"{row.ratio_with_redraws:.2f}×"
        lines.append(
            f"| `{'adamw' if name == 'peer' else name}` | {row.ratio:.2f}× ({row.ratio_q1:.2f}–{row.ratio_q3:.2f}) | {with_redraws} | "
            f"{saved} | {row.state_bytes / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)


def updates_table(results: Path = RESULTS) -> str:
    """Time of an update alone: of every method with its refresh, and over published packages."""
    file = results / "bench" / "60m-optimizers-optimizer.csv"
    if not file.exists():
        return "not yet run"
    rows = pd.read_csv(file)
    everywhere = rows["matrices"].max() if "matrices" in rows else math.nan
    config = json.loads((results / "bench" / "60m-optimizers.json").read_text(encoding="utf-8"))
    lines = [
        f"Update of the matrices of LLaMA-{config['config']['model'].upper()} at r = {config['config']['rank']:g} of the smaller dimension, "
        f"{config['environment']['device']}: median and quartiles of the ratio; a refresh is what it adds to a step, amortised over the method's "
        'default K. The refresh called so below is that of `basis="randomized"`, from directions of some steps before, and holds '
        f"{100 * rows.energy.min():.1f} % or more of the energy of exact ones; GaLore's default is the exact SVD.",
        "",
        "| what | over | ratio | at most |",
        "|---|---|---|---|",
    ]
    own = rows.over == "two products"
    for row in records(pd.DataFrame(rows[~own | rows.target.notna()])):
        where = f", {row['matrices']:.0f} matrices" if row.get("matrices", math.nan) < everywhere else ""
        limit = "" if pd.isna(row["target"]) else f"{row['target']:g}" + ("" if row["holds"] in (True, "True") else ", missed")
        lines.append(f"| `{row['name']}` | {row['over']}{where} | {row['ratio']:.3f}×{_spread(row)} | {limit} |")
    lines += ["", "| method | update over two products | update ms | refresh ms | K | amortised ms |", "|---|---|---|---|---|---|"]
    for row in records(pd.DataFrame(rows[own])):
        refresh, period = ("", "") if pd.isna(row["refresh"]) else (f"{1e3 * row['refresh']:.0f}", f"{row['period']:.0f}")
        lines.append(
            f"| `{row['name']}` | {row['ratio']:.2f}×{_spread(row)} | {1e3 * row['seconds']:.0f} | {refresh} | {period} | "
            f"{1e3 * row['amortised']:.0f} |"
        )
    return "\n".join(lines)


def _spread(row: dict[Any, Any]) -> str:
    return "" if pd.isna(row["ratio_q1"]) else f" ({row['ratio_q1']:.2f}–{row['ratio_q3']:.2f})"


def memory_table(results: Path = RESULTS) -> str:
    """Predicted over measured peak of a training step: the range over all settings of a model and number of devices."""
    files = sorted((results / "memory").glob("*-measured.csv"))
    if not files:
        return "not yet run"
    rows = pd.concat([pd.read_csv(file) for file in files])
    rows["devices"] = [f"{size}, {shard}" if size > 1 else "1" for size, shard in zip(rows.world_size, rows.shard, strict=True)]
    rows = rows.sort_values("measured")
    lines = ["| model | devices | settings | largest measured peak | predicted / measured |", "|---|---|---|---|---|"]
    for _, group in rows.groupby(["model", "devices"], sort=False):
        model, devices = group.model.iloc[0], group.devices.iloc[0]
        peak, low, high = group.measured.max() / 2**20, group.ratio.min(), group.ratio.max()
        lines.append(f"| {model} | {devices} | {len(group)} | {peak:,.0f} MiB | {low:.3f} … {high:.3f} |")
    return "\n".join(lines)


COMPARISONS = ("tiny", "tiny-rank", "tiny-period", "tiny-constant", "9m")
DOCUMENTS: dict[Path, dict[str, Callable[[], str]]] = {
    README: {"laws": law_table, "methods": guides.methods, "questions": guides.questions, "notebooks": guides.notebooks},
    GUIDES / "training.md": {"training": comparisons.trained, "bench": bench_table},
    GUIDES / "methods.md": {
        "optimizers": optimizers.markdown,
        "compared": partial(comparisons.costs, comparisons.COSTED[0]),
        "updates": updates_table,
        "files": guides.files,
    },
    GUIDES / "memory.md": {"memory": memory_table, "footprints": footprints.markdown, "plan": plan.markdown},
    GUIDES / "scaling.md": {"scaling": partial(scaling.short, scaling.NAMES[0])},
    GUIDES / "finetuning.md": {
        "finetune": partial(finetuning.markdown, finetuning.COMMITTED[0]),
        "continual": partial(continual.markdown, continual.COMMITTED[0]),
    },
    GUIDES / "reproduce.md": {"reproduce": reproduce.markdown},
    GUIDES / "command-line.md": {"usage": guides.usage},
    GUIDES / "glossary.md": {"law names": guides.laws},
    GUIDES / "references.md": {"references": references.markdown},
    RESULTS / "README.md": {f"compare {name}": partial(comparisons.differences, name) for name in COMPARISONS}
    | {f"compare {name}": partial(redraws.spikes, name) for name in redraws.SPIKES}
    | {"compare initial-scale": partial(redraws.initial, "initial-scale"), "compare coupling": partial(comparisons.differences, "coupling")}
    | {"stalling": stalling.markdown}
    | {f"costs {name}": partial(comparisons.costs, name) for name in comparisons.COSTED}
    | {f"scaling {name}": partial(scaling.markdown, name) for name in scaling.NAMES}
    | {f"finetune {name}": partial(finetuning.markdown, name) for name in finetuning.COMMITTED[1:]}
    | {f"lens {name}": partial(lens.markdown, name) for name in lens.COMMITTED}
    | {
        "footprints": footprints.llamas,
        "ranks": partial(ranking.markdown, ranking.COMMITTED),
        "primitives": benches.primitives,
        "gpu steps": steps_table.table,
        "kernels": kernels.markdown,
    },
    gpu.PAGE: {gpu.BLOCK: partial(gpu.tables, Settings())},
}


if __name__ == "__main__":
    for document, tables in DOCUMENTS.items():
        document.write_text(updated(document.read_text(encoding="utf-8"), tables), encoding="utf-8")
