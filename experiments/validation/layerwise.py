"""Validation on the gradients of a model: predicted against measured error of every law, layer by layer and summed, and their order."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from estimators import Population, keyed, measure
from estimators.law import Law, Spectrum
from estimators.selection import rank_of
from experiments import runs
from experiments.text import batches
from experiments.training import models
from experiments.validation.checks import exact
from experiments.validation.contenders import contenders
from experiments.validation.gradients import Statistics, linear_layers, populations, statistics
from experiments.validation.verdict import WIDTH, Z_LIMIT, Verdict, student
from theory import mse, optimal

if TYPE_CHECKING:
    from experiments.validate import Config


def validate(config: Config, run: runs.Run) -> None:
    """Rows: ``gradient`` a layer, law and rank; ``layer`` a layer; ``model`` a law and rank; ``order`` a claim and rank."""
    device = runs.device("auto")
    rows = run.rows()
    finished = {row["layer"] for row in rows if row["kind"] == "layer"}
    run.keep([row for row in rows if row.get("layer") in finished])  # what an interrupted layer or summary left behind goes
    if config.model == "tiny":
        model, text = models.tiny(run, seed=config.seed, steps=config.steps, lr=config.lr, quiet=config.quiet, device=device)
        stream = text.training
    else:
        model, stream = models.smollm2()
    model.to(device).eval()  # pyright: ignore[reportArgumentType]
    names = [name for name in linear_layers(model) if name not in finished]

    def batch(i: int) -> Tensor:
        return batches.batch(stream, config.seed, "gradients", i, config.affordable("sequences"), config.length)

    with (
        runs.progress(0, "backward passes", config.quiet) as passes,
        runs.progress(len(names), "layers", config.quiet) as bar,
    ):
        for name, population in populations(model, batch, config.batches, names=names, tick=passes.update):
            bar.set_postfix_str(name)
            _layer(config, run, name, population)
            bar.update()
    for row in _aggregate(config, run.rows()):
        run.log(row)


def _layer(config: Config, run: runs.Run, name: str, population: Tensor) -> None:
    """Predicted and measured error of every law on one layer, written at once when complete, the layer's own row last."""
    rows = []
    facts = statistics(population)
    measurable = Population(population)
    spectrum = Spectrum(*(torch.from_numpy(a).to(population.device) for a in (facts.spectrum, facts.basis)))
    _, m, n = population.shape
    for ratio, contender in itertools.product(config.ratio, contenders(config.law, config.keep)):
        rank = rank_of(n, ratio)
        law = contender.fit(spectrum, rank, config.c)
        generator = keyed.generator(config.seed, f"{name} {contender.label} {rank}", 0, population.device)
        measured = measure(law, measurable, config.affordable("draws"), generator=generator, track_mean=False)
        rows.append(
            {"kind": "gradient", "layer": name, "law": contender.label, "n": n, "rank": rank, "ratio": ratio}
            | _predicted(law, facts)
            | {
                "measured": measured.mse.value,
                "standard_error": measured.mse.standard_error,
                "alignment": measured.alignment.value,
                "alignment_error": measured.alignment.standard_error,
            }
        )
    run.log(*rows, {"kind": "layer", "layer": name, "m": m, "n": n, "draws": config.draws} | facts.summary())


def _predicted(law: Law, facts: Statistics) -> dict[str, Any]:
    truth = exact(law)
    parts = mse.ipa(truth, facts.noise, facts.signal)
    best = optimal.best_scale(truth.square / law.c**2, facts.signal, facts.second) if truth.unbiased else None
    return {
        "predicted": parts.total,
        "projection": parts.projection,
        "noise": parts.noise,
        "bias": parts.bias,
        "alignment_theory": parts.alignment,
        "signal_norm2": parts.signal,
        "unbiased": truth.unbiased,
        "best_c": best,
        "mse_at_best_c": None if best is None else parts.signal * (1 - best),
    }


def verdict_of(row: dict[str, Any], required: float, draws: float = math.inf) -> Verdict:
    """The measured error of a ``gradient`` or ``model`` row as a verdict; ``draws`` behind its standard error."""
    return Verdict(
        name=f"{row['law']} r/n={row['ratio']:g}",
        estimate=row["measured"],
        standard_error=row["standard_error"],
        theory=row["predicted"],
        scale=max(row["predicted"], FLOAT32 * row["signal_norm2"]),
        required=required,
        draws=draws,
    )


def alignment_of(row: dict[str, Any], required: float, draws: float = math.inf) -> Verdict:
    """⟨E[estimate], g⟩/‖g‖² of a ``gradient`` or ``model`` row as a verdict: c for every unbiased law."""
    return Verdict(
        name=f"{row['law']} r/n={row['ratio']:g} alignment",
        estimate=row["alignment"],
        standard_error=row["alignment_error"],
        theory=row["alignment_theory"],
        scale=max(abs(row["alignment_theory"]), 0.01),
        required=required,
        draws=draws,
    )


