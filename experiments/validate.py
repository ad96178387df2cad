"""Do the laws and estimators do what theory says? On synthetic matrices, on a small LLaMA in training, and on a pretrained model.

``model = synthetic``: every law's moments, and the error of the estimators built on it, by ``check_law`` and ``check_estimator``.
``model = tiny`` or ``smollm2``: the stochastic gradients of every linear layer over N mini-batches; predicted against measured mean squared
error of every law at several r/n, per layer and summed over the model, and the order of the laws put to the test.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from estimators import LAWS, Population, keyed, measure
from estimators.law import Law, Spectrum
from experiments import data, models, runs, synthetic
from experiments.gradients import Statistics, linear_layers, populations, statistics
from experiments.verdict import Check, Verdict, check_estimator, check_law, exact
from theory import mse, optimal

__all__ = ["Check", "Config", "Verdict", "check_estimator", "check_law", "main"]


DEFAULTS: dict[str, dict[str, Any]] = {  # what a model of that size affords on two cores
    "synthetic": {"sequences": 8, "draws": 256, "layer_resolution": 1.0, "model_resolution": 0.1},
    "tiny": {"sequences": 8, "draws": 256, "layer_resolution": 1.0, "model_resolution": 0.1},
    "smollm2": {"sequences": 2, "draws": 16, "layer_resolution": 10.0, "model_resolution": 0.5},
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Predicted against measured moments and errors of every law."""

    model: Literal["synthetic", "tiny", "smollm2"] = "synthetic"
    """Where the gradients come from."""
    law: tuple[str, ...] = tuple(LAWS)
    """Laws to test, names from LAWS."""
    keep: tuple[float, ...] = (0.25,)
    """Also test sketched forms of the spectral law that keep these fractions k/n of the directions."""
    ratio: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """Ranks as fractions r/n of each layer's columns."""
    c: float = 1.0
    """Isotropy constant: E[VVᵀ] = cI."""
    seed: int = 0
    """Of everything random."""
    shapes: tuple[str, ...] = ("12x20", "40x24")
    """Synthetic: rows x columns."""
    spectra: tuple[str, ...] = ("power", "low_rank")
    """Synthetic: decay of the singular values, of flat, power, exponential, low_rank."""
    noise: float = 1.0
    """Synthetic: gradient noise tr Σ_ξ over ‖g‖²."""
    resolution: float = 0.01
    """Synthetic: relative defect in scale that every check must be able to see."""
    batches: int = 64
    """Real gradients: number N of mini-batches."""
    sequences: int | None = None
    """Real gradients: sequences in a mini-batch (default: 8 for tiny, 2 for smollm2)."""
    length: int = 128
    """Real gradients: tokens in a sequence."""
    draws: int | None = None
    """Real gradients: draws per layer, law and rank (default: 256 for tiny, 16 for smollm2)."""
    layer_resolution: float | None = None
    """Real gradients: relative defect in the error of one layer that must be visible (default: 1 for tiny, 10 for smollm2)."""
    model_resolution: float | None = None
    """Real gradients: the same for the error summed over all layers (default: 0.1 for tiny, 0.5 for smollm2)."""
    steps: int = 300
    """Tiny: training steps before the gradients are taken."""
    lr: float = 3e-3
    """Tiny: peak learning rate of AdamW."""
    runs_dir: Path = Path("runs")
    """Where run directories go."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        for name, value in DEFAULTS[self.model].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("law", "ratio", "shapes", "spectra"):
            if not getattr(self, name):
                raise ValueError(f"{name} needs at least one value")
        unknown = [name for name in self.law if name not in LAWS]
        if unknown:
            raise ValueError(f"unknown law {unknown[0]!r}, known are {', '.join(LAWS)}")
        unknown = [name for name in self.spectra if name not in synthetic.SPECTRA]
        if unknown:
            raise ValueError(f"unknown spectrum {unknown[0]!r}, known are {', '.join(synthetic.SPECTRA)}")
        for shape in self.shapes:
            synthetic.shape_of(shape)
        for name in ("ratio", "keep"):
            for value in getattr(self, name):
                if not 0 < value <= 1:
                    raise ValueError(f"{name} is a fraction of n and must be in (0, 1], got {value}")
        for name in ("c", "noise", "resolution", "layer_resolution", "model_resolution", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name, least in (("batches", 2), ("sequences", 1), ("length", 2), ("draws", 2), ("steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


PRESETS = {
    "smoke": Config(
        ratio=(0.25,), shapes=("4x6",), spectra=("power",), resolution=0.05, batches=4, sequences=2, length=32, draws=64, steps=3,
        layer_resolution=20.0, model_resolution=20.0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """A law as it enters the comparison: a registry key and what to call it with."""

    label: str
    name: str
    keep: float | None = None  # fraction of directions, spectral only

    def fit(self, S: Tensor | Spectrum, rank: int, c: float) -> Law:
        """This law for gradients with second moment S."""
        n = (S.Q if isinstance(S, Spectrum) else S).shape[-1]
        options: dict[str, Any] = {} if self.keep is None else {"keep": max(1, round(self.keep * n))}
        return LAWS[self.name].from_second_moment(S, rank, c, **options)


def contenders(config: Config) -> list[Contender]:
    """The laws asked for, and the sketched forms of the spectral one."""
    result = [Contender(name, name) for name in config.law]
    if "spectral" in config.law:
        result += [Contender(f"spectral k={fraction:g}n", "spectral", fraction) for fraction in config.keep]
    return result


def rank_of(ratio: float, n: int) -> int:
    """r for a fraction r/n, at least 1."""
    return max(1, round(ratio * n))


def main(config: Config) -> runs.Run:
    """Fill and return the run directory."""
    run = runs.start("validate", config.model, config)
    if run.done:
        return run
    if config.model == "synthetic":
        _synthetic(config, run)
    else:
        _real(config, run)
    run.finish()
    return run


# Synthetic matrices


def _synthetic(config: Config, run: runs.Run) -> None:
    done = {_key(row) for row in run.rows()}
    cells = list(itertools.product(config.shapes, config.spectra, config.ratio, contenders(config)))
    checked: set[tuple[Any, ...] | None] = set()
    with runs.progress(len(cells), "synthetic", config.quiet) as bar:
        for shape, spectrum, ratio, contender in cells:
            G = synthetic.gradients(shape, spectrum, config.noise, config.seed)
            n = G.shape[-1]
            rank = rank_of(ratio, n)
            law = contender.fit((G.mT @ G).mean(0), rank, config.c)
            where = {"law": contender.label, "shape": shape, "spectrum": spectrum, "n": n, "rank": rank, "ratio": rank / n}
            bar.set_postfix_str(f"{contender.label} r={rank} {shape} {spectrum}")

            def check(kind: str, test: Callable[[], Check], where: dict[str, Any] = where) -> None:
                if _key({"kind": kind} | where) not in done:
                    begin = time.perf_counter()
                    result = test()
                    run.log({"kind": kind} | where | _row(result) | {"seconds": round(time.perf_counter() - begin, 3)})

            signature = _signature(law)
            if signature is None or signature not in checked:
                check("law", lambda law=law: check_law(law, resolution=config.resolution, seed=config.seed))
            checked.add(signature)
            check("ipa", lambda law=law, G=G: check_estimator(law, G, resolution=config.resolution, seed=config.seed))
            if (shape, spectrum, ratio) == (config.shapes[0], config.spectra[0], max(config.ratio)):
                coarse = 5 * config.resolution  # one zeroth-order query has mr times the variance
                check("lr", lambda law=law, G=G: check_estimator(law, G, estimator="lr", resolution=coarse, seed=config.seed))
            bar.update()


def _signature(law: Law) -> tuple[Any, ...] | None:
    """What the moments of an unfitted law depend on: such a law is checked once, not once a spectrum. None for a fitted one."""
    values = tuple(getattr(law, field.name) for field in fields(law))
    return None if any(isinstance(value, Tensor) for value in values) else (type(law).__name__, *values)


def _row(check: Check) -> dict[str, Any]:
    return {
        "draws": check.draws,
        "holds": check.holds,
        "resolution": check.resolution,
        "z": check.z,
        "verdicts": [verdict.row() for verdict in check.verdicts],
    }


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("kind", "law", "shape", "spectrum", "rank", "layer", "ratio"))


# Real gradients


def _real(config: Config, run: runs.Run) -> None:
    if config.model == "tiny":
        tokens = data.tokens(models.PRESETS["tiny"]["vocab_size"])
        model = models.build("tiny", config.seed)
        losses = models.train(model, tokens.training, steps=config.steps, lr=config.lr, seed=config.seed, quiet=config.quiet)
        run.write("training.json", {"loss": losses, "tokens_sha256": tokens.sha256})
        stream = tokens.training
    else:
        model, stream = models.smollm2()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    finished = {row["layer"] for row in run.rows() if row["kind"] == "layer"}
    names = [name for name in linear_layers(model) if name not in finished]

    def batch(i: int) -> Tensor:
        return data.batch(stream, config.seed, "gradients", i, config.sequences, config.length)

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
    """Predicted and measured error of every law on one layer; the layer's own row last, as the mark that it is complete."""
    facts = statistics(population)
    measurable = Population(population)
    spectrum = Spectrum(*(torch.from_numpy(a).to(population.device) for a in (facts.spectrum, facts.basis)))
    _, m, n = population.shape
    for ratio, contender in itertools.product(config.ratio, contenders(config)):
        rank = rank_of(ratio, n)
        law = contender.fit(spectrum, rank, config.c)
        generator = keyed.generator(config.seed, f"{name} {contender.label} {rank}", 0, population.device)
        measured = measure(law, measurable, config.draws, generator=generator, track_mean=False)
        run.log(
            {"kind": "gradient", "layer": name, "law": contender.label, "n": n, "rank": rank, "ratio": ratio}
            | _predicted(law, facts)
            | {
                "measured": measured.mse.value,
                "standard_error": measured.mse.standard_error,
                "alignment": measured.alignment.value,
                "alignment_error": measured.alignment.standard_error,
            }
        )
    run.log({"kind": "layer", "layer": name, "m": m, "n": n, "draws": config.draws} | facts.summary())


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


