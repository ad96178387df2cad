"""What ``lowrank ranks`` found, for terminal, report and results: spectra, angles, ranks, export, and the comparison."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from estimators import LAWS
from experiments.pages import page
from experiments.pages.figures_ranking import CAPTION, Frames, all_layers, drawn, half
from experiments.publish import RESULTS, committed_kinds
from experiments.ranking import correlation

COMMITTED = "tiny"
KINDS = ("spectrum", "angle", "rank", "budget", "export", "trial", "final", "paired")


def frames(rows: Iterable[dict[str, Any]]) -> dict[str, pd.DataFrame]:
    """Rows by kind."""
    rows = list(rows)
    return {kind: pd.DataFrame(found) for kind in KINDS if (found := [row for row in rows if row["kind"] == kind])}


def angle_lines(kinds: Frames) -> list[dict[str, str]]:
    """Overlaps of gradient subspaces, mean over all layers."""
    return [
        {
            "steps": f"{row['step']}" if row["step"] == row["other"] else f"{row['step']} → {row['other']}",
            "directions": str(row["directions"]),
            "overlap": f"{row['overlap']:.3f} ± {row['overlap_se']:.3f}",
            "by chance": f"{row['chance']:.3f}",
            "above chance, over that of the noise floor": _relative(row),
            "median principal angle": f"{row['median_degrees']:.1f}°",
        }
        for row in page.records(all_layers(kinds))
    ]


def _relative(row: dict[str, Any]) -> str:
    if row["step"] == row["other"]:
        return "noise floor"
    return f"{row['relative']:.3f} ± {row['relative_se']:.3f}" if row["relative"] == row["relative"] else "noise floor at chance"


def _relative_ranks(kinds: Frames) -> dict[int, pd.DataFrame]:
    """Effective rank over min(m, n) of every layer, columns ``weights`` and ``gradient``, by step."""
    spectrum = kinds["spectrum"]
    found = spectrum.assign(relative=spectrum.effective_rank / np.minimum(spectrum.m, spectrum.n))
    return {int(cast(int, step)): mine.pivot(index="layer", columns="of", values="relative") for step, mine in found.groupby("step")}


def _together(ranks: pd.DataFrame) -> dict[str, Any]:
    return correlation.correlation(ranks["weights"], ranks["gradient"], list(ranks.index))


def _within(found: dict[str, Any]) -> str:
    return "no number" if math.isnan(found["within"]) else f"{found['within']:+.2f} (p = {found['p']:.2g} by permutation)"


def rank_lines(kinds: Frames) -> list[dict[str, str]]:
    """Effective ranks along the training, and whether those of weights and gradients go together."""
    rows = []
    for step, ranks in _relative_ranks(kinds).items():
        told = {
            f"effective rank / min(m, n): {of}": f"{ranks[of].median():.3f} ({ranks[of].min():.3f}–{ranks[of].max():.3f})"
            for of in ("weights", "gradient")
        }
        found = _together(ranks)
        rows.append({"step": str(step), **told, "Spearman, all layers": f"{found['pooled']:+.2f}", "within kinds": _within(found)})
    return rows


def export_lines(kinds: Frames) -> list[dict[str, str]]:
    """Perplexity and bytes of every export."""
    return [
        {
            "model": row["model"],
            "reduction": f"{row['reduction']:g}",
            "ranks": row["by"],
            "numbers": f"{100 * row['numbers_share']:.1f} %",
            "lost ‖W‖²": f"{100 * row['lost_energy']:.2f} %",
            "perplexity whole (matrices zero)": f"{_perplexity(row['perplexity'])} ({_perplexity(row['perplexity_zero'])})",
            "truncated": _perplexity(row["perplexity_truncated"]),
            "loss minus whole": f"{row['loss_minus_whole']:+.4f} ± {row['loss_minus_whole_se']:.4f}",
            "minus uniform": "" if row["by"] == "uniform" else f"{row['loss_minus_uniform']:+.4f} ± {row['loss_minus_uniform_se']:.4f}",
            "exported": _perplexity(row["perplexity_exported"]),
            "factorised": f"{row['components']} of {row['layers']}",
            "bytes": f"{row['bytes'] / 1e6:.2f} MB, {row['bytes'] / row['bytes_dense']:.3f}×",
        }
        for row in page.records(kinds["export"])
    ]


def _perplexity(value: float) -> str:
    """With decimals where these can be read; where float64 has no such number, that it is above the largest."""
    return f"{value:.2f}" if value < 1e5 else f"{value:.1e}" if value < math.inf else f">{sys.float_info.max:.1e}"


def contest_lines(kinds: Frames) -> list[dict[str, str]]:
    """Ranks at one budget, with the predicted error and what training made of it."""
    if "final" not in kinds:
        return []
    final, pairs = kinds["final"], page.records(kinds["paired"]) if "paired" in kinds else []
    edges, lines = _edges(kinds), []
    for row in page.records(kinds["budget"]):
        task, by = row["task"], row["by"]
        mine = final[(final.task == task) & (final.label == by)]
        rank = kinds["rank"][kinds["rank"].task == task][by]
        versus = {pair["of"]: pair for pair in pairs if (pair["task"], pair["label"]) == (task, by)}
        told = {
            "training": task,
            "ranks": by,
            "r": f"{rank.min()}–{rank.max()}",
            "bytes that grow with r": f"{row['bytes'] / 2**20:.2f} MiB",
            "error predicted": f"{row['error']:.2f} ± {row['error_se']:.2f}",
            "lr": f"{mine.lr.iloc[0]:g}" + (" (edge)" if (task, by) in edges else ""),
            "loss": f"{mine.loss.mean():.4f} ± {mine.loss.std() / len(mine) ** 0.5:.4f}",
        }
        for of in ("loss", "accuracy"):
            pair = versus.get(of)
            told[f"{of} minus uniform [95 %]"] = "{difference:+.4f} [{low:+.4f}, {high:+.4f}]".format(**pair) if pair else ""
        lines.append(told)
    return lines


def _edges(kinds: Frames) -> set[tuple[str, str]]:
    """Tasks and ranks whose learning rate is the smallest or largest of those tried."""
    trials = page.records(kinds["trial"]) if "trial" in kinds else []
    return {(row["task"], row["label"]) for row in trials if row["chosen"] and row["at_edge"]}


def findings(kinds: Frames) -> list[str]:
    """What the tables say, a sentence each, computed from the rows."""
    ranks = _relative_ranks(kinds)
    middle = pd.DataFrame({step: found.median() for step, found in ranks.items()}).T
    first, last = min(ranks), max(ranks)
    end = _together(ranks[last])
    told = [
        f"the median effective rank over min(m, n) goes from {middle.weights[first]:.2f} to {middle.weights[last]:.2f} in weights and from "
        f"{middle.gradient[first]:.2f} to {middle.gradient[last]:.2f} in gradients, where it is least at step {middle.gradient.idxmin()}",
        f"at the end effective ranks of weights and gradients correlate by {end['pooled']:+.2f} over all {end['layers']} layers, where the "
        f"{end['kinds']} kinds of layers are mixed, and within kinds by {_within(end)}",
    ]
    return [*told, *_shared(kinds, last), *_truncated(kinds), *_exported(kinds), *_compared(kinds), page.uncorrected(_intervals(kinds))]


def _shared(kinds: Frames, last: int) -> list[str]:
    """How much of its leading subspace the gradient shares with that of the end."""
    rows, told = all_layers(kinds), []
    for r, mine in rows[(rows.step < rows.other) & (rows.other == last)].groupby("directions"):
        shared = ", ".join(f"{_relative(row)} at step {row['step']}" for row in page.records(pd.DataFrame(mine).sort_values(by=["step"])))
        told.append(
            f"the {r} leading directions of the gradient share with those of the end, above chance and over that of the noise floor: {shared}"
        )
    return told


def _truncated(kinds: Frames) -> list[str]:
    """Every choice of ranks against uniform ones."""
    told = []
    for one, mine in kinds["export"].query("by != 'uniform'").groupby(["model", "by"], sort=False):
        model, by = cast(tuple[str, str], one)
        worse, better = ((sign * mine.loss_minus_uniform > half(mine, "loss_minus_uniform")).sum() for sign in (1, -1))
        told.append(
            f"truncated by {_words(by)}, {model} has a loss above that of uniform ranks at {worse} of {len(mine)} reductions, below at {better}, by "
            "Student's 95 % intervals over held-out sequences"
        )
    return told


def _exported(kinds: Frames) -> list[str]:
    """Every model as it was written: at the first and the last reduction of every choice of ranks."""
    told = []
    for model, mine in kinds["export"].groupby("model", sort=False):
        reductions = [mine.reduction.min(), mine.reduction.max()]
        ends = pd.DataFrame(mine[mine.reduction.isin(reductions)]).sort_values(by=["reduction"])
        each = ends.assign(half=half(ends, "exported_minus_whole"), share=ends.bytes / ends.bytes_dense).groupby("by", sort=False)
        said = "; ".join(
            f"{_words(str(by))} "
            + " to ".join(f"{row['exported_minus_whole']:+.4f} ± {row['half']:.4f} ({row['share']:.3f}×)" for row in page.records(group))
            for by, group in each
        )
        at = " to ".join(f"{one:g}" for one in dict.fromkeys(reductions))
        told.append(
            f"exported at reduction {at}, loss of {model} minus that of the whole model, ± half of Student's 95 % interval over held-out sequences "
            f"(bytes over those of the whole): {said}"
        )
        shares = mine.groupby("reduction").numbers_share.max()
        if larger := ", ".join(f"{reduction:g} ({share:.2f}×)" for reduction, share in shares[shares > 1].items()):
            told[-1] += f"; at {larger} the factors of all matrices hold more numbers than these, and truncating compresses nothing"
    return told


def _compared(kinds: Frames) -> list[str]:
    """Every choice of ranks against uniform ones in training."""
    if "paired" not in kinds:
        return []
    edges, told = _edges(kinds), []
    rates = {(row["task"], row["label"]): row["lr"] for row in page.records(kinds["final"])}
    for pair in page.records(kinds["paired"]):
        both = [(pair["task"], label) for label in (pair["label"], "uniform")]
        mine, other = (" (edge)" if one in edges else "" for one in both)
        lr = [f"{rates[one]:g}" for one in both]
        apart = f", at learning rates {lr[0]} and {lr[1]}" if lr[0] != lr[1] else ""
        sure = "" if pair["low"] > 0 or pair["high"] < 0 else ", not told apart"
        told.append(
            "{task}, ranks by {label}{mine} minus uniform ones{other}{apart}: {of} {difference:+.3f} [{low:+.3f}, {high:+.3f}]{sure}".format(
                **pair, mine=mine, other=other, apart=apart, sure=sure
            )
        )
    return told


def _intervals(kinds: Frames) -> int:
    """Of differences to uniform ranks, truncated and in training."""
    return int((kinds["export"].by != "uniform").sum()) + (len(kinds["paired"]) if "paired" in kinds else 0)


def _words(by: str) -> str:
    return by.replace("_", " ")


TABLES = {
    "effective rank of weights and gradients, median (range) over layers, and their correlation over layers": rank_lines,
    "overlap of the leading gradient subspaces of mini-batches, mean over layers": angle_lines,
    "truncated and factorised, ± standard error over held-out sequences": export_lines,
    "ranks at one budget": contest_lines,
}


def section(rows: list[dict[str, Any]]) -> str:
    """Of the report."""
    kinds = frames(rows)
    text = page.figure(lambda: drawn(kinds), CAPTION)
    text += f"<ul>{''.join(f'<li>{page.html.escape(line)}</li>' for line in findings(kinds))}</ul>"
    for title, lines in TABLES.items():
        if told := lines(kinds):
            text += f"<h3>{title[0].upper()}{title[1:]}</h3>" + page.table(told)
    if "rank" in kinds:
        text += page.details_block("Every layer", page.table(page.records(kinds["rank"].drop(columns="kind"))))
    return text + (page.details_block("Tuning", page.table(page.records(kinds["trial"].drop(columns="kind")))) if "trial" in kinds else "")


def asked(config: dict[str, Any]) -> str:
    """What was trained and compared, and how far a step went at each rank, in some sentences."""
    c = config["c"] if config["c"] == "r/n" else f"{config['c']:g}"
    shorter = config["c"] == "r/n" or not LAWS[config["law"]].unbiased  # a biased law has V = √c·Q
    told = (
        f"LLaMA `{config['model']}`, {config['steps']} steps of {config['sequences']} × {config['length']} tokens; {config['batches']} mini-batches "
        f"a moment; {config['law']}, c = {c}, K = {config['refresh_every']}, {page.many(config['seed'], 'seed')}. "
    )
    if not config["tasks"]:
        return told
    told += (
        f"Every choice of ranks tries {len(config['lr'])} learning rates in pre-training, in runs of {config['tune_steps']} steps, and "
        f"{len(config['finetune_lr'])} in fine-tuning, of {config['finetune_steps']}, and {config['further']} more where the search leads. "
    )
    if not shorter:
        return told + "In these a step of Adam moved a layer by about η√(c·mn), as far at every rank."
    length = "η√(mr)" if c == "r/n" else "η√(c·mr)"
    return told + (
        f"In these a step of Adam moved a layer by about {length}: layers of smaller rank took shorter steps, and ranks are not all that differs."
    )


def markdown(name: str, results: Path = RESULTS) -> str:
    """For the results: the tables of a committed run."""
    kinds = committed_kinds(f"ranks/{name}", KINDS, results)
    if not kinds:
        return "not yet run"
    told = json.loads((results / "ranks" / f"{name}.json").read_text(encoding="utf-8"))
    parts = [f"{asked(told['config']).strip()} Device: {told['environment']['device']}."]
    parts += ["", *(f"- {line[0].upper()}{line[1:]}." for line in findings(kinds))]
    for title, lines in TABLES.items():
        if rows := lines(kinds):
            table = [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0]), *(f"| {' | '.join(row.values())} |" for row in rows)]
            parts += ["", f"{title[0].upper()}{title[1:]}:", "", *table]
    return "\n".join(parts)
