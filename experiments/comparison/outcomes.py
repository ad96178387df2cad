"""What a comparison found: the choice of tuning, the loss of every run, paired differences, and curves, as rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from estimators.transport import Second
from experiments import pretrain
from experiments.comparison import search, spikes
from experiments.training import gradinit
from experiments.training.config import Init
from experiments.training.methods import METHODS

GIVEN = {"second_moment": None, "init": "plain", "coupled": 0.0}  # what a contender can have beside its method's choices, and none of it
TAIL = 0.2  # share of the steps whose training loss decides the tuning


@dataclass(frozen=True)
class Contender:
    """One row of the comparison. ``label``: a law or a baseline, with rank, K and c where these vary; None: there is none, or it is tuned."""

    label: str
    method: str
    law: str | None
    rank: float | None
    refresh_every: int | None
    c: float | None
    second_moment: Second | None = None
    init: Init = "plain"
    coupled: float = 0.0

    @property
    def levels(self) -> tuple[Any, ...]:
        """Where it stands on each axis of the grid."""
        return (self.law or self.method, self.rank, self.refresh_every, self.c, self.second_moment, self.init, self.coupled)

    @property
    def base(self) -> tuple[Any, ...]:
        """The same without what a method can be given beside its own choices."""
        return self.levels[:4]


def tuned(one: Contender, trials: Sequence[pretrain.Config]) -> list[dict[str, Any]]:
    """One row a trial: its mean training loss over the last fifth, whether it was chosen, and whether its learning rate is the last of the grid."""
    return [{"kind": "trial", **_names(one, trial), **found} for trial, found in zip(trials, search.judged(trials, tail), strict=True)]


def tail(trial: pretrain.Config) -> float:
    """Mean training loss over the last fifth of a tuning run; infinite if it diverged."""
    run = pretrain.opened(trial)
    losses = [row["loss"] for row in run.rows() if row["kind"] == "train"][-max(1, int(TAIL * trial.steps)) :]
    return float(np.mean(losses)) if run.done and losses else float("inf")  # a short run may end with every step skipped


def final(one: Contender, cell: pretrain.Config) -> dict[str, Any]:
    """Loss, costs and sizes of one compared run; an infinite loss if it diverged."""
    run = pretrain.opened(cell)
    if not run.done:
        return {"kind": "final", **_names(one, cell), "seed": cell.seed, "steps": cell.steps, "loss": float("inf")}
    rows = run.rows()
    (end,) = (row for row in rows if row["kind"] == "end")
    (held_out,) = (row for row in rows if row["kind"] == "eval" and row["step"] == cell.steps)
    facts = run.read("facts.json")
    return {
        "kind": "final",
        **_names(one, cell),
        "seed": cell.seed,
        "steps": cell.steps,
        "loss": held_out["loss"],
        "perplexity": held_out["perplexity"],
        **{name: end[name] for name in ("seconds", "tokens_per_second", "peak_bytes", "state_bytes", "fitting_bytes", "measuring_share")},
        **{name: facts[name] for name in ("parameters", "trained_parameters", "touched_share")},
    }


def _names(one: Contender, cell: pretrain.Config) -> dict[str, Any]:
    needs = METHODS[one.method].needs
    knobs = {name: getattr(cell, name) if name in needs else None for name in ("rank", "refresh_every", "c", "lora_scale")}
    given = {name: getattr(one, name) for name, plain in GIVEN.items() if getattr(one, name) != plain}
    return {"label": one.label, "method": one.method, "law": one.law, "lr": cell.lr, **knobs, **given}


def spiked(one: Contender, cell: pretrain.Config, window: int) -> dict[str, Any] | None:
    """What the redraws of one compared run did to its training loss (spikes.py); None for a method without; infinite if the run diverged."""
    if one.refresh_every is None:
        return None
    run = pretrain.opened(cell)
    losses = [row["loss"] if row["kind"] == "train" else float("inf") for row in run.rows() if row["kind"] in ("train", "skip")]
    losses += [float("inf")] * (cell.steps - len(losses))
    return {"kind": "spike", **_names(one, cell), "seed": cell.seed, **spikes.measured(losses, one.refresh_every, window)}


def initial(one: Contender, cell: pretrain.Config) -> dict[str, Any] | None:
    """What GradInit found for one compared run: range of the scales, loss after a virtual step before and after; None where it was not asked."""
    run = pretrain.opened(cell)
    if cell.init == "plain" or not (run.path / gradinit.FILE).exists():
        return None
    found = run.read(gradinit.FILE)
    scales = found.pop("scales").values()
    return {"kind": "init", **_names(one, cell), "seed": cell.seed, "smallest": min(scales), "largest": max(scales), **found}


def references(everyone: Sequence[Contender]) -> dict[str, list[str]]:
    """With whom each contender is paired, by labels: full AdamW, and those who differ from it on one axis of the grid only, where they
    have the reference value: Haar–Stiefel among the laws, the first listed r, K, c, and what is given beside. Other baselines: with Haar–Stiefel at
    all these; and with themselves, given the first listed."""
    laws = [one for one in everyone if one.law is not None]
    standard = ("haar_stiefel", *laws[0].levels[1:]) if laws else ()

    def beside(one: Contender, other: Contender) -> bool:
        differing = [axis for axis, (a, b) in enumerate(zip(one.levels, other.levels, strict=True)) if a != b]
        return other.law is not None and len(differing) == 1 and other.levels[differing[0]] == standard[differing[0]]

    def against(one: Contender) -> list[str]:
        baseline = [other for other in everyone if other.method == "adamw" != one.method][:1]
        if one.law is None:
            first = next(other for other in everyone if other.base == one.base)
            neighbours = [other for other in everyone if other.levels == standard and one.method != "adamw"]
            neighbours += [first] if first != one else []
        else:
            neighbours = [other for other in everyone if beside(one, other)]
        return [other.label for other in (*baseline, *neighbours)]

    return {one.label: against(one) for one in everyone}


def paired(finals: Iterable[dict[str, Any]], references: Mapping[str, Sequence[str]], of: str = "loss") -> list[dict[str, Any]]:
    """Mean difference of one column, the held-out loss or another, in pairs of equal seed, contender minus reference, with standard error and 95 %
    interval (Student).

    With one seed there is no standard error.
    """
    table: dict[str, dict[int, float]] = {}
    for row in finals:
        table.setdefault(row["label"], {})[row["seed"]] = row[of]
    return [
        {"kind": "paired", "label": label, "reference": reference, **difference(losses, table[reference])}
        for label, losses in table.items()
        for reference in references[label]
    ]


def student(n: Any) -> Any:
    """Half of Student's 95 % interval of a mean of ``n`` values, over its standard error; NaN for one value. Numbers or arrays."""
    return stats.t.ppf(0.975, n - 1)


