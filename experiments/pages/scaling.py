"""A scaling law as tables: its parameters, how well it lies, tokens saved inside the runs and extrapolated; for the terminal, report and README."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments import runs
from experiments.pages import figures_scaling
from experiments.pages.page import details_block, figure, records, table
from experiments.publish import RESULTS
from experiments.training import models

NAMES = ("cpu", "short", "gpu")  # committed, or not yet run
KINDS = ("trial", "point", "parameter", "quality", "tokens", "check")
REFERENCE = figures_scaling.REFERENCE
BEYOND = 1e6
GREEK = {"alpha": "α", "beta": "β", "rho_N": "ρ_N", "rho_D": "ρ_D"}
Rows = list[dict[str, Any]]


def factors(kinds: dict[str, pd.DataFrame]) -> Rows:
    """One line a method: its factors in every variant, and its learning rates from the smallest size to the largest."""
    parameter, rates = kinds["parameter"], _rates(kinds)
    lines: Rows = []
    for label in dict.fromkeys(kinds["point"]["label"]):
        line: dict[str, Any] = {"method": label}
        for variant in dict.fromkeys(parameter.variant):
            for name in ("rho_N", "rho_D"):
                mine = parameter[(parameter.variant == variant) & (parameter["name"] == name)]
                if len(mine):
                    row = next((row for row in records(pd.DataFrame(mine)) if row["label"] == label), None)
                    line[f"{GREEK[name]}{'' if variant == 'N and D' else ' alone'}"] = (
                        "1" if row is None else _interval(row, "value", "low", "high")
                    )
        lines.append(line | {"learning rates": rates.get(str(label), "")})
    return lines


def saved(kinds: dict[str, pd.DataFrame]) -> Rows:
    """One line a method, one column a place: the largest number of tokens of every size, and what is extrapolated, which says so."""
    if "tokens" not in kinds:
        return []
    rows = kinds["tokens"]
    last = rows.loc[rows.groupby(["model", "label"], sort=False).tokens.idxmax()].sort_values(["extrapolated", "weights"])
    lines = []
    for label in dict.fromkeys(rows.label):
        line = {"method": str(label)}
        for row in records(last[last.label == label]):
            place = f"{row['model']}, {figures_scaling.amount(row['tokens'])} tokens{' (extrapolated)' if row['extrapolated'] else ''}"
            seen = "" if math.isnan(row["interpolated"]) or label == REFERENCE else f"; {row['interpolated']:.2f} without a law"
            loss = f"1, loss {row['loss']:.3f} [{row['loss_low']:.3f}, {row['loss_high']:.3f}]"
            line[place] = loss if label == REFERENCE else _interval(row, "saved", "saved_low", "saved_high") + seen
        lines.append(line)
    return lines


def shared(kinds: dict[str, pd.DataFrame]) -> Rows:
    """One line a variant: E, A, B and the exponents with their intervals."""
    lines = []
    for variant, group in kinds["parameter"].groupby("variant", sort=False):
        mine = [row for row in records(group) if not row["name"].startswith("rho")]
        lines.append({"factors": variant} | {GREEK.get(row["name"], row["name"]): _interval(row, "value", "low", "high") for row in mine})
    return lines


def verdict(kinds: dict[str, pd.DataFrame]) -> str:
    """Whether the law that tokens are reported of describes its runs, in a sentence; nothing where equal runs do not tell."""
    row = next(row for row in records(kinds["quality"]) if row["chosen"])
    if math.isnan(row["seed_spread"]):
        return ""
    if row["lack_of_fit_p"] >= 0.05:
        return "The law describes these runs as well as their seeds agree."
    return "**The law does not describe these runs**: what follows is what it says, not what is so; between runs alone is the ratio without a law."


def told(kinds: dict[str, pd.DataFrame]) -> list[str]:
    """Whether the law explains its runs, in sentences with their numbers."""
    lines = []
    for row in records(kinds["quality"]):
        text = (
            f"Law with factors of {row['variant']}{' (tokens are of this one)' if row['chosen'] else ''}: {row['points']} runs, {row['parameters']} "
            f"parameters; explains {100 * row['explained']:.2f} % of the variance of ln L; runs lie {100 * row['spread']:.2f} % about it (largest "
            f"{100 * row['largest_residual']:+.1f} %: {row['largest_at']})"
        )
        if not math.isnan(row["seed_spread"]):
            verdict = "more than seeds explain, the law does not describe them fully" if row["lack_of_fit_p"] < 0.05 else "as seeds explain"
            test = f"F = {row['lack_of_fit_F']:.1f}, p = {row['lack_of_fit_p']:.2g}"
            text += f", seeds {100 * row['seed_spread']:.2f} % about each other: {verdict} ({test})"
        text += f". δ = {row['delta']:.2g}, {row['resamples']} resamples."
        if row["left_out"]:
            text += f" {row['left_out']} runs diverged and are left out."
        if isinstance(row["doubts"], str) and row["doubts"]:
            text += f" In doubt: {row['doubts']}."
        lines.append(text)
    if "check" in kinds:
        for what, group in kinds["check"].groupby("held_back", sort=False):
            off = group.measured - group.predicted
            lines.append(
                f"Fitted without the {what} and asked for it: {int(group.inside.astype(bool).sum())} of {len(group)} mean losses lie inside the 95 % "
                f"interval; measured minus predicted is {off.mean():+.3f} nats on average, {off.iloc[off.abs().argmax()]:+.3f} at most."
            )
    return lines


def asked(config: dict[str, Any]) -> str:
    """What was trained."""
    if config.get("results"):
        return f"Last losses of {', '.join(f'compare/{name}' for name in config['results'])}."
    first, tokens = config["model"][0], ", ".join(f"{tokens:,}" for tokens in config["tokens"])
    tuned = (
        f"tuned for every method at every size on {config['tune_tokens']:,} tokens: {config['trials']} at {first}, from the method's default on, "
        "then 4 from what the size before chose on, by the mean training loss of the last fifth, with a seed that is not compared"
    )
    rates = "given" if config["lr"] else f"those of compare/{config['searched']}" if config["searched"] else tuned
    other = f"; embeddings, head and norms at {config['other_lr']:g} for everyone" if config["other_lr"] else ""
    most = config.get("compute")
    within = f" as far as 6ND ≤ {most:g}," if most else ""
    sizes = ", ".join(f"{name} ({models.parameters(name):,} weights)" for name in config["model"])
    return (
        f"{sizes}; {tokens} tokens of {config['data']}{within} in steps of {config['sequences']} × {config['length']}, each run with its own "
        f"schedule; r/n = {config['rank']:g}, K = {config['refresh_every']}, seeds {', '.join(map(str, config['seed']))}. Peak learning rates of the "
        f"matrices: {rates}{other}. N counts all weights, embeddings and head included."
    )


def section(run: runs.Run, rows: Rows) -> str:
    """For the report."""
    kinds = {kind: pd.DataFrame([row for row in rows if row["kind"] == kind]) for kind in KINDS if any(row["kind"] == kind for row in rows)}
    text = f"<p>{html.escape(asked(run.config))}</p><p>{html.escape(verdict(kinds).replace('**', ''))}</p>" + table(factors(kinds))
    text += "".join(f"<p>{html.escape(line)}</p>" for line in told(kinds))
    text += table(shared(kinds)) + table(saved(kinds)) + figure(lambda: figures_scaling.scaling(kinds), figures_scaling.CAPTION)
    for kind, title in (("check", "Runs held back"), ("point", "Every run"), ("trial", "Tuning")):
        if kind in kinds:
            text += details_block(title, table(records(kinds[kind].drop(columns="kind"))))
    return text


def committed(name: str, results: Path = RESULTS) -> dict[str, pd.DataFrame]:
    """The rows of a committed law by kind; nothing if it was not run."""
    files = {kind: results / "scaling" / f"{name}-{kind}.csv" for kind in KINDS}
    return {kind: pd.read_csv(file) for kind, file in files.items() if file.exists()}


def markdown(name: str, results: Path = RESULTS) -> str:
    """Everything, for the results."""
    kinds = committed(name, results)
    if not kinds:
        return "not yet run"
    config = json.loads((results / "scaling" / f"{name}.json").read_text(encoding="utf-8"))["config"]
    parts = [
        f"Figure: {figures_scaling.CAPTION}",
        asked(config),
        *([verdict(kinds)] if verdict(kinds) else []),
        _markdown(factors(kinds)),
        *told(kinds),
        _markdown(shared(kinds)),
        _markdown(saved(kinds)),
    ]
    return "\n\n".join(parts)


def short(name: str, results: Path = RESULTS) -> str:
    """For the README: the factors, how well the law lies, tokens saved."""
    kinds = committed(name, results)
    if not kinds:
        return "not yet run"
    alone = ["Where ρ_D alone is free, ρ_N = 1, it is one number for all sizes, and so is what the law says of tokens."]
    alone = alone if figures_scaling.chosen(kinds["quality"]) == "D" else []
    parts = [verdict(kinds), _markdown(factors(kinds)), *told(kinds), *alone, _markdown(saved(kinds)), f"Figure: {figures_scaling.CAPTION}"]
    return "\n\n".join(part for part in parts if part)


def figure_of(name: str, results: Path = RESULTS) -> Figure | None:
    """The figure of a committed law; None if it is not there."""
    kinds = committed(name, results)
    return figures_scaling.scaling(kinds) if kinds else None


def _rates(kinds: dict[str, pd.DataFrame]) -> dict[str, str]:
    """Learning rates by size, in order; a star marks one at the end of those tried."""
    trial = kinds.get("trial", pd.DataFrame())
    edges = {(row["label"], row["model"]) for row in records(trial) if row["chosen"] in (True, "True") and row["at_edge"] in (True, "True")}
    found: dict[str, list[str]] = {}
    for row in records(kinds["point"].drop_duplicates(["label", "model"])):
        found.setdefault(str(row["label"]), []).append(f"{row['lr']:g}{'*' if (row['label'], row['model']) in edges else ''}")
    return {label: ", ".join(rates) for label, rates in found.items()}


def _interval(row: dict[str, Any], value: str, low: str, high: str) -> str:
    return f"{_number(row[value])} [{_number(row[low])}, {_number(row[high])}]"


def _number(value: float) -> str:
    """To three digits; beyond ``BEYOND`` a fit says no more than that it has no end."""
    return "unbounded" if value > BEYOND else "0" if 0 <= value < 1 / BEYOND else f"{value:.3g}"


def _markdown(lines: Rows) -> str:
    head = list(lines[0])
    return "\n".join(
        [
            f"| {' | '.join(head)} |",
            "|---" * len(head) + "|",
            *(f"| {' | '.join(str(line.get(name, '')) for name in head)} |" for line in lines),
        ]
    )
