"""Blocks of the front page and of the guides that come from the registries: what can be asked, what is there, and what each thing is."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from estimators import LAWS
from experiments import cli
from experiments.pages import optimizers
from experiments.pages.nature import nature
from experiments.pages.page import records
from experiments.pages.references import linked
from experiments.publish import RESULTS, committed_kinds
from optimizers import OPTIMIZERS, ZEROTH_ORDER

WIDTH = 100
ROOT = Path(__file__).parents[2]
IN_THE_LAYER = {  # methods that change linear layers and take any optimizer → their paper
    "lowrank": "2603.20632",
    "compact": "2410.15352",
    "tokens": "2007.10412",
    "rad": "2007.10412",
    "wta_crs": "2305.15265",
    "velora": "2405.17991",
    "lora": "2106.09685",
    "relora": "2307.05695",
}
BETWEEN_TASKS = {"gorp": "2507.02503", "protected": "2103.09762"}  # optimizers that are told where a task ends → their paper


def questions() -> str:
    """The map of the command line."""
    return _table({"command": f"`lowrank {name}`", "what it is for": text} for name, text in cli.QUESTIONS.items())


def usage() -> str:
    """What ``lowrank --help`` writes where the terminal is ``WIDTH`` characters wide."""
    return f"```\n{cli.usage(WIDTH)}\n```"


def notebooks() -> str:
    """The notebooks there are, by their titles, numbered as their files are."""
    lines = ["Notebooks, executed:", ""]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        title = next((line for cell in cells for line in "".join(cell["source"]).splitlines() if line.startswith("# ")), f"# {path.stem}")
        lines.append(f"{int(path.stem[:2])}. [{re.sub(r'^# ([0-9]+[.] )?', '', title)}](notebooks/{path.name})")
    return "\n".join(lines)


def methods(results: Path = RESULTS) -> str:
    """Every optimizer in a line: what it keeps, and what its path does to a synthetic gradient; then methods that keep nothing of their own."""
    frames = committed_kinds("optimizers/24x32", ("state", "path", "update"), results).values()
    kept, done = optimizers.lines(row for frame in frames for row in records(frame))
    measured = ("mean of path", "bias²", "variance")
    rows = [
        {
            "method": f"`{keeps['method']}`",
            "arXiv": linked(keeps["arXiv"]),
            "gradient": keeps["gradient"],
            "state": keeps["state"],
            "/AdamW": keeps["/AdamW"],
            **{name: does[name] for name in measured},
        }
        for keeps, does in zip(kept, done, strict=True)
    ]
    listed = lambda papers: ", ".join(f"`{name}` ({linked(number)}, {nature(name)})" for name, number in papers.items())  # noqa: E731
    return (
        f"{_table(rows)}\n\nIn the linear layers, under any optimizer: {listed(IN_THE_LAYER)}. "
        f"For tasks one after the other, in `lowrank continual`: {listed(BETWEEN_TASKS)}. "
        f"With forward passes alone: {listed({name: _paper(cls) for name, cls in ZEROTH_ORDER.items()})}."
    )


def laws() -> str:
    """Every law in a sentence, from its own file; those that share one stand together."""
    rows = [
        {"law": ", ".join(f"`{name}`" for name in names), "what it is": sentence, "files": f"`theory/{stem}.py`, `estimators/{stem}.py`"}
        for (stem, sentence), names in _together((name, (law.stem, _sentence(law))) for name, law in LAWS.items())
    ]
    return _table(rows)


def files() -> str:
    """Every optimizer in a sentence, from its own file, and where it differs from published code; those that share a file stand together."""
    blocks = []
    both = {**OPTIMIZERS, **ZEROTH_ORDER}
    for module, names in _together((name, cls.__module__) for name, cls in both.items()):
        said = optimizers.differences(names[0]) if names[0] in OPTIMIZERS else ""
        title = ", ".join(f"`{name}`" for name in names)
        path = f"{module.replace('.', '/')}.py"
        blocks.append(f"- **{title}** ([{path}](../{path})): {_sentence(both[names[0]])}" + (f"\n  {said}" if said else ""))
    return "\n".join(blocks)


def _together(pairs: Iterable[tuple[str, Any]]) -> list[tuple[Any, list[str]]]:
    """Value → the names that have it, in the order of the first."""
    found: dict[Any, list[str]] = {}
    for name, value in pairs:
        found.setdefault(value, []).append(name)
    return list(found.items())


def _paper(cls: type) -> str:
    found = optimizers.ARXIV.search(_document(cls))
    return found[1] if found else ""


def _document(cls: type) -> str:
    return inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")


def _sentence(cls: type) -> str:
    """The first line of a module, which says what it is about."""
    return _document(cls).splitlines()[0]


def _table(rows: Iterable[dict[str, str]]) -> str:
    rows = list(rows)
    head = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*head, *("| " + " | ".join(row.values()) + " |" for row in rows)])
