"""Where theory and measurement meet: a verdict is a measured number, its standard error, the exact value, and what would have been seen.

``check_law`` tests a law against its exact moments, ``check_estimator`` an estimator against its exact mean squared error. The number of
draws is fixed before the look, from a pilot that is thrown away, so that the smallest defect the check promises to see (``resolution``,
relative to the exact value) is at least 8 standard errors wide: noise can make a check unresolved, never make it pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from estimators import keyed
from estimators.law import Law
from estimators.lr import lr
from estimators.measure import Estimate, Measurement, Running, measure, measure_estimates
from estimators.sketch import lift
from theory import Moments, moments, mse

Z_LIMIT = 5.0  # two-sided probability 6e-7 a statistic
WIDTH = 8.0  # standard errors inside one resolution: a defect of that size is seen at z > 5 with probability 0.999
PILOT = 4096
MANY = 2000  # draws beyond which Student's distribution is the normal one at 5 standard errors, to 2 %
ROUNDING = 1e-11  # relative spread of a statistic that is constant in exact arithmetic (float64)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One measured statistic beside its exact value.

    ``scale``: what relative numbers refer to, |theory| unless that is 0; ``required``: the largest acceptable ``resolution``; ``draws``: how
    many independent values stand behind the standard error, which matters when they are few.
    """

    name: str
    estimate: float
    standard_error: float
    theory: float
    scale: float
    required: float
    draws: float = math.inf

    @property
    def z(self) -> float:
        """Distance from the exact value in standard errors; rounding counts as error, so constants compare too.

        From few draws the ratio has Student's distribution; it is then mapped to the normal score of the same probability.
        """
        ratio = (self.estimate - self.theory) / self._error
        if self.draws > MANY:
            return ratio
        return math.copysign(float(stats.norm.isf(stats.t.sf(abs(ratio), self.draws - 1))), ratio)

    @property
    def resolution(self) -> float:
        """The smallest relative defect this run would have seen: 8 standard errors over the scale."""
        return WIDTH * self._error / self.scale

    @property
    def resolved(self) -> bool:
        """Whether the run was long enough to see a defect of the required size."""
        return self.resolution <= self.required

    @property
    def holds(self) -> bool:
        """Resolved, and within 5 standard errors of the exact value."""
        return self.resolved and abs(self.z) < Z_LIMIT

    @property
    def _error(self) -> float:
        return math.hypot(self.standard_error, ROUNDING * self.scale)

    def row(self) -> dict[str, Any]:
        """The verdict as plain values, for a table or a JSON line."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "draws"} | {
            "z": self.z,
            "resolution": self.resolution,
            "holds": self.holds,
        }

    def __str__(self) -> str:
        state = "holds" if self.holds else "FAILS" if self.resolved else "UNRESOLVED"
        return (
            f"{self.name}: {self.estimate:.6g} ± {self.standard_error:.2g}, theory {self.theory:.6g}, z = {self.z:+.2f}, "
            f"would have seen {100 * self.resolution:.2g} %: {state}"
        )


@dataclass(frozen=True, kw_only=True)
class Check:
    """All verdicts on one subject over one set of draws; its own numbers are those of the verdict that decides."""

    subject: str
    draws: int
    verdicts: tuple[Verdict, ...]

    @property
    def decisive(self) -> Verdict:
        """The first verdict that does not hold, else the one with the largest |z|."""
        failing = [v for v in self.verdicts if not v.holds]
        return failing[0] if failing else max(self.verdicts, key=lambda v: abs(v.z))

    @property
    def holds(self) -> bool:
        """Whether every verdict holds."""
        return all(v.holds for v in self.verdicts)

    @property
    def resolution(self) -> float:
        """The smallest relative defect that every verdict would have seen."""
        return max(v.resolution for v in self.verdicts)

    @property
    def estimate(self) -> float:
        """Of the decisive verdict."""
        return self.decisive.estimate

    @property
    def standard_error(self) -> float:
        """Of the decisive verdict."""
        return self.decisive.standard_error

    @property
    def theory(self) -> float:
        """Of the decisive verdict."""
        return self.decisive.theory

    @property
    def z(self) -> float:
        """Of the decisive verdict."""
        return self.decisive.z

    def __str__(self) -> str:
        return "\n".join([f"{self.subject}, {self.draws} draws", *(f"  {v}" for v in self.verdicts)])


def exact(law: Law) -> Moments:
    """The exact moments of a law: the module of its stem in theory/, its own fields as keywords."""
    parameters = {}
    for field in fields(law):
        value = getattr(law, field.name)
        parameters[field.name] = value.detach().double().cpu().numpy() if isinstance(value, Tensor) else value
    return moments(law.stem, parameters.pop("n"), parameters.pop("rank"), parameters.pop("c"), **parameters)


def check_law(law: Law, *, truth: Moments | None = None, resolution: float = 0.01, seed: int = 0, max_draws: int = 20_000_000) -> Check:
    """Draws of ``law`` against its exact moments, by contrasts in float64.

    tr PS and aᵀPa test E[P]; (aᵀPa)² and ‖Pa‖² test M ↦ E[PMP] at M = aaᵀ (off the diagonal too) and M = I; ⟨V, E⟩ tests E[V] = 0 where
    the law is centred. S is what the law was fitted to, else I; a is S^{1/2}u with random signs u, or a decaying random vector. A fitted law
    leaves some directions to rare draws with large weights, so its plain tr P is tested too, but coarsely. ``truth``: the moments to hold
    it against, its own by default. ``resolution``: relative defect in the scale c to be seen; second moments get twice that.
    """
    truth = exact(law) if truth is None else truth
    a, S = _probe(law, seed)
    weight = torch.linalg.cholesky(S + 1e-12 * torch.eye(law.n)).mT  # tr PS = ‖S^{1/2}V‖², any square root
    corner = torch.eye(law.n, law.rank, dtype=torch.float64) / math.sqrt(law.rank)
    vector = a.numpy()
    image = truth.second_moment(np.stack([np.outer(vector, vector), np.eye(law.n)]))
    fitted = law.reference() is not None
    expected = [
        ("tr PS" if fitted else "tr P", float(np.sum(truth.mean * (weight.mT @ weight).numpy())), 1.0),
        ("aᵀPa", float(vector @ truth.mean @ vector), 1.0),
        ("(aᵀPa)²", float(vector @ image[0] @ vector), 2.0),
        ("‖Pa‖²", float(vector @ image[1] @ vector), 2.0),
    ]
    if fitted:
        expected.append(("tr P", float(np.trace(truth.mean)), 25.0))
    scales = [abs(value) for _, value, _ in expected]
    if truth.centred:
        expected.append(("E[V]", 0.0, 5.0))
        scales.append(math.sqrt(truth.c * truth.n))  # √E‖V‖²

    def statistics(size: int, generator: torch.Generator) -> Tensor:
        V = law.sample(size, generator=generator, dtype=torch.float64)
        trace = V.square().sum((-2, -1))
        weighted = (weight @ V).square().sum((-2, -1)) if fitted else trace
        sketched = a @ V  # (draws, r)
        inner = sketched.square().sum(-1)
        lifted = (V @ sketched.unsqueeze(-1)).square().sum((-2, -1))
        columns = [weighted, inner, inner.square(), lifted]
        if fitted:
            columns.append(trace)
        if truth.centred:
            columns.append((V * corner).sum((-2, -1)))
        return torch.stack(columns, dim=1)

    chunk = max(1, 2**25 // (8 * law.n * law.rank))

    def run(draws: int, generator: torch.Generator) -> list[Estimate]:
        running = Running()
        for start in range(0, draws, chunk):
            running.update(statistics(min(chunk, draws - start), generator))
        return running.estimates

    required = [resolution * factor for _, _, factor in expected]
    names, values = [name for name, _, _ in expected], [value for _, value, _ in expected]
    return _decide(str(law), seed, run, names, values, scales, required, None, max_draws)


def check_estimator(
    law: Law,
    gradients: Tensor,
    *,
    estimator: Literal["ipa", "lr"] = "ipa",
    truth: Moments | None = None,
    resolution: float = 0.01,
    draws: int | None = None,
    seed: int = 0,
    max_draws: int = 20_000_000,
) -> Check:
    """Measured alignment and mean squared error of an estimator under ``law`` against the exact ones.

    ``gradients``: (m, n), or N equally likely (N, m, n), float64. ``estimator``: "ipa" (ĜVVᵀ) or "lr" (antithetic, one query, on the linear
    loss whose gradient is Ĝ). ``draws``: fixed number; None takes it from a pilot so that ``resolution`` (alignment) and twice that
    (mean squared error) are reached.
    """
    population = gradients if gradients.ndim == 3 else gradients.unsqueeze(0)
    _, noise, signal = mse.gradient_moments(population.double().cpu().numpy())
    truth = exact(law) if truth is None else truth
    rows = population.shape[-2]
    predicted = mse.ipa(truth, noise, signal) if estimator == "ipa" else mse.lr(truth, rows, noise, signal)
    scales = [max(abs(predicted.alignment), 1e-300), max(predicted.total, 1e-9 * predicted.signal)]

    def run(draws: int, generator: torch.Generator) -> list[Estimate]:
        result = _measure(estimator, law, population, draws, generator)
        return [result.alignment, result.mse]

    names, values = ["⟨estimate, g⟩/‖g‖²", "E‖estimate − g‖²"], [predicted.alignment, predicted.total]
    subject = f"{estimator} {law} on {tuple(gradients.shape)}"
    return _decide(subject, seed, run, names, values, scales, [resolution, 2 * resolution], draws, max_draws)


def _decide(
    subject: str,
    seed: int,
    run: Callable[[int, torch.Generator], list[Estimate]],
    names: list[str],
    values: list[float],
    scales: list[float],
    required: list[float],
    draws: int | None,
    max_draws: int,
) -> Check:
    """Run ``run`` once with ``draws`` draws, or with as many as a pilot says, and compare.

    Where a run turns out too short for its resolution (heavy tails that the pilot missed) it is taken as the next pilot, thrown away, and
    replaced by fresh draws: only its standard errors are used, so the choice of N never sees the result.
    """
    index, count = 0, PILOT
    fixed = draws is not None
    draws = draws if draws is not None else 0
    while True:
        if not fixed:
            pilot = run(count, keyed.generator(seed, subject, index))
            draws = _enough(pilot, count, scales, required, max_draws)
            index += 1
        estimates = run(draws, keyed.generator(seed, subject, index))
        verdicts = tuple(
            Verdict(name=name, estimate=e.value, standard_error=e.standard_error, theory=value, scale=scale, required=need)
            for name, e, value, scale, need in zip(names, estimates, values, scales, required, strict=True)
        )
        if fixed or draws >= max_draws or all(v.resolved for v in verdicts):
            return Check(subject=subject, draws=draws, verdicts=verdicts)
        count, index = draws, index + 1


def _measure(estimator: str, law: Law, population: Tensor, draws: int, generator: torch.Generator) -> Measurement:
    if estimator == "ipa":
        return measure(law, population, draws, generator=generator, track_mean=False)
    if estimator != "lr":
        raise ValueError(f"check_estimator(estimator={estimator!r}): known estimators are 'ipa' and 'lr'")
    count, m, n = population.shape

    def estimates(size: int, generator: torch.Generator) -> Tensor:
        V = law.sample(size, generator=generator, dtype=population.dtype)
        Z = torch.randn(1, size, m, law.rank, generator=generator, dtype=population.dtype)
        G = population[torch.randint(count, (size,), generator=generator)]
        sketched = lr(lambda W: (W * G).sum((-2, -1)), torch.zeros(m, n, dtype=population.dtype), V, Z, epsilon=1.0)
        return lift(sketched, V)

    return measure_estimates(estimates, population.mean(0), draws, generator=generator)


def _probe(law: Law, seed: int) -> tuple[Tensor, Tensor]:
    """The contrast vector a, (n,), of unit length, and S, (n, n), of trace n; float64."""
    generator = keyed.generator(seed, f"probe {law}", 0)
    sign = torch.randint(0, 2, (law.n,), generator=generator).double() * 2 - 1
    S = law.reference()
    if S is None:
        a, S = sign / torch.arange(1, law.n + 1).double().sqrt(), torch.eye(law.n, dtype=torch.float64)
    else:
        S = S.double().cpu()
        sigma, Q = torch.linalg.eigh(S)
        a = Q @ (sigma.clamp_min(0).sqrt() * sign)
    return a / a.norm(), S * (law.n / S.trace())


def _enough(pilot: list[Estimate], count: int, scales: list[float], required: list[float], max_draws: int) -> int:
    """Draws after which every statistic has 8 standard errors inside its resolution, with a fifth in hand for the pilot's own error."""
    ratios = [(WIDTH * e.standard_error / (need * scale)) ** 2 for e, scale, need in zip(pilot, scales, required, strict=True)]
    return int(min(max_draws, max(PILOT, 1.2 * count * max(ratios))))
