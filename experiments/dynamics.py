"""SGD on a quadratic under every law: exact expected loss beside an ensemble of runs, the largest stable step, and error feedback.

Four parts: ``curve`` (exact loss against simulated mean), ``stability`` (growth of E‖Θ‖² below and above the exact boundary), ``lazy`` (one outer
step of K inner steps in a held subspace), ``feedback`` (literal GradLite, EF14, EF21 and none under a rank-r compressor).

    lowrank dynamics
    lowrank dynamics --n 16 --rank 4 --lr 0.5 --law haar_stiefel gaussian
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from estimators import LAWS, error_feedback, estimate, keyed
from estimators.law import Law
from estimators.measure import Running
from experiments import runs
from experiments.validation.checks import exact
from experiments.validation.verdict import Verdict
from theory import dynamics, feedback, optimal

FEEDBACK = {"none": error_feedback.none, "ef14": error_feedback.ef14, "ef21": error_feedback.ef21, "literal": error_feedback.literal}


FEEDBACK_STEPS = 1200  # enough for the slowest direction at condition 20


@dataclass(frozen=True, kw_only=True)
class Config:
    """Exact expected dynamics of SGD on a quadratic against simulation."""

    law: tuple[str, ...] = ("gaussian", "haar_stiefel", "coordinate", "dct", "spectral")
    """Unbiased laws to run, names from LAWS."""
    n: int = 16
    """Columns of Θ: the dimension that is projected."""
    rows: int = 4
    """Rows of Θ."""
    rank: int = 4
    """r: columns of V, at most n."""
    c: float = 1.0
    """Isotropy constant: E[VVᵀ] = cI."""
    condition: float = 20.0
    """λ_max/λ_min of the Hessian; λ_max = 1, eigenvalues in geometric progression."""
    noise: float = 0.01
    """Variance of every gradient entry."""
    steps: int = 150
    """SGD steps of the loss curves."""
    lr: float = 0.25
    """Step size of the loss curves, as a fraction of each law's largest stable step."""
    ensemble: int = 20_000
    """Simulated runs."""
    inner: tuple[int, ...] = (1, 5, 20)
    """Inner steps K of the lazy loop."""
    seed: int = 0
    """Seed of everything random."""
    runs_dir: Path = Path("runs")
    """Where run directories go."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        for name in self.law:
            if name not in LAWS or not LAWS[name].unbiased:
                known = ", ".join(key for key, law in LAWS.items() if law.unbiased)
                raise ValueError(f"unknown or biased law {name!r}, unbiased laws are {known}")
        if not 1 <= self.rank <= self.n:
            raise ValueError(f"rank must be between 1 and n, got rank={self.rank}, n={self.n}")
        for name in ("c", "condition", "noise"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 < self.lr < 1:
            raise ValueError(f"lr is a fraction of the largest stable step and must be in (0, 1), got {self.lr}")
        for name, least in (("steps", 1), ("ensemble", 100), ("rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.condition < 1 or any(k < 1 for k in self.inner):
            raise ValueError(f"condition and inner must be at least 1, got {self.condition} and {self.inner}")


PRESETS = {"smoke": Config(law=("haar_stiefel",), n=6, rank=3, steps=10, ensemble=4000, inner=(2,))}


def main(config: Config) -> runs.Run:
    """Fill and return the run directory."""
    run = runs.start("dynamics", f"n{config.n}-r{config.rank}", config)
    if run.done:
        return run
    rows = run.rows()
    count = Counter((row["kind"], row["law"]) for row in rows)
    finished = {(row["kind"], row["law"]) for row in rows if count[row["kind"], row["law"]] == row["of"]}
    run.keep([row for row in rows if (row["kind"], row["law"]) in finished])
    parts: list[tuple[str, str, Callable[[], list[dict[str, Any]]]]] = []
    for name in config.law:
        parts.append(("curve", name, lambda name=name: curve(config, name)))
        parts.append(("stability", name, lambda name=name: stability(config, name)))
        if _reaches_the_floor(config, name):
            parts.append(("lazy", name, lambda name=name: lazy(config, name)))
    parts += [("feedback", name, lambda name=name: [feedback_path(config, name)]) for name in FEEDBACK]
    with runs.progress(len(parts), "dynamics", config.quiet) as bar:
        for kind, name, part in parts:
            bar.set_postfix_str(f"{kind} {name}")
            if (kind, name) not in finished:
                made = part()
                run.log(*({"kind": kind, "law": name, "of": len(made)} | row for row in made))
            bar.update()
    run.finish()
    return run


def _reaches_the_floor(config: Config, name: str) -> bool:
    """Whether VᵀV = (cn/r)I, for which alone the lazy-loop contraction is stated: tr E[P²] at its least, whatever the Hessian."""
    law = LAWS[name](n=config.n, rank=config.rank, c=config.c)
    fitted = law_for(config, name, problem(config)).reference() is not None
    floor = optimal.instance_independent_floor(config.n, config.rank, config.c)
    return not fitted and bool(np.isclose(np.trace(exact(law).square), floor))


@dataclass(frozen=True)
class Quadratic:
    """F = ½tr(ΘHΘᵀ) with a rotated H, gradient noise C = noise·I a row, and a start Θ_0 that is the same for all laws."""

    H: np.ndarray
    C: np.ndarray
    start: np.ndarray  # Θ_0, (m, n)


def problem(config: Config) -> Quadratic:
    """The quadratic of a configuration: eigenvalues from 1 down to 1/condition, random eigenvectors, ‖Θ_0‖² = n."""
    generator = keyed.generator(config.seed, "quadratic", 0)
    Q = torch.linalg.qr(torch.randn(config.n, config.n, generator=generator, dtype=torch.float64))[0].numpy()
    H = (Q * np.geomspace(1, 1 / config.condition, config.n)) @ Q.T
    start = torch.randn(config.rows, config.n, generator=generator, dtype=torch.float64).numpy()
    return Quadratic((H + H.T) / 2, config.noise * np.eye(config.n), start * math.sqrt(config.n) / np.linalg.norm(start))


def law_for(config: Config, name: str, quadratic: Quadratic) -> Law:
    """The law; the spectral one is fitted to the gradient second moment at the start, and stays unbiased as that goes stale."""
    gradient = quadratic.start @ quadratic.H
    S = gradient.T @ gradient + config.rows * quadratic.C
    return LAWS[name].from_second_moment(torch.from_numpy(S), config.rank, config.c)


def simulate(law: Law, quadratic: Quadratic, noise: float, eta: float, steps: int, ensemble: int, generator: torch.Generator) -> Tensor:
    """‖·‖²-type record of an ensemble of SGD runs: (steps+1, ensemble, 2) with F(Θ_t) and ‖Θ_t‖², float64."""
    H = torch.from_numpy(quadratic.H)
    theta = torch.from_numpy(quadratic.start).expand(ensemble, -1, -1).clone()
    record = []
    for step in range(steps + 1):
        gradient = theta @ H
        record.append(torch.stack([0.5 * (theta * gradient).sum((-2, -1)), theta.square().sum((-2, -1))], dim=-1))
        if step < steps:
            if noise:
                gradient = gradient + math.sqrt(noise) * torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
            V = law.sample(ensemble, generator=generator, dtype=theta.dtype)
            theta = theta - eta * estimate(gradient, V)
    return torch.stack(record)


def curve(config: Config, name: str) -> list[dict[str, Any]]:
    """Exact E[F_t] and the ensemble's mean at steps spread over the run, with a verdict at each."""
    quadratic = problem(config)
    law = law_for(config, name, quadratic)
    truth = exact(law)
    limit = dynamics.largest_stable_step(truth, quadratic.H)
    eta = config.lr * limit
    start = quadratic.start.T @ quadratic.start
    expected = dynamics.expected_loss(truth, quadratic.H, quadratic.C, start, eta, config.steps, config.rows)
    level = dynamics.stationary(truth, quadratic.H, quadratic.C, eta, config.rows)
    losses = simulate(law, quadratic, config.noise, eta, config.steps, config.ensemble, keyed.generator(config.seed, f"curve {name}", 0))
    rows = []
    for t in np.unique(np.linspace(0, config.steps, 31).astype(int)).tolist():
        seen = Running()
        seen.update(losses[t, :, :1])
        rows.append(
            {"step": t, "eta": eta, "largest_stable_step": limit, "stationary": float(0.5 * np.sum(quadratic.H * level))}
            | _verdict(f"E[F] at step {t}", seen, float(expected[t]), required=0.25)
        )
    return rows