ALIGNMENT = 10  # how much coarser a layer's alignment may be than its error: gradient noise, not the law, rules its spread
FLOAT32 = 1e-5  # relative rounding of gradients measured in float32; the scale when the predicted error is zero

ORDER = (  # (at most, at least, whether equality is claimed)
    ("spectral", "haar_stiefel", False),
    ("haar_stiefel", "coordinate", True),
    ("haar_stiefel", "gaussian", False),
)


def _aggregate(config: Config, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Errors summed over the layers, and the expected order of the laws as differences with standard errors."""
    cells = {(row["layer"], row["law"], row["ratio"]): row for row in rows if row["kind"] == "gradient"}
    signal = sum({row["layer"]: row["signal_norm2"] for row in cells.values()}.values())
    totals: dict[tuple[str, float], dict[str, Any]] = {}
    for contender, ratio in itertools.product(contenders(config.law, config.keep), config.ratio):
        mine = [row for (_, law, at), row in cells.items() if law == contender.label and at == ratio]
        total = {
            "kind": "model",
            "law": contender.label,
            "ratio": ratio,
            "layers": len(mine),
            "unbiased": all(row["unbiased"] for row in mine),
            "signal_norm2": signal,
            "measured": math.fsum(row["measured"] for row in mine),
            "predicted": math.fsum(row["predicted"] for row in mine),
            "standard_error": math.sqrt(math.fsum(row["standard_error"] ** 2 for row in mine)),
            "alignment": math.fsum(row["alignment"] * row["signal_norm2"] for row in mine) / signal,
            "alignment_theory": math.fsum(row["alignment_theory"] * row["signal_norm2"] for row in mine) / signal,
            "alignment_error": math.sqrt(math.fsum((row["alignment_error"] * row["signal_norm2"]) ** 2 for row in mine)) / signal,
        }
        required, draws = config.affordable("layer_resolution"), config.affordable("draws")
        error, mean = (of(total, config.affordable("model_resolution")) for of in (verdict_of, alignment_of))
        each = [(verdict_of(row, required, draws), alignment_of(row, ALIGNMENT * required, draws)) for row in mine]
        total |= {
            "z": error.z,
            "resolution": error.resolution,
            "alignment_z": mean.z,
            "alignment_resolution": mean.resolution,
            "layers_holding": sum(e.holds and a.holds for e, a in each),
            "largest_layer_z": max((v.z for pair in each for v in pair), key=abs),
            "largest_layer_resolution": max(e.resolution for e, _ in each),
            "holds": error.holds and abs(mean.z) < Z_LIMIT and all(e.holds and a.holds for e, a in each),
        }
        totals[contender.label, ratio] = total
    return [*totals.values(), *_order(config, cells, totals)]


def _order(
    config: Config, cells: dict[tuple[str, str, float], dict[str, Any]], totals: dict[tuple[str, float], dict[str, Any]]
) -> list[dict[str, Any]]:
    result = []
    for (less, more, equal), ratio in itertools.product(ORDER, config.ratio):
        if (less, ratio) not in totals or (more, ratio) not in totals:
            continue
        a, b = totals[less, ratio], totals[more, ratio]
        error = math.hypot(a["standard_error"], b["standard_error"])
        z = (b["measured"] - a["measured"]) / error
        agrees = abs(b["measured"] - a["measured"] - (b["predicted"] - a["predicted"])) < 5 * error
        layers = [(cells[name, less, ratio], row) for (name, law, at), row in cells.items() if law == more and at == ratio]
        separate = [(y["measured"] - x["measured"]) / math.hypot(x["standard_error"], y["standard_error"]) for x, y in layers]
        predicted = sum(
            math.isclose(x["predicted"], y["predicted"], rel_tol=1e-6) if equal else x["predicted"] <= y["predicted"] * (1 + 1e-9)
            for x, y in layers
        )
        scores = [student(z, config.affordable("draws")) for z in separate]
        against = sum(abs(score) >= Z_LIMIT if equal else score <= -Z_LIMIT for score in scores)
        result.append(
            {
                "kind": "order",
                "claim": f"{less} {'=' if equal else '<'} {more}",
                "ratio": ratio,
                "difference": b["measured"] - a["measured"],
                "standard_error": error,
                "predicted": b["predicted"] - a["predicted"],
                "z": z,
                "layers": len(layers),
                "layers_predicted": predicted,
                "layers_against": against,
                "resolution": WIDTH * error / b["predicted"],
                "holds": agrees
                and (abs(z) < Z_LIMIT and WIDTH * error <= config.affordable("model_resolution") * b["predicted"] if equal else z > Z_LIMIT)
                and predicted == len(layers)
                and against == 0,
            }
        )
    return result
