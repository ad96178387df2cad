"""What ``lowrank ranks`` found, for terminal, report and results: spectra, angles, ranks, export, and the comparison; a figure of each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.pages import figures, page
from experiments.publish import RESULTS, committed_kinds

FIGURE = "ranks.svg"
COMMITTED = "tiny"
KINDS = ("spectrum", "tie", "angle", "rank", "budget", "export", "trial", "final", "paired")
LOOKS = {  # choice of ranks → colour, marker, dashes; from the palette of the laws
    "uniform": ("#0072B2", "s", "-"),
    "weights": ("#D55E00", "o", "--"),
    "gradients": ("#009E73", "^", ":"),
    "least_error": ("#CC79A7", "v", "-."),
}
INKS = (("#000000", "D"), ("#56B4E9", "P"), ("#8C510A", "X"))  # of numbers of directions
Frames = Mapping[str, pd.DataFrame]


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
            "over noise floor": "noise floor" if row["step"] == row["other"] else f"{row['relative']:.3f} ± {row['relative_se']:.3f}",
            "by chance": f"{row['chance']:.3f}",
        }
        for row in page.records(_all_layers(kinds))
    ]


def tie_lines(kinds: Frames) -> list[dict[str, str]]:
    """Effective ranks along the training, and whether those of weights and gradients go together."""
    spectrum, rows = kinds["spectrum"], []
    least = np.minimum(spectrum.m, spectrum.n)
    relative = (spectrum.effective_rank / least).groupby([spectrum.step, spectrum["of"]]).agg(["median", "min", "max"])
    for row in page.records(kinds["tie"]):
        told = {}
        for of in ("weights", "gradient"):
            found = relative.loc[(row["step"], of)]
            told[f"effective rank / min(m, n): {of}"] = f"{found['median']:.3f} ({found['min']:.3f}–{found['max']:.3f})"
        rows.append({"step": str(row["step"]), **told, "Spearman": f"{row['spearman']:+.2f} (p = {row['p']:.2g})"})
    return rows


def export_lines(kinds: Frames) -> list[dict[str, str]]:
    """Perplexity and bytes of every export."""
    return [
        {
            "reduction": f"{row['reduction']:g}",
            "ranks": row["by"],
            "numbers": f"{100 * row['numbers_share']:.1f} %",
            "lost ‖W‖²": f"{100 * row['lost_energy']:.2f} %",
            "perplexity whole (matrices zero)": f"{row['perplexity']:.1f} ({row['perplexity_zero']:.1f})",
            "truncated": f"{row['perplexity_truncated']:.2f}",
            "loss minus whole": f"{row['loss_minus_whole']:+.4f} ± {row['loss_minus_whole_se']:.4f}",
            "minus uniform": "" if row["by"] == "uniform" else f"{row['loss_minus_uniform']:+.4f} ± {row['loss_minus_uniform_se']:.4f}",
            "exported": f"{row['perplexity_exported']:.2f}",
            "factorised": f"{row['components']} of {row['layers']}",
            "bytes": f"{row['bytes'] / row['bytes_dense']:.3f}×",
        }
        for row in page.records(kinds["export"])
    ]


def contest_lines(kinds: Frames) -> list[dict[str, str]]:
    """Ranks at one budget, with the predicted error and what training made of it."""
    if "final" not in kinds:
        return []
    final, pairs = kinds["final"], page.records(kinds["paired"]) if "paired" in kinds else []
    edges = {(row["task"], row["label"]) for row in page.records(kinds["trial"]) if row["chosen"] and row["at_edge"]}
    lines = []
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


def findings(kinds: Frames) -> list[str]:
    """What the tables say, a sentence each, computed from the rows."""
    spectrum, ties = kinds["spectrum"], kinds["tie"].sort_values("step")
    relative = spectrum.effective_rank / np.minimum(spectrum.m, spectrum.n)
    middle = relative.groupby([spectrum["of"], spectrum.step]).median()
    first, last = int(ties.step.iloc[0]), int(ties.step.iloc[-1])
    told = [
        f"the median effective rank over min(m, n) goes from {middle['weights', first]:.2f} to {middle['weights', last]:.2f} in weights and from "
        f"{middle['gradient', first]:.2f} to {middle['gradient', last]:.2f} in gradients, where it is least at step "
        f"{middle['gradient'].idxmin()}; over layers the two correlate by {ties.spearman.iloc[-1]:+.2f} (p = {ties.p.iloc[-1]:.2g}) at the end"
    ]
    rows = _all_layers(kinds)
    for r, mine in rows[(rows.step < rows.other) & (rows.other == last)].groupby("directions"):
        shared = ", ".join(
            f"{row['relative']:.2f} at step {row['step']}" for row in page.records(pd.DataFrame(mine).sort_values(by=["step"]))
        )
        told.append(f"the {r} leading directions of the gradient share with those of the end, over the noise floor: {shared}")
    export = kinds["export"]
    for by in ("weights", "least_error"):
        mine = export[export.by == by]
        worse, better = ((sign * mine.loss_minus_uniform > 2 * mine.loss_minus_uniform_se).sum() for sign in (1, -1))
        told.append(
            f"truncated by {by.replace('_', ' ')}, the loss is above that of uniform ranks by more than two standard errors at {worse} of "
            f"{len(mine)} reductions, below at {better}"
        )
    for pair in page.records(kinds["paired"]) if "paired" in kinds else []:
        sure = "" if pair["low"] > 0 or pair["high"] < 0 else ", not told apart"
        told.append("{task}, ranks by {label} minus uniform ones: {of} {difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**pair) + sure)
    return told


TABLES = {
    "effective rank of weights and gradients, median (range) over layers, and their correlation over layers": tie_lines,
    "overlap of the leading gradient subspaces of mini-batches, mean over layers": angle_lines,
    "truncated and factorised": export_lines,
    "ranks at one budget": contest_lines,
}


def _all_layers(kinds: Frames) -> pd.DataFrame:
    return pd.DataFrame(kinds["angle"][kinds["angle"].layer == "all"])


def drawn(kinds: Frames) -> Figure:
    """Effective ranks and subspaces along the training, perplexity against numbers kept, and paired differences."""
    figures.style()
    figure, axes = plt.subplots(1, 4, figsize=(16.4, 3.7), width_ratios=(3, 3, 3, 2.6))
    _ranks_over_steps(axes[0], kinds)
    _angles_over_steps(axes[1], kinds)
    _exported(axes[2], kinds)
    _differences(axes[3], kinds)
    figure.tight_layout()
    return figure


def _ranks_over_steps(ax: Axes, kinds: Frames) -> None:
    """Every layer a thin line, their median thick; dashed and with triangles: gradients."""
    spectrum = kinds["spectrum"].assign(relative=kinds["spectrum"].effective_rank / kinds["spectrum"][["m", "n"]].min(axis=1))
    for of, look in (("weights", LOOKS["weights"]), ("gradient", LOOKS["gradients"])):
        mine = spectrum[spectrum["of"] == of]
        for _, group in mine.groupby("layer"):
            ax.plot(group.step, group.relative, look[2], color=look[0], linewidth=0.5, alpha=0.35)
        middle = mine.groupby("step").relative.median()
        ax.plot(middle.index, middle, color=look[0], marker=look[1], linestyle=look[2], linewidth=1.8, label=of)
    ax.set(xlabel="step", ylabel="effective rank / min(m, n)", title="Spectra", ylim=(0, None))
    ax.legend(frameon=False)


def _angles_over_steps(ax: Axes, kinds: Frames) -> None:
    """Overlap with the last moment over the noise floor, and with the next; bars are ±2 standard errors."""
    rows = _all_layers(kinds)
    last = rows.other.max()
    for place, (r, mine) in enumerate(rows[rows.step < rows.other].groupby("directions")):
        colour, marker = INKS[place % len(INKS)]
        for to, group, dashes in (
            ("last", mine[mine.other == last], "-"),
            ("next", pd.DataFrame(mine).sort_values(by="other").groupby("step").head(1), "--"),
        ):
            group = pd.DataFrame(group).sort_values(by="step")
            look = {"color": colour, "marker": marker, "linestyle": dashes, "capsize": 2, "markersize": 4.5}
            ax.errorbar(group.step, group.relative, 2 * group.relative_se, **look, label=f"r = {r}, {to} moment")
    ax.set(xlabel="step", ylabel="overlap / noise floor", title="Gradient subspaces", ylim=(0, None))
    ax.axhline(1, color="#000000", linewidth=0.8)
    ax.legend(frameon=False, fontsize=8)


def _exported(ax: Axes, kinds: Frames) -> None:
    """Loss that truncation adds against numbers of the factors over those of the matrices; bars are ±2 standard errors over sequences."""
    export = kinds["export"]
    for by, group in export.groupby("by", sort=False):
        colour, marker, dashes = LOOKS[str(by)]
        group = pd.DataFrame(group).sort_values(by="numbers_share")
        look = {"color": colour, "marker": marker, "linestyle": dashes, "capsize": 2, "markersize": 5}
        ax.errorbar(group.numbers_share, group.loss_minus_whole, 2 * group.loss_minus_whole_se, **look, label=str(by).replace("_", " "))
    ax.axhline(0, color="#000000", linewidth=0.8)
    ax.axvline(1, color="#7F7F7F", linewidth=0.8, linestyle=":")
    ax.set(xlabel="Σ r(m+n) / Σ mn", ylabel="loss minus that of the whole model (nats)", title="Truncated matrices")
    ax.legend(frameon=False)


def _differences(ax: Axes, kinds: Frames) -> None:
    """Loss minus that of uniform ranks, paired by seed, with 95 % intervals."""
    ax.set(title="Loss minus uniform, paired, 95 %", xlabel="nats")
    if "paired" not in kinds:
        ax.text(0.5, 0.5, "not compared", transform=ax.transAxes, ha="center")
        return
    rows = page.records(pd.DataFrame(kinds["paired"][kinds["paired"]["of"] == "loss"]))
    for place, row in enumerate(rows):
        colour, marker, _ = LOOKS[row["label"]]
        bar = [[row["difference"] - row["low"]], [row["high"] - row["difference"]]]
        ax.errorbar([row["difference"]], [place], xerr=bar, fmt=marker, color=colour, capsize=3, markersize=6)
    ax.axvline(0, color="#000000", linewidth=0.8)
    ax.set_yticks(range(len(rows)), [f"{row['task']}:\n{row['label']}" for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)


CAPTION = (
    "Left: every layer thin, the median thick. Second: how much of the leading subspace of a mini-batch gradient is shared with that of another "
    "mini-batch at another moment, over what two mini-batches of one moment share; bars ±2 standard errors (jackknife over mini-batches). Third: "
    "every matrix truncated, at equal numbers Σ r(m+n); bars ±2 standard errors over held-out sequences. "
    "Right: Student intervals over seeds; one that contains 0 shows no difference."
)


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


def markdown(name: str, results: Path = RESULTS) -> str:
    """For the results: the tables of a committed run."""
    kinds = committed_kinds(f"ranks/{name}", KINDS, results)
    if not kinds:
        return "not yet run"
    told = json.loads((results / "ranks" / f"{name}.json").read_text(encoding="utf-8"))
    config = told["config"]
    parts = [
        f"LLaMA `{config['model']}`, {config['steps']} steps of {config['sequences']} × {config['length']} tokens; {config['batches']} mini-batches "
        f"a moment; {config['law']}, K = {config['refresh_every']}, {len(config['seed'])} seeds; {told['environment']['device']}."
    ]
    parts += ["", *(f"- {line[0].upper()}{line[1:]}." for line in findings(kinds))]
    for title, lines in TABLES.items():
        if rows := lines(kinds):
            table = [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0]), *(f"| {' | '.join(row.values())} |" for row in rows)]
            parts += ["", f"{title[0].upper()}{title[1:]}:", "", *table]
    return "\n".join(parts)
