"""Where theory and measurement meet: ``check_law`` tests a law against its exact moments, ``check_estimator`` an estimator against its error.

The number of draws is fixed before the look, from pilots that are thrown away, so that every verdict can see the defect it promises to see.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from estimators import keyed
from estimators.law import Law
from estimators.lr import lr
from estimators.measure import Estimate, Measurement, Running, measure, measure_estimates
from estimators.sketch import lift
from experiments.validation.verdict import WIDTH, Check, Verdict
from theory import Moments, moments, mse

PILOT = 4096
CHUNK_BYTES = 2**23  # of draws made at once: small enough to stay near the cache


def exact(law: Law) -> Moments:
    """The exact moments of a law: the module of its stem in theory/, its own fields as keywords."""
    parameters = {}
    for field in fields(law):
        value = getattr(law, field.name)
        parameters[field.name] = value.detach().double().cpu().numpy() if isinstance(value, Tensor) else value
    return moments(law.stem, parameters.pop("n"), parameters.pop("rank"), parameters.pop("c"), **parameters)


def check_law(
    law: Law,
    *,
    truth: Moments | None = None,
    resolution: float = 0.01,
    seed: int = 0,
    max_draws: int = 20_000_000,
    device: torch.device | str = "cpu",
) -> Check:
    """Draws of ``law`` against its exact moments, by contrasts in float64.

    tr PS and aᵀPa test E[P]; (aᵀPa)² and ‖Pa‖² test M ↦ E[PMP] at M = aaᵀ (off the diagonal too) and M = I; ⟨V, E⟩ tests E[V] = 0 where
    the law is centred. S is what the law was fitted to, else I; a is S^{1/2}u with random signs u, or a decaying random vector. A fitted law
    leaves some directions to rare draws with large weights, so its plain tr P is tested too, but coarsely. ``truth``: the moments to hold
    it against, its own by default. ``resolution``: relative defect in the scale c to be seen; second moments get twice that.
    """
    _check_arguments(f"check_law({law})", resolution, law)
    truth = exact(law) if truth is None else truth
    a, weight = _probe(law, seed)
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

    a, weight, corner = a.to(device), weight.to(device), corner.to(device)

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

    chunk = max(1, CHUNK_BYTES // (8 * law.n * law.rank))

    def run(draws: int, generator: torch.Generator) -> list[Estimate]:
        running = Running()
        for start in range(0, draws, chunk):
            running.update(statistics(min(chunk, draws - start), generator))
        return running.estimates

    required = [resolution * factor for _, _, factor in expected]
    names, values = [name for name, _, _ in expected], [value for _, value, _ in expected]
    spread = float(np.trace(truth.trace_weighted_mean())) - float(np.trace(truth.mean)) ** 2  # Var(tr P), of rare draws that a pilot misses
    least = 1.3 * spread * (WIDTH / (required[names.index("tr P")] * scales[names.index("tr P")])) ** 2
    return _decide(str(law), seed, device, run, names, values, scales, required, None, max_draws, least=int(least))


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
    call = f"check_estimator({law})"
    _check_arguments(call, resolution, law)
    if gradients.ndim not in (2, 3) or gradients.shape[-1] != law.n:
        raise ValueError(f"{call}: gradients must be (m, {law.n}) or (N, m, {law.n}), got {tuple(gradients.shape)}")
    population = (gradients if gradients.ndim == 3 else gradients.unsqueeze(0)).double()
    if not bool((population != 0).any()):
        raise ValueError(f"{call}: gradients of shape {tuple(gradients.shape)} are all zero, every law estimates them exactly")
    _, noise, signal = mse.gradient_moments(population.cpu().numpy())
    truth = exact(law) if truth is None else truth
    rows = population.shape[-2]
    predicted = mse.ipa(truth, noise, signal) if estimator == "ipa" else mse.lr(truth, rows, noise, signal)
    norm = predicted.signal
    signal_seen = norm > 0  # with g = 0 there is nothing to be aligned with
    names, values = ["E‖estimate − g‖²"], [predicted.total]
    scales, required = [max(predicted.total, 0.01 * norm)], [2 * resolution]  # an error of zero (r = n) is judged against ‖g‖²
    if signal_seen:
        names, values = ["⟨estimate, g⟩/‖g‖²", *names], [predicted.alignment, *values]
        scales, required = [max(abs(predicted.alignment), 0.01), *scales], [resolution, *required]

    def run(draws: int, generator: torch.Generator) -> list[Estimate]:
        result = _measure(estimator, law, population, draws, generator)
        return [result.alignment, result.mse] if signal_seen else [result.mse]

    subject = f"{estimator} {law} on {tuple(gradients.shape)}"
    return _decide(subject, seed, population.device, run, names, values, scales, required, draws, max_draws)


def _decide(
    subject: str,
    seed: int,
    device: torch.device | str,
    run: Callable[[int, torch.Generator], list[Estimate]],
    names: list[str],
    values: list[float],
    scales: list[float],
    required: list[float],
    draws: int | None,
    max_draws: int,
    least: int = PILOT,
) -> Check:
    """Run ``run`` once with ``draws`` draws, or with as many as pilots say, and compare.

    A short pilot says how many draws are needed, a second one of an eighth of that says it again (it sees rarer draws), and both are
    thrown away: N is fixed before the one run that is looked at. If that run is too short after all, its verdicts are unresolved.
    """
    if draws is None:
        draws = min(max_draws, max(PILOT, least))
        for index, count in enumerate((PILOT, None)):
            size = max(PILOT, draws // 8) if count is None else count
            pilot = run(size, keyed.generator(seed, f"pilot {subject}", index, device))
            draws = max(draws, _enough(pilot, size, scales, required, max_draws))
    estimates = run(draws, keyed.generator(seed, subject, 0, device))
    verdicts = tuple(
        Verdict(name=name, estimate=e.value, standard_error=e.standard_error, theory=value, scale=scale, required=need, draws=draws)
        for name, e, value, scale, need in zip(names, estimates, values, scales, required, strict=True)
    )
    return Check(subject=subject, draws=draws, verdicts=verdicts)


def _check_arguments(call: str, resolution: float, law: Law) -> None:
    if not 0 < resolution < math.inf:
        raise ValueError(f"{call}: resolution={resolution} must be positive and finite")
    reference = law.reference()
    if reference is not None and reference.ndim > 2:
        raise ValueError(f"{call}: the law holds {reference.shape[0]} layers; check them one at a time")


def _measure(estimator: str, law: Law, population: Tensor, draws: int, generator: torch.Generator) -> Measurement:
    if estimator == "ipa":
        return measure(law, population, draws, generator=generator, track_mean=False, budget_bytes=2 * CHUNK_BYTES)
    if estimator != "lr":
        raise ValueError(f"check_estimator(estimator={estimator!r}): known estimators are 'ipa' and 'lr'")
    count, m, n = population.shape

    def estimates(size: int, generator: torch.Generator) -> Tensor:
        V = law.sample(size, generator=generator, dtype=population.dtype)
        Z = torch.randn(1, size, m, law.rank, generator=generator, device=population.device, dtype=population.dtype)
        G = population[torch.randint(count, (size,), generator=generator, device=population.device)]
        sketched = lr(lambda W: (W * G).sum((-2, -1)), population.new_zeros(m, n), V, Z, epsilon=1.0)
        return lift(sketched, V)

    return measure_estimates(estimates, population.mean(0), draws, generator=generator)


def _probe(law: Law, seed: int) -> tuple[Tensor, Tensor]:
    """The contrast vector a, (n,), of unit length, and S^{1/2}, (n, n), tr S = n: tr PS = ‖S^{1/2}V‖². Float64, on the CPU."""
    generator = keyed.generator(seed, f"probe {law}", 0)
    sign = torch.randint(0, 2, (law.n,), generator=generator).double() * 2 - 1
    S = law.reference()
    if S is None:
        a, root = sign / torch.arange(1, law.n + 1).double().sqrt(), torch.eye(law.n, dtype=torch.float64)
    else:
        sigma, Q = torch.linalg.eigh(S.double().cpu())
        spread = (sigma.clamp_min(0) * (law.n / sigma.sum())).sqrt()
        a, root = Q @ (spread * sign), (Q * spread) @ Q.mT
    return a / a.norm(), root


def _enough(pilot: list[Estimate], count: int, scales: list[float], required: list[float], max_draws: int) -> int:
    """Draws after which every statistic has 8 standard errors inside its resolution, with a third in hand for the pilot's own error."""
    ratios = [(WIDTH * e.standard_error / (need * scale)) ** 2 for e, scale, need in zip(pilot, scales, required, strict=True)]
    return int(min(max_draws, max(PILOT, 1.3 * count * max(ratios))))