def difference(losses: Mapping[int, float], reference: Mapping[int, float]) -> dict[str, Any]:
    """Mean over the seeds of loss minus reference, standard error and the bounds of Student's 95 % interval."""
    differences = np.array([losses[seed] - reference[seed] for seed in losses])
    n, mean = len(differences), float(differences.mean())
    error = float(differences.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    half = float(student(n)) * error
    return {"seeds": n, "difference": mean, "standard_error": error, "low": mean - half, "high": mean + half}


def curves(compared: dict[Contender, list[pretrain.Config]]) -> list[dict[str, Any]]:
    """Held-out loss along the way, mean and standard error over seeds, against tokens and seconds of training."""
    rows = []
    for one, cells in compared.items():
        points: dict[int, list[dict[str, Any]]] = {}
        for cell in cells:
            for row in pretrain.opened(cell).rows():
                if row["kind"] == "eval":
                    points.setdefault(row["step"], []).append(row)
        for step, found in sorted(points.items()):
            losses = np.array([row["loss"] for row in found])
            error = float(losses.std(ddof=1) / np.sqrt(len(losses))) if len(losses) > 1 else float("nan")
            means = {name: float(np.mean([row[name] for row in found])) for name in ("trained_tokens", "seconds", "loss")}
            rows.append({"kind": "curve", "label": one.label, "step": step, **means, "standard_error": error, "seeds": len(losses)})
    return rows
