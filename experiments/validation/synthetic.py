"""Synthetic gradient populations with a chosen shape, spectrum and noise level, and the validation of every law on them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from estimators import keyed
from estimators.haar_stiefel import householder_qr
from estimators.law import Law
from estimators.selection import rank_of
from experiments import runs
from experiments.validation.checks import check_estimator, check_law
from experiments.validation.contenders import contenders
from experiments.validation.verdict import Check

if TYPE_CHECKING:
    from experiments.validate import Config

POPULATION = 8  # equally likely gradients

SPECTRA = {
    "flat": lambda k: torch.ones_like(k),
    "power": lambda k: 1 / k,  # s_k = 1/k
    "exponential": lambda k: 0.6 ** (k - 1),
    "low_rank": lambda k: (k <= 3).double(),  # exactly three directions carry the signal
}


def shape_of(text: str) -> tuple[int, int]:
    """(m, n) from "12x20". Raises ``ValueError`` for anything else."""
    rows, cross, columns = text.partition("x")
    if not (cross and rows.isdigit() and columns.isdigit() and int(rows) and int(columns)):
        raise ValueError(f"shape {text!r} is not of the form ROWSxCOLUMNS, such as 12x20")
    return int(rows), int(columns)


def gradients(shape: str, spectrum: str, noise: float, seed: int) -> Tensor:
    """(8, m, n) float64 gradients: mean g with singular values ``spectrum`` and ‖g‖ = 1, noise with tr Σ_ξ = ``noise`` exactly.

    The noise has the same decay along its own random directions, so S is not aligned with g.
    """
    m, n = shape_of(shape)
    generator = keyed.generator(seed, f"gradients {shape} {spectrum}", 0)
    k = min(m, n)
    values = SPECTRA[spectrum](torch.arange(1, k + 1, dtype=torch.float64))

    def frame(rows: int) -> Tensor:
        return householder_qr(torch.randn(rows, k, generator=generator, dtype=torch.float64))

    g = (frame(m) * values) @ frame(n).mT
    g = g / g.norm()
    raw = torch.randn(POPULATION, m, k, generator=generator, dtype=torch.float64) * values @ frame(n).mT
    raw = raw - raw.mean(0)
    spread = raw.square().sum() / POPULATION
    return g + raw * (noise / spread).sqrt()


COARSE = 5  # one zeroth-order query has m·r times the variance, so its check is that much coarser


def validate(config: Config, run: runs.Run) -> None:
    """One row a check: the moments of every law, the error of its IPA estimate, and in one cell of its zeroth-order estimate."""
    done = {_key(row) for row in run.rows()}
    cells = list(itertools.product(config.shapes, config.spectra, config.ratio, contenders(config.law, config.keep)))
    checked: set[tuple[Any, ...] | None] = set()
    with runs.progress(len(cells), "synthetic", config.quiet) as bar:
        for shape, spectrum, ratio, contender in cells:
            G = gradients(shape, spectrum, config.noise, config.seed)
            n = G.shape[-1]
            rank = rank_of(n, ratio)
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
                check(
                    "lr",
                    lambda law=law, G=G: check_estimator(law, G, estimator="lr", resolution=COARSE * config.resolution, seed=config.seed),
                )
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
    return tuple(row.get(name) for name in ("kind", "law", "shape", "spectrum", "rank", "ratio"))