def stability(config: Config, name: str) -> list[dict[str, Any]]:
    """Noiseless E‖Θ‖² after five steps below, at and above the boundary: exact, simulated, and the asymptotic growth a step."""
    quadratic = problem(config)
    law = law_for(config, name, quadratic)
    truth = exact(law)
    limit = dynamics.largest_stable_step(truth, quadratic.H)
    start, steps, none = quadratic.start.T @ quadratic.start, 5, np.zeros_like(quadratic.C)
    rows = []
    for multiple in (0.5, 0.9, 1.0, 1.1, 1.5):
        eta = multiple * limit
        path = dynamics.second_moment_path(truth, quadratic.H, none, start, eta, steps, config.rows)
        generator = keyed.generator(config.seed, f"stability {name} {multiple}", 0)
        seen = Running()
        seen.update(simulate(law, quadratic, 0.0, eta, steps, config.ensemble, generator)[-1, :, 1:])
        rows.append(
            {"multiple": multiple, "eta": eta, "growth": dynamics.growth_factor(truth, quadratic.H, eta)}
            | _verdict(f"E‖Θ‖² after {steps} steps at {multiple}× the boundary", seen, float(np.trace(path[-1])), required=0.5)
        )
    return rows


def lazy(config: Config, name: str) -> list[dict[str, Any]]:
    """One outer step of K inner steps on H = I in a held subspace: E‖Θ‖² after over before, exact and simulated."""
    quadratic = problem(config)
    law = law_for(config, name, quadratic)
    theta = torch.from_numpy(quadratic.start)
    rows = []
    for inner, fraction in itertools.product(config.inner, (0.2, 0.6)):
        eta = fraction * 2 * config.rank / (config.c * config.n)  # stable below 2r/(cn) at curvature 1
        V = law.sample(config.ensemble, generator=keyed.generator(config.seed, f"lazy {name} {inner} {fraction}", 0), dtype=theta.dtype)
        now = theta.expand(config.ensemble, -1, -1)
        for _ in range(inner):
            now = now - eta * estimate(now, V)
        seen = Running()
        seen.update((now.square().sum((-2, -1)) / theta.square().sum()).unsqueeze(-1))
        expected = dynamics.lazy_contraction(config.n, config.rank, eta, 1.0, inner, config.c)
        rows.append({"inner": inner, "eta": eta} | _verdict(f"contraction, K={inner}, η={eta:.3g}", seen, expected, required=0.1))
    return rows


