"""One self-contained HTML page from finished runs: what held, what differs between them, figures with error bars, tables that can be sorted.

Examples:

    lowrank report runs/validate-* runs/dynamics-*
    lowrank report runs/compare-tiny-1a2b3c4d --out comparison.html
    lowrank report runs/pretrain-tiny-* --title "Laws on tiny"
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import runs
from experiments.pages import (
    advice,
    configurations,
    continual,
    dynamics,
    finetuning,
    lens,
    optimizers,
    plan,
    ranking,
    report_training,
    scaling,
    summary,
    validation,
)
from experiments.pages.page import Link, document, section, share, table

ABOUT = {  # question → what the title of a page says of it
    "validate": "validation",
    "dynamics": "dynamics",
    "pretrain": "training",
    "compare": "comparison in training",
    "scaling": "scaling law",
    "finetune": "fine-tuning",
    "tuning": "fine-tuning",
    "continual": "tasks in sequence",
    "sequence": "tasks in sequence",
    "bench": "speed",
    "advise": "advice",
    "lens": "gradients in tokens",
    "memory": "memory",
    "plan": "devices and links",
    "optimizers": "optimizers in a frame",
    "ranks": "a rank for every layer",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write one HTML page from finished run directories."""

    run: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories, in the order they should appear."""
    out: Path = Path("runs/report.html")
    """Where the page goes."""
    title: str = ""
    """Of the page; what its runs are about if empty."""

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("name at least one run directory, such as runs/validate-synthetic-0123abcd")


def main(config: Config) -> Path:
    """Write the page and return its path. Raises ``ValueError`` for a directory that is not a finished run."""
    loaded = [runs.load(path) for path in config.run]
    names = [Link(name, name) for name in _names(loaded)]
    parts = [_part(run, run.rows()) for run in loaded]
    repeated = Counter(title for title, _ in parts)
    sections = [(Link("What holds", "what-holds"), _what_holds(loaded, names))] if any(map(_outcome, loaded)) else []
    if len(loaded) > 1:
        sections.append((Link("What differs between the runs", "what-differs"), configurations.differing(loaded, names)))
    for run, name, (title, body) in zip(loaded, names, parts, strict=True):
        heading = title if repeated[title] == 1 else f"{title} ({name})"
        sections.append((Link(heading, name.to), body + configurations.whole(run)))
    about = list(dict.fromkeys(ABOUT[run.config["question"]] for run in loaded))
    title = config.title or f"Low-rank gradient estimators: {', '.join(about)}"
    page = document(title, _verdict(loaded), "".join(section(*one) for one in sections), [link for link, _ in sections])
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(page, encoding="utf-8")
    return config.out


def _part(run: runs.Run, rows: list[dict[str, Any]]) -> tuple[str, str]:
    """(title, HTML) of one run."""
    config = run.config
    match config["question"]:
        case "dynamics":
            return f"Dynamics: n={config['n']}, r={config['rank']}", dynamics.section(rows)
        case "pretrain":
            return f"Training: {run.path.name}", report_training.pretrain(run, rows)
        case "compare":
            return f"Comparison in training: {config['model']}", report_training.compare(run, rows)
        case "scaling":
            return f"Scaling law: {config['name']}", scaling.section(run, rows)
        case "finetune":
            return f"Fine-tuning: {config['model']} on {Path(config['task']).stem}", finetuning.section(run, rows)
        case "tuning":
            return f"Fine-tuning: {run.path.name}", finetuning.one(rows)
        case "lens":
            return f"A gradient in tokens: {Path(config['model']).name}", lens.section(run, rows)
        case "continual":
            return f"Tasks in sequence: {config['model']} on {', '.join(Path(name).stem for name in config['task'])}", continual.section(
                run, rows
            )
        case "sequence":
            return f"Tasks in sequence: {run.path.name}", continual.one(rows)
        case "bench":
            return f"Time and memory: {config['model']}", report_training.bench(run, rows)
        case "memory":
            return f"Memory and communication: {config['model']}", report_training.memory(rows)
        case "plan":
            title = "Steps of processes together" if config["measure"] else "A plan for many devices"
            return f"{title}: {', '.join(config['model'])}", plan.section(run, rows)
        case "advise":
            return f"Advice: {config['model']}", advice.section(rows, config)
        case "optimizers":
            return "Optimizers whose state lives in a frame", optimizers.section(rows)
        case "ranks":
            return f"A rank for every layer: {config['model']}", ranking.section(rows)
        case _ if config["model"] == "synthetic":
            return "Validation on synthetic matrices", validation.synthetic(run, rows)
        case _:
            return f"Validation on real gradients: {config['model']}", validation.real(run, rows)


def _names(loaded: Sequence[runs.Run]) -> list[str]:
    """One a run, of its directory, as it can stand in an address; a second run of that name, from another folder, is numbered."""
    seen: Counter[str] = Counter()
    names = []
    for run in loaded:
        name = re.sub(r"[^\w.-]+", "-", run.path.name)
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return names


# What stands before the runs


def _outcome(run: runs.Run) -> list[tuple[str, int, int, float, float]]:
    return summary.outcome(run.rows())


def _verdict(loaded: Sequence[runs.Run]) -> str:
    """How many of all checks hold, how many runs have none, and where the numbers come from."""
    told = [_outcome(run) for run in loaded]
    holding, total = sum(line[1] for lines in told for line in lines), sum(line[2] for lines in told for line in lines)
    without = sum(not lines for lines in told)
    some, others = _counted(len(loaded) - without), _counted(without)
    if total:
        rest = f"; {others} {'was' if without == 1 else 'were'} measured without a check" if without else ""
        text = f"{share(holding, total)} checks hold in {some}{rest}."
    else:
        text = f"{others}, measured without a check."
    source = (
        "Every number was measured by the runs below or computed from their exact theory; which tests passed is from committed results."
    )
    return f"<p class='summary'>{text}</p><p>{source}</p>"


def _counted(number: int) -> str:
    return f"{number} run{'' if number == 1 else 's'}"


def _what_holds(loaded: Sequence[runs.Run], names: Sequence[Link]) -> str:
    """The table of the terminal, with links; a check that is not statistical has no z."""
    told = [(name, *line) for run, name in zip(loaded, names, strict=True) for line in _outcome(run)]
    statistical = any(not math.isnan(resolution) for *_, resolution in told)
    lines = [
        {"run": name, "check": kind, "hold": f"{holding:,} of {total:,}", "all": holding == total}
        | (
            {
                "largest |z|": "" if math.isnan(z) else f"{z:.2f}",
                "would have seen": "" if math.isnan(resolution) else f"{100 * resolution:.2g} %",
            }
            if statistical
            else {}
        )
        for name, kind, holding, total, z, resolution in told
    ]
    text = (
        "<p>A check with a z <em>holds</em> when the measured value is within 5 standard errors of the exact one and the run was long enough "
        "to see a defect of its stated size (8 standard errors). The others say what they ask for.</p>"
    )
    return (text if statistical else "") + table(lines)