def verdict_of(row: dict[str, Any], required: float) -> Verdict:
    """The measured error of a ``gradient`` or ``model`` row as a verdict."""
    return Verdict(
        name=f"{row['law']} r/n={row['ratio']:g}",
        estimate=row["measured"],
        standard_error=row["standard_error"],
        theory=row["predicted"],
        scale=max(row["predicted"], FLOAT32 * row["signal_norm2"]),
        required=required,
    )


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
    for contender, ratio in itertools.product(contenders(config), config.ratio):
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
        }
        verdict = verdict_of(total, config.model_resolution)
        each = [verdict_of(row, config.layer_resolution) for row in mine]
        total |= {
            "z": verdict.z,
            "resolution": verdict.resolution,
            "layers_holding": sum(v.holds for v in each),
            "largest_layer_z": max((v.z for v in each), key=abs),
            "largest_layer_resolution": max(v.resolution for v in each),
            "holds": verdict.holds and all(v.holds for v in each),
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
                "layers_predicted": sum(
                    math.isclose(x["predicted"], y["predicted"], rel_tol=1e-6) if equal else x["predicted"] <= y["predicted"] * (1 + 1e-9)
                    for x, y in layers
                ),
                "layers_against": int(np.sum(np.abs(separate) > 5) if equal else np.sum(np.array(separate) < -5)),
                "holds": agrees and (abs(z) < 5 if equal else z > 5),
            }
        )
    return result
