"""The table of optimizers: what each keeps, does to the gradient, and how it was verified; for the terminal, the report and the README."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.pages import figures_training
from experiments.pages.page import details_block, figure, table, verdict
from experiments.publish import RESULTS
from optimizers import OPTIMIZERS

WAYS = {"a": "identities", "b": "transcription", "c": "published package", "d": "recorded run"}
CHECKS = RESULTS / "optimizers" / "checks.csv"


def paper(method: str) -> str:
    """arXiv id of a method, from its file."""
    found = re.search(r"(?:arXiv )?(\d{4}\.\d{5})", _document(method))
    return found[1] if found else ""


def differences(method: str) -> str:
    """Where a method deliberately differs from its published code, and what its reference-code variant is: its file's own words."""
    paragraphs = re.split(r"\n(?=``variant=|Differs|Written)", _document(method))[1:]
    return " ".join(" ".join(paragraphs).split())


def _document(method: str) -> str:
    import sys

    return sys.modules[OPTIMIZERS[method].__module__].__doc__ or ""


def checks(path: Path = CHECKS) -> dict[str, dict[str, str]]:
    """method → way → "passed/all", of the tests that were run for it; nothing for a way that no test takes."""
    if not path.exists():
        return {}
    frame = pd.read_csv(path)
    told: dict[str, dict[str, str]] = {}
    for row in frame.to_dict("records"):
        told.setdefault(str(row["method"]), {})[str(row["way"])] = f"{row['passed']}/{row['tests']}"
    return told


def checked(path: Path = CHECKS) -> str:
    """What the tests of ``checks`` ran with, as a sentence."""
    beside = path.with_suffix(".json")
    if not beside.exists():
        return ""
    told = json.loads(beside.read_text(encoding="utf-8"))
    packages = ", ".join(f"{name} {version}" for name, version in told["packages"].items())
    return f"Tests of (a) to (d) ran at {told['git_sha'][:7]}{' with changes' if told['git_dirty'] else ''}, torch {told['torch']}, {packages}."


def lines(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(what each method keeps and how it was verified, what it does to the gradient): one line a method each, from the rows of a run."""
    found = checks()
    merged: dict[str, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(row["method"], {}).update(row)
    kept = [
        {
            "method": name,
            "arXiv": paper(name) if name in OPTIMIZERS else "",
            "state": row["formula"],
            "bytes": f"{int(row['state_bytes']):,}",
            "/AdamW": f"{row['over_adamw']:.3f}",
            **{way: found.get(name, {}).get(way, "") for way in WAYS},
        }
        for name, row in merged.items()
    ]
    done = [
        {
            "method": name,
            "mean of path": f"{row['alignment']:.3f} ± {row['alignment_error']:.3f}" + _claimed(row),
            "bias²": f"{max(0.0, row['bias2']):.3f}",
            "variance": f"{row['variance']:.2f}",
            "update·g": f"{row['cosine_with_gradient']:.2f}",
            "·AdamW": f"{row['cosine_with_adamw']:.2f}",
            "noise": f"{row['noise_over_mean']:.2f}",
        }
        for name, row in merged.items()
    ]
    return kept, done


def _claimed(row: dict[str, Any]) -> str:
    claim = row.get("claim")
    return "" if claim is None or claim != claim else f" ({claim:g})"


TITLES = ("State, and tests passed", "What becomes of the gradient")
EXPLANATION = (
    "State: elements for an m×n matrix, m ≤ n; over AdamW's 2mn for 512 × 1376 at r = 128 unless told otherwise. Verified by (a) identities, "
    "(b) a float64 transcription of the rule, (c) the published package side by side, (d) recorded runs of the published code: tests passed "
    "of all. Path: what the frame passes on of a mini-batch gradient, lifted back; its mean is ⟨E[X], g⟩/‖g‖² with what the method promises in "
    "brackets, bias² and variance are over ‖g‖². Update: what the weight gets after the nonlinearity; cosines of its mean with g and with "
    "AdamW's mean update, noise over its mean."
)


def section(rows: list[dict[str, Any]]) -> str:
    """For the report."""
    paths = [row for row in rows if row["kind"] == "path" and row.get("holds") is not None]
    states = [row for row in rows if row["kind"] == "state"]
    differing = [{"method": name, "variant and differences": differences(name)} for name in OPTIMIZERS]
    return (
        verdict(sum(bool(row["holds"]) for row in paths), len(paths), "promises about the mean of the gradient path")
        + verdict(sum(bool(row["holds"]) for row in states), len(states), "formulas for the bytes of live state tensors")
        + f"<p>{EXPLANATION} {checked()}</p>"
        + figure(lambda: figures_training.frames(rows),
                 "Left: what the frame passes on of a mini-batch gradient; the full gradient itself is adamw. Right: what is left after the "
                 "nonlinearity, against the state that is kept.")
        + "".join(f"<h3>{title}</h3>{table(told)}" for title, told in zip(TITLES, lines(rows), strict=True))
        + details_block("Where each deliberately differs from its published code", table(differing).replace("<td>", "<td class='text'>"))
    )  # fmt: skip


def markdown(results: Path = RESULTS) -> str:
    """For the README, from committed results."""
    folder = results / "optimizers"
    files = [file for kind in ("state", "path", "update") for file in sorted(folder.glob(f"*-{kind}.csv"))]
    if not files:
        return "not yet run"
    both = lines(row for file in files for row in pd.read_csv(file).to_dict("records"))  # pyright: ignore[reportArgumentType]
    return "\n\n".join([*map(_markdown, both), checked()]).rstrip()


def _markdown(told: list[dict[str, Any]]) -> str:
    head = ["| " + " | ".join(told[0]) + " |", "|" + "---|" * len(told[0])]
    return "\n".join([*head, *("| " + " | ".join(map(str, line.values())) + " |" for line in told)])
