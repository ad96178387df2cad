"""The table of optimizers: what each keeps, does to the gradient, and how it was verified; for the terminal, the report and the README."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.pages import figures_training
from experiments.pages.nature import nature
from experiments.pages.page import details_block, figure, table, verdict
from experiments.publish import RESULTS
from experiments.validation.travelling import HOOKS
from optimizers import OPTIMIZERS

WAYS = {"a": "identities", "b": "transcription", "c": "published package", "d": "recorded run"}
ARXIV = re.compile(r"(\d{4}\.\d{5})")
CHECKS = RESULTS / "optimizers" / "checks.csv"


def paper(method: str) -> str:
    """arXiv id of a method, from its file."""
    found = ARXIV.search(_document(method))
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
    merged = by_method(rows)
    kept = [
        {
            "method": name,
            "arXiv": paper(name) if name in OPTIMIZERS else HOOKS.get(name, ""),
            "gradient": nature(name),
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
            "bias²": f"{row['bias2']:z.3f} ± {row['bias2_error']:.3f}",
            "variance": f"{row['variance']:.2f} ± {row['variance_error']:.2f}",
            "error": f"{row['mse']:.2f} ± {row['mse_error']:.2f}",
            "update·g": f"{row['cosine_with_gradient']:.2f} ± {row['cosine_with_gradient_error']:.2f}",
            "·AdamW": f"{row['cosine_with_adamw']:.2f} ± {row['cosine_with_adamw_error']:.2f}",
            "·Muon": _known(row, "cosine_with_muon"),
            "noise": f"{row['noise_over_mean']:.2f} ± {row['noise_over_mean_error']:.2f}",
        }
        for name, row in merged.items()
    ]
    return kept, done


def by_method(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """One row a method: of several layers, errors of the path summed over all of them, over Σ‖g‖², and the means of what there is of updates."""
    merged: dict[str, dict[str, Any]] = {}
    layers: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in (row for row in rows if row.get("kind") != "promise"):
        merged.setdefault(row["method"], {}).update(row)
        layers.setdefault((row["method"], "path" if "signal" in row else "update" if "cosine_with_adamw" in row else "state"), []).append(
            row
        )
    for (name, kind), some in layers.items():
        weights = [row["signal"] if kind == "path" else 1.0 for row in some]
        for key in some[0] if len(some) > 1 else ():
            if f"{key}_error" in some[0]:
                merged[name][key] = sum(w * row[key] for w, row in zip(weights, some, strict=True)) / sum(weights)
                squares = sum((w * row[f"{key}_error"]) ** 2 for w, row in zip(weights, some, strict=True))
                merged[name][f"{key}_error"] = squares**0.5 / sum(weights)
    return merged


def _known(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    return "" if value is None or value != value else f"{value:.2f} ± {row[f'{key}_error']:.2f}"


def _claimed(row: dict[str, Any]) -> str:
    claim = row.get("claim")
    return "" if claim is None or claim != claim else f" ({claim:g})"


TITLES = ("State, and tests passed", "What becomes of the gradient")
EXPLANATION = (
    "State: elements for an m×n matrix, m ≤ n; over AdamW's 2mn for 512 × 1376 at r = 128 unless told otherwise; GUM's bytes are as its "
    "coins fell, its ratio is the expected one. Verified by (a) identities, "
    "(b) a float64 transcription of the rule, (c) the published package side by side, (d) recorded runs of the published code: tests passed "
    "of all. Path: what the frame passes on of a mini-batch gradient, lifted back; its mean is ⟨E[X], g⟩/‖g‖² with what the method promises in "
    "brackets; bias², variance and their sum, the error, are over ‖g‖² (bias² is an unbiased estimate, and may come out below zero). Update: "
    "what the weight gets after the nonlinearity; cosines of its mean with g, with AdamW's mean update, and where the nonlinearity makes singular "
    "values equal also with Muon's, noise over its mean. Of several layers: "
    "errors are summed, over Σ‖g‖²; what is of updates are means over layers."
)


def section(rows: list[dict[str, Any]]) -> str:
    """For the report."""
    promises = [row for row in rows if row["kind"] == "promise"]
    states = [row for row in rows if row["kind"] == "state"]
    differing = [{"method": name, "variant and differences": differences(name)} for name in OPTIMIZERS]
    return (
        verdict(sum(bool(row["holds"]) for row in promises), len(promises), "promises about the mean of the gradient path")
        + verdict(sum(bool(row["holds"]) for row in states), len(states), "formulas for the bytes of live state tensors")
        + f"<p>{EXPLANATION} {checked()}</p>"
        + figure(lambda: figures_training.frames(by_method(rows)),
                 "Left: what the frame passes on of a mini-batch gradient; the full gradient itself is adamw. Right: what is left after the "
                 "nonlinearity, against the state that is kept.")
        + "".join(f"<h3>{title}</h3>{table(told)}" for title, told in zip(TITLES, lines(rows), strict=True))
        + details_block("Where each deliberately differs from its published code", table(differing))
    )  # fmt: skip


SOURCES = {"tiny": "On the gradients of a LLaMA in training (tiny)", "smollm2": "On the gradients of SmolLM2-135M"}


def markdown(results: Path = RESULTS) -> str:
    """For the README, from committed results: state and what was verified, then a table for each source of gradients."""
    folder = results / "optimizers"
    labels = sorted(
        {file.stem.removesuffix("-path") for file in folder.glob("*-path.csv")},
        key=lambda label: [*SOURCES].index(label) + 1 if label in SOURCES else 0,
    )
    if not labels:
        return "not yet run"
    parts: list[str] = []
    for label in labels:
        files = [folder / f"{label}-{kind}.csv" for kind in ("state", "path", "update")]
        kept, done = lines(row for file in files for row in pd.read_csv(file).to_dict("records"))  # pyright: ignore[reportArgumentType]
        config = json.loads((folder / f"{label}.json").read_text(encoding="utf-8"))["config"]
        parts += [] if parts else [_markdown(kept), checked()]
        title = SOURCES.get(label, "On synthetic gradients, a decaying spectrum and as much noise")
        parts += [
            f"{title}, r/m = {config['ratio']:g}, frames {config['period']} steps old, {config['draws']:,} replicas:",
            _markdown(done),
        ]
    return "\n\n".join(part for part in parts if part)


def _markdown(told: list[dict[str, Any]]) -> str:
    head = ["| " + " | ".join(told[0]) + " |", "|" + "---|" * len(told[0])]
    return "\n".join([*head, *("| " + " | ".join(map(str, line.values())) + " |" for line in told)])