def feedback_path(config: Config, name: str) -> dict[str, Any]:
    """Median loss of GradLite-like runs with a fresh orthonormal rank-r compressor, and the literal form's exact divergence factor.

    Compressor QQᵀ, Q a fresh Haar frame each step (contractive with r/n), no noise, η = 0.1/λ_max; the same draws for all. With the
    basis held instead, the literal form multiplies a discarded direction by √(1+ηλ) a step: ``modulus`` at λ = 1, ``held`` measured.
    Holds when EF14, EF21 and no feedback bring the loss down a hundredfold, and the literal form up, with ``held`` = ``modulus``.
    """
    quadratic = problem(config)
    H = torch.from_numpy(quadratic.H)
    law = LAWS["haar_stiefel"](n=config.n, rank=config.rank, c=config.rank / config.n)  # VVᵀ = QQᵀ
    eta, steps, count = 0.1, FEEDBACK_STEPS, 32
    generator = keyed.generator(config.seed, "feedback", 0)
    theta = torch.from_numpy(quadratic.start).expand(count, -1, -1).clone()
    memory = torch.zeros_like(theta)
    losses = []
    for _ in range(steps + 1):
        gradient = theta @ H
        losses.append(float((0.5 * (theta * gradient).sum((-2, -1))).median()))
        V = law.sample(count, generator=generator, dtype=theta.dtype)
        update, memory = FEEDBACK[name](lambda v, V=V: estimate(v, V), gradient, memory)
        theta = theta - eta * update
    points = np.unique(np.linspace(0, steps, 61).astype(int)).tolist()
    row: dict[str, Any] = {"eta": eta, "step": points, "loss": [losses[t] for t in points]}
    row["holds"] = losses[-1] < 1e-2 * losses[0]
    if name == "literal":
        modulus, held = feedback.literal_modulus(eta, 1.0), literal_growth(eta)
        row |= {"modulus": modulus, "held": held, "holds": losses[-1] > 1e2 * losses[0] and math.isclose(held, modulus, rel_tol=1e-9)}
    return row


def literal_growth(eta: float) -> float:
    """Growth a step of (x, r) under the literal recursion in a direction that the compressor never keeps, λ = 1, measured over 2000 steps."""
    x, r = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    logarithm, steps = 0.0, 2000
    for _ in range(steps):
        update, r = error_feedback.literal(torch.zeros_like, x, r)
        x = x - eta * update
        size = torch.hypot(x, r * math.sqrt(eta))  # the norm in which the rotation is exact
        logarithm += float(size.log())
        x, r = x / size, r / size
    return math.exp(logarithm / steps)


def _verdict(name: str, seen: Running, expected: float, required: float) -> dict[str, Any]:
    (measured,) = seen.estimates
    return Verdict(
        name=name,
        estimate=measured.value,
        standard_error=measured.standard_error,
        theory=expected,
        scale=abs(expected),
        required=required,
    ).row()
